"""The process in which a constraint is compiled for the first time: `trials` runs it.

It may die of a constraint: the kernel ends it when one takes too much processor time or memory, and
a stack that overflows does too. Reads the vocabulary and then constraints from stdin, and answers
each on stdout with an error message, empty where there is none.
"""

import re
import resource
import signal
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from moe_server.constraints.matcher import compile_constraint
from moe_server.constraints.vocabulary import build_tokenizer
from moe_server.errors import MoeServerError
from moe_server.messages import Constraint, Vocabulary

COMPILE_S = 2.0
"""Of processor time; other processes that are busy do not count."""
MEMORY_BYTES = 128 * 2**20
"""A constraint and what compiling it needs on the way."""
STACK_BYTES = 2**20
"""An eighth of what the engine's threads have: what fits here cannot overflow there."""

_HEADER = struct.Struct("<I")


def pack(frame: bytes) -> bytes:
    """A frame with its length before it, as both sides write them."""
    return _HEADER.pack(len(frame)) + frame


def header_length(header: bytes) -> int:
    """The length of the frame behind this header of `HEADER_BYTES`."""
    (length,) = _HEADER.unpack(header)
    return int(length)


HEADER_BYTES = _HEADER.size


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
    limit_bytes = _data_bytes() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    decoder = msgspec.msgpack.Decoder(Constraint)

    def try_one(constraint: Constraint) -> str:
        try:
            compile_constraint(constraint, tokenizer, vocabulary.vocab_size).fork([])
        except MoeServerError as error:
            return error.message
        return ""

    while frame := _read():
        constraint = decoder.decode(frame)
        # Its signal's default action is the end of the process, whatever code is running.
        signal.setitimer(signal.ITIMER_PROF, COMPILE_S)
        message = _on_small_stack(lambda constraint=constraint: try_one(constraint))  # type: ignore[misc]
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
    return sys.stdin.buffer.read(header_length(header)) if header else b""


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
