"""Records traces from real runs: the embedded demo model's calls to its expert cache.

    python -m benchmarks.traces_record

Runs an engine in this process and wraps its cache's `acquire`; engine and cache know nothing of it.
Writes benchmarks/traces/*.json. The demo model is no evidence for another model's routing (its
README says why): what is real here is the sequence of calls, prompts beside decoding included.
"""

import json
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from benchmarks.traces import RECORDED
from moe_server import demo
from moe_server.messages import Sampling, Submit
from moe_server.offload.cache import ExpertCache, Held
from moe_server.tokenizer import load_tokenizer
from tests.driver import running_engine

NEW_TOKENS = 160
MODEL = Path(demo.__file__).parent

PROMPTS = [
    "Return a list of all the given option strings, in the order in which they were added.",
    "Raise an exception if the file cannot be opened for reading; otherwise return its contents.",
    "This module provides classes for parsing and formatting dates and times.",
    "Create a new socket using the given address family, socket type and protocol number.",
    "The following functions convert between strings and bytes. The encoding defaults to UTF-8.",
    "Called when the parser meets a start tag. Attributes are given as a list of pairs.",
    "Wait until the thread terminates or the timeout in seconds has passed.",
    "Compute the mean, the median and the variance of a sequence of numbers.",
]


class Recorder:
    """Stands before a cache's `acquire` and writes down what was asked for, as bit masks."""

    def __init__(self, cache: ExpertCache) -> None:
        self.calls: list[tuple[int, int]] = []
        """(layer, mask with bit e set for expert e)."""
        self._acquire: Callable[..., Generator[Held, None, None]] = cache.acquire
        cache.acquire = self.acquire  # type: ignore[method-assign]

    def acquire(
        self, layer: int, experts: Sequence[int], *args: object, **kwargs: object
    ) -> Generator[Held, None, None]:
        """As the cache's."""
        self.calls.append((layer, sum(1 << expert for expert in experts)))
        return self._acquire(layer, experts, *args, **kwargs)


def record(batch: int) -> None:
    """All prompts, `batch` at a time, sampled; written to a file named after the batch."""
    tokenizer = load_tokenizer(MODEL)
    assert tokenizer is not None
    requests = [
        Submit(seed, tokenizer.encode(text), NEW_TOKENS, [], Sampling(temperature=0.7, seed=seed))
        for seed, text in enumerate(PROMPTS)
    ]
    with running_engine(MODEL) as engine:
        recorder = Recorder(engine.cache)
        for first in range(0, len(requests), batch):
            for request in requests[first : first + batch]:
                engine.submit(request)
            while not engine.idle:
                engine.step()
        checkpoint = engine.model.checkpoint
    prompt_tokens = sum(len(request.token_ids) for request in requests)
    line = {
        "name": f"demo/b{batch}",
        "num_layers": checkpoint.num_layers,
        "num_experts": checkpoint.num_experts,
        # The last token of a request is sampled and never computed.
        "num_tokens": prompt_tokens + len(requests) * (NEW_TOKENS - 1),
        "calls": recorder.calls,
    }
    RECORDED.mkdir(exist_ok=True)
    file = RECORDED / f"demo-b{batch}.json"
    file.write_text(json.dumps(line, separators=(",", ":")) + "\n")
    print(file, len(recorder.calls), "calls")


if __name__ == "__main__":
    for size in (1, 8):
        record(size)
