"""How soon a server is READY, from a cold disk and again after its engine was killed under load.

The server is the command that an operator starts, on half of a model's experts. Its first start has
nothing in the page cache; the engine is killed (SIGKILL) while streams run on it. Both times end
with READY, which the server's own warm-up proves: a batch of requests and three probes at first,
one probe after a restart.
"""

import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.child import drop_page_cache
from benchmarks.loads import prompt
from moe_server.budget import plan_memory
from moe_server.checkpoint import read_checkpoint
from moe_server.client import Client, RetryableError, UnreachableError
from moe_server.config import load_config
from moe_server.proto.moe_server.v1 import admin_pb2, generation_pb2

NUM_STREAMS = 8
NEW_TOKENS = 2000
PROMPT_TOKENS = 16
POLL_S = 0.02
START_TIMEOUT_S = 300
END_TIMEOUT_S = 60


class RestartFailedError(Exception):
    """The server did not do what is measured; the message says what it did."""


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
        RestartFailedError: It ended, failed, or took too long.
    """
    drop_page_cache()
    address = f"unix:{folder / 'bench-engine.sock'}"
    log = folder / "logs/restart.log"
    with _server(model, address, log) as process, Client(address) as client:
        started = time.monotonic()
        _wait_ready(client, process, log, num_restarts=0)
        first_ready_s = time.monotonic() - started
        streams = [_Stream(address, number) for number in range(NUM_STREAMS)]
        for stream in streams:
            stream.begun.wait(START_TIMEOUT_S)
        killed = time.monotonic()
        os.kill(_engine(process.pid), signal.SIGKILL)
        _wait_ready(client, process, log, num_restarts=1)
        ready_again_s = time.monotonic() - killed
        read_bytes = _read_bytes(_engine(process.pid))
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


@contextmanager
def _server(model: Path, address: str, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "moe_server", "serve", "--model", str(model)]
    budget = ["--device-memory", str(_half_resident(model))]
    with log.open("w") as printed:
        process = subprocess.Popen(
            [*command, *budget, "--listen", address], stdout=printed, stderr=printed
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()  # its engine dies with it
            process.wait()


def _half_resident(model: Path) -> int:
    config = load_config(flags={"model": str(model), "device_memory": "min"}, environ={})
    plan = plan_memory(config, read_checkpoint(model))
    return plan.minimum_device_bytes + (plan.num_experts_total // 2 - 1) * plan.slot_bytes


def _wait_ready(
    client: Client, process: "subprocess.Popen[bytes]", log: Path, num_restarts: int
) -> None:
    give_up_at = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up_at:
        if process.poll() is not None:
            raise RestartFailedError(f"the server ended with {process.returncode}; see {log}")
        with suppress(UnreachableError):
            status = client.status()
            if status.engine_restarts > num_restarts:
                raise RestartFailedError(f"the engine was lost once more; see {log}")
            is_this_life = status.engine_restarts == num_restarts
            if is_this_life and status.state == admin_pb2.SERVER_STATE_READY:
                return
            if status.state == admin_pb2.SERVER_STATE_FAILED:
                raise RestartFailedError(f"the server failed: {status.reason}")
        time.sleep(POLL_S)
    raise RestartFailedError(f"the server was not READY within {START_TIMEOUT_S} s; see {log}")


def _engine(server: int) -> int:
    """The process id of a server's engine."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text(encoding="ascii").split()
    if len(children) != 1:
        raise RestartFailedError(f"the server has {len(children)} processes, expected its engine")
    return int(children[0])


def _read_bytes(process: int) -> int:
    lines = Path(f"/proc/{process}/io").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])
