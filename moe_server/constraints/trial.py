"""The process in which a constraint is compiled for the first time: `trials` runs it.

It may die of a constraint: the kernel ends it when one takes too much processor time or memory, and
a stack that overflows does too. Reads the vocabulary and then constraints from stdin, and answers
each on stdout twice: with nothing when the limits hold that it may die of, and then with an error
message, empty where there is none.
"""

import re
import resource
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from moe_server.constraints.bounds import COMPILE_S, MEMORY_BYTES, STACK_BYTES, TOO_LARGE
from moe_server.constraints.frames import HEADER_BYTES, length_of, pack
from moe_server.constraints.grammar import refusal
from moe_server.constraints.matcher import compile_constraint
from moe_server.constraints.vocabulary import build_tokenizer
from moe_server.errors import MoeServerError
from moe_server.messages import Constraint, Vocabulary


def main() -> None:
    """Answers until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    vocabulary = msgspec.msgpack.decode(_read(), type=Vocabulary)
    try:
        tokenizer = build_tokenizer(vocabulary)
    except ValueError as error:
        _answer(str(error))
        return
    _answer("")
    threading.stack_size(STACK_BYTES)
    decoder = msgspec.msgpack.Decoder(Constraint)

    def try_one(constraint: Constraint) -> str:
        try:
            compile_constraint(constraint, tokenizer, vocabulary.vocab_size).fork([])
        except MoeServerError as error:
            return error.message
        except MemoryError:
            return refusal(constraint, TOO_LARGE).message
        return ""

    while frame := _read():
        constraint = decoder.decode(frame)
        # From what there is now: what the allocator keeps of earlier ones is not this one's.
        limit_bytes = _data_bytes() + MEMORY_BYTES
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if hard != resource.RLIM_INFINITY:
            limit_bytes = min(limit_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard))
        # Its signal's default action is the end of the process, whatever code is running.
        signal.setitimer(signal.ITIMER_PROF, COMPILE_S)
        _answer("")
        message = _on_small_stack(partial(try_one, constraint))
        signal.setitimer(signal.ITIMER_PROF, 0)
        _answer(message)


def _on_small_stack(work: Callable[[], str]) -> str:
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def _read() -> bytes:
    header = sys.stdin.buffer.read(HEADER_BYTES)
    return sys.stdin.buffer.read(length_of(header)) if header else b""


def _answer(message: str) -> None:
    sys.stdout.buffer.write(pack(message.encode()))
    sys.stdout.buffer.flush()


def _data_bytes() -> int:
    """What RLIMIT_DATA counts."""
    found = re.search(r"^VmData:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
