"""How soon a server is READY, from a cold disk and again after its engine was killed under load.

The server is the command that an operator starts, on half of a model's experts. Its first start has
nothing in the page cache; the engine is killed (SIGKILL) while streams run on it. Both times end
with READY, which the server's own warm-up proves: three probes at first, one after a restart.
"""

import os
import signal
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.child import drop_page_cache
from benchmarks.engine_server import (
    END_TIMEOUT_S,
    START_TIMEOUT_S,
    engine_of,
    half_resident,
    io_read_bytes,
    running_server,
    wait_ready,
)
from benchmarks.loads import prompt
from moe_server.client import Client, RetryableError
from moe_server.proto.moe_server.v1 import generation_pb2

NUM_STREAMS = 8
NEW_TOKENS = 2000
PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Restart:
    """One server's first start, and what became of it when its engine was killed."""

    first_ready_s: float
    ready_again_s: float
    """From the kill on."""
    read_bytes: int
    """Of the second engine until READY: dense weights, and what its probe wanted from disk."""
    streams_told_to_retry: int
    """Of NUM_STREAMS: ended with UNAVAILABLE and a time to wait."""

    @property
    def ratio(self) -> float:
        return self.ready_again_s / self.first_ready_s


def measure(model: Path, folder: Path) -> Restart:
    """Starts a server, kills its engine under load, waits for it, ends it. Needs root.

    Args:
        model: A checkpoint; half of its experts get a slot.
        folder: For the server's log and socket.

    Raises:
        ServerFailedError: It ended, failed, or took too long.
    """
    drop_page_cache()
    address = f"unix:{folder / 'bench-engine.sock'}"
    log = folder / "logs/restart.log"
    flags = ["--device-memory", str(half_resident(str(model)))]
    with (
        running_server(str(model), flags, address, log) as process,
        Client(address) as client,
    ):
        started = time.monotonic()
        wait_ready(client, process, log)
        first_ready_s = time.monotonic() - started
        streams = [_Stream(address, number) for number in range(NUM_STREAMS)]
        for stream in streams:
            stream.begun.wait(START_TIMEOUT_S)
        killed = time.monotonic()
        os.kill(engine_of(process.pid), signal.SIGKILL)
        wait_ready(client, process, log, num_restarts=1)
        ready_again_s = time.monotonic() - killed
        read_bytes = io_read_bytes(engine_of(process.pid))
        for stream in streams:
            stream.join(END_TIMEOUT_S)
        told = sum(stream.was_told_to_retry for stream in streams)
    return Restart(first_ready_s, ready_again_s, read_bytes, told)


def ratio(restarts: list[Restart]) -> float:
    """The median of what is compared within one server's life."""
    return statistics.median(restart.ratio for restart in restarts)


class _Stream(threading.Thread):
    """A request that runs until its engine is gone."""

    def __init__(self, address: str, number: int) -> None:
        super().__init__(daemon=True)
        self.begun = threading.Event()
        self.was_told_to_retry = False
        self._address = address
        self._number = number
        self.start()

    def run(self) -> None:
        stopping = generation_pb2.Stopping(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        ids = prompt(f"restart/{self._number}", PROMPT_TOKENS)
        with Client(self._address) as client:
            try:
                for response in client.generate_stream(ids, stopping=stopping):
                    if response.HasField("delta"):
                        self.begun.set()
            except RetryableError as error:
                self.was_told_to_retry = "Retry after" in error.remedy
            finally:
                self.begun.set()
