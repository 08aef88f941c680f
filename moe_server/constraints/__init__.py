"""What the text of a completion must be: JSON schemas, regular expressions, grammars, choices.

llguidance does the work; a request's `Matcher` says which tokens may follow. A constraint comes
from a stranger, and compiling one of 60 characters can take seconds, gigabytes or the whole
process (measured: benchmarks/LOG.md). So it is compiled first in a process of its own that may die
(`trials` in the front door, `trial` in the process), and only then in the engine's, on a thread
(`compiler`). Imports `errors`, `messages` and `sequence`; llguidance when the first one comes.
"""
