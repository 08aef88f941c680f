"""How soon a server on a cold machine is READY, beside what the disk alone would take.

The server is the command that an operator starts, with nothing in the page cache; its health is
asked all along. The limit is the time that the measured disk takes for what must be read: every
byte of the dense weights and of the experts once (an expert that was never read cannot have been
proven), times 1.15, and two seconds. Needs root.
"""

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cgroups import memory_group
from benchmarks.child import drop_page_cache
from benchmarks.engine_server import (
    START_TIMEOUT_S,
    engine_of,
    half_resident,
    io_read_bytes,
    processor_seconds,
    running_server,
)
from benchmarks.observer import UNREACHABLE, Observer, stages
from moe_server.budget import runtime_bytes
from moe_server.checkpoint import read_checkpoint
from moe_server.config import load_config

SLACK, FIXED_S = 1.15, 2.0
"""What READY may take beyond the disk's time: a share, and seconds."""
PORT_WITHIN_S = 1.0
FRONT_DOOR_BYTES = 300 * 10**6
"""What the group may hold beside the budget: the front door."""


@dataclass(frozen=True)
class Arm:
    """How much memory a server may take."""

    name: str
    is_capped: bool
    """Half of the experts have a place, and the processes' group holds that and no more."""

    def cap_bytes(self, model: Path) -> int | None:
        """What the server's group may hold."""
        if not self.is_capped:
            return None
        config = load_config(flags={"model": str(model)}, environ={})
        runtime = runtime_bytes(config, read_checkpoint(model))
        return half_resident(str(model)) + runtime + FRONT_DOOR_BYTES

    def flags(self, model: Path) -> list[str]:
        """Of `serve`."""
        return ["--device-memory", str(half_resident(str(model)))] if self.is_capped else []

    def num_slots(self, model: Path) -> int:
        """Experts that have a place."""
        num_experts = len(read_checkpoint(model).experts)
        return num_experts // 2 if self.is_capped else num_experts


CAPPED, WHOLE = Arm("half", is_capped=True), Arm("whole", is_capped=False)
ARMS = (CAPPED, WHOLE)


@dataclass(frozen=True)
class ModelBytes:
    """What a checkpoint has to be read of."""

    dense: int
    experts: int

    @property
    def whole(self) -> int:
        return self.dense + self.experts


@dataclass(frozen=True)
class Start:
    """One server's start, until it was READY."""

    arm: str
    ready_s: float
    """Since the process was started, seen through its health."""
    port_s: float
    """Until the port answered."""
    model_bytes: int
    read_bytes: int
    """From the disk, by the engine, as the kernel counts: what did not fit was read again."""
    kernel_s: float
    """Processor time of the engine in the kernel: it grows where memory has to be found first."""
    disk_bytes_per_s: float
    """The mean of right before and right after."""
    stages_s: dict[str, float]
    slots: int
    faults: list[str]
    """Liveness that was not SERVING, and the like."""

    @property
    def limit_s(self) -> float:
        """Every byte of the model once."""
        return limit_s(self.model_bytes, self.disk_bytes_per_s)

    @property
    def ratio(self) -> float:
        return self.ready_s / self.limit_s

    @property
    def ratio_as_read(self) -> float:
        """Beside a limit that counts what was really read."""
        return self.ready_s / limit_s(self.read_bytes, self.disk_bytes_per_s)


def limit_s(read_bytes: float, disk_bytes_per_s: float) -> float:
    """The seconds until READY that the bar allows."""
    return SLACK * read_bytes / disk_bytes_per_s + FIXED_S


def worst_ratio(starts: Sequence[Start]) -> float:
    """The median of the arm that is worse."""
    arms = {start.arm for start in starts}
    return max(
        statistics.median(start.ratio for start in starts if start.arm == arm) for arm in arms
    )


def model_bytes(model: Path) -> ModelBytes:
    """From the checkpoint's headers."""
    checkpoint = read_checkpoint(model)
    experts = sum(
        part.nbytes for expert in checkpoint.experts for part in checkpoint.record_segments(expert)
    )
    dense = sum(tensor.nbytes for tensor in checkpoint.dense.values())
    return ModelBytes(dense, experts)


@dataclass(frozen=True)
class Started:
    """A server that is READY."""

    process: "subprocess.Popen[bytes]"
    address: str
    observer: Observer
    begun_at_s: float
    ready_at_s: float


@contextmanager
def started(
    model: Path, arm: Arm, folder: Path, environ: Mapping[str, str] | None = None
) -> Iterator[Started]:
    """A server started on a cold page cache and observed until it is READY; ended on leaving.

    Args:
        model: A checkpoint.
        arm: How much memory it may take.
        folder: For its log and socket.
        environ: Further variables.

    Raises:
        ServerFailedError: It was not READY in time.
    """
    address, log = f"unix:{folder / 'coldstart.sock'}", folder / "logs/coldstart.log"
    with memory_group(arm.cap_bytes(model)) as group:
        drop_page_cache()
        groups = [] if group is None else [group]
        begun_at_s = time.monotonic()
        with (
            running_server(
                str(model), arm.flags(model), address, log, groups=groups, environ=environ
            ) as process,
            Observer(address) as observer,
        ):
            ready = observer.wait(
                lambda moment: moment.is_ready,
                START_TIMEOUT_S,
                "READY",
                lives=lambda: process.poll() is None,
            )
            yield Started(process, address, observer, begun_at_s, ready.at_s)


def measure(model: Path, arm: Arm, folder: Path, disk: Callable[[], float]) -> Start:
    """One start and its end. Needs root.

    Args:
        model: A checkpoint.
        arm: How much memory it may take.
        folder: For its log and socket.
        disk: Measures its bytes per second.

    Raises:
        ServerFailedError: It was not READY in time.
    """
    before = disk()
    with started(model, arm, folder) as server:
        engine = engine_of(server.process.pid)
        read, (_, kernel_s) = io_read_bytes(engine), processor_seconds(engine)
        observer = server.observer
        answered_at_s = observer.answered_at_s or server.ready_at_s
        port_s = answered_at_s - server.begun_at_s
        faults = list(observer.dead)
        faults += [
            f"unreachable at {moment.at_s - server.begun_at_s:.2f} s"
            for moment in observer.since(answered_at_s)
            if moment.at_s > answered_at_s and moment.state == UNREACHABLE
        ]
        if port_s > PORT_WITHIN_S:
            faults.append(f"the port answered after {port_s:.2f} s")
        moments = observer.since(server.begun_at_s)
    return Start(
        arm.name,
        server.ready_at_s - server.begun_at_s,
        port_s,
        model_bytes(model).whole,
        read,
        kernel_s,
        (before + disk()) / 2,
        stages(moments, server.ready_at_s),
        arm.num_slots(model),
        faults,
    )
