"""The command that an operator starts, for benchmarks that measure a whole server.

Starts and ends it, waits for its states and looks at its two processes from outside. Knows nothing
of what is measured.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.cgroups import within
from moe_server.budget import plan_memory
from moe_server.checkpoint import read_checkpoint
from moe_server.client import Client, UnreachableError
from moe_server.config import load_config
from moe_server.proto.moe_server.v1 import admin_pb2

POLL_S = 0.02
START_TIMEOUT_S = 300
END_TIMEOUT_S = 60
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
NO_HOT_SET = {"MOE_SERVER_WARMUP__HOT_SET": "off"}
"""No run is to find what an earlier one has learned."""


class ServerFailedError(Exception):
    """The server did not do what is measured; the message says what it did."""


@contextmanager
def running_server(
    model: str,
    flags: Sequence[str],
    address: str,
    log: Path,
    *,
    groups: Sequence[Path] = (),
    environ: Mapping[str, str] | None = None,
) -> Iterator["subprocess.Popen[bytes]"]:
    """`moe-server serve`, ended on leaving.

    Args:
        model: As the command takes it.
        flags: Further ones.
        address: Where it listens.
        log: For what it prints.
        groups: Of `cgroups`; it and its engine run in them.
        environ: Further variables.
    """
    command = [sys.executable, "-m", "moe_server", "serve", "--model", model, "--listen", address]
    with log.open("w") as printed:
        process = subprocess.Popen(
            within(groups, [*command, *flags]),
            stdout=printed,
            stderr=printed,
            env={**os.environ, **NO_HOT_SET, **(environ or {})},
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


def wait_ready(
    client: Client,
    process: "subprocess.Popen[bytes]",
    log: Path,
    num_restarts: int = 0,
    timeout_s: float = START_TIMEOUT_S,
) -> None:
    """Waits until the server is READY in its engine's life number `num_restarts`.

    Raises:
        ServerFailedError: It ended, failed, lost its engine once more, or took too long.
    """
    give_up_at = time.monotonic() + timeout_s
    while time.monotonic() < give_up_at:
        if process.poll() is not None:
            raise ServerFailedError(f"the server ended with {process.returncode}; see {log}")
        with suppress(UnreachableError):
            status = client.status()
            if status.engine_restarts > num_restarts:
                raise ServerFailedError(f"the engine was lost once more; see {log}")
            is_this_life = status.engine_restarts == num_restarts
            if is_this_life and status.state == admin_pb2.SERVER_STATE_READY:
                return
            if status.state == admin_pb2.SERVER_STATE_FAILED:
                raise ServerFailedError(f"the server failed: {status.reason}")
        time.sleep(POLL_S)
    raise ServerFailedError(f"the server was not READY within {timeout_s:g} s; see {log}")


def engine_of(server: int) -> int:
    """The process id of a server's engine."""
    children = children_of(server)
    for child in children:
        command = Path(f"/proc/{child}/cmdline").read_bytes()
        if b"moe_server.engine_process" in command:
            return child
    raise ServerFailedError(f"the server has {len(children)} processes, none of them its engine")


def children_of(process: int) -> list[int]:
    """The processes that one has started."""
    text = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii")
    return [int(child) for child in text.split()]


def io_read_bytes(process: int) -> int:
    """What a process has had read from disk since it began, by the kernel's count."""
    lines = Path(f"/proc/{process}/io").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def processor_seconds(process: int) -> tuple[float, float]:
    """Processor time since a process began, of all its threads: its own and in the kernel."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return int(fields[11]) / TICKS_PER_S, int(fields[12]) / TICKS_PER_S


def half_resident(model: str, **flags: object) -> int:
    """A device budget in which half of a model's experts have a place; `flags` are config keys."""
    config = load_config(flags={"model": model, "device_memory": "min", **flags}, environ={})
    plan = plan_memory(config, read_checkpoint(config.model_path))
    return plan.minimum_device_bytes + (plan.num_experts_total // 2 - 1) * plan.slot_bytes
