"""The scenarios of chaos that a cold start has to stand, and the order in which they are run.

What happens in each is in `chaos`. Slowness and read errors come from `faults`, so that any model
on any disk shows every stage; what needs root (the disk really throttled, a memory group that
shrinks) is left out without it, and said to be.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import chaos
from benchmarks.cgroups import BLKIO, READ_RATE, disk_group, limit_reads, memory_group
from benchmarks.child import can_cap
from benchmarks.coldstart_ready import CAPPED, model_bytes
from benchmarks.scene import Outcome, Served

LOAD_S = 2.0
"""What a load takes at least where stages have to be seen."""
CAUSE_S = 3.0
"""How long a cause lasts."""
TIMEOUT_QUICK_S = 60.0
SLOW_S = 8.0
SLOWDOWN = 10


def run(
    model: Path,
    folder: Path,
    disk_bytes_per_s: float,
    told: Callable[[Outcome], None],
    *,
    quick: bool,
) -> list[Outcome]:
    """Every scenario.

    Args:
        model: A checkpoint; its shards are moved away and back.
        folder: For logs and sockets.
        disk_bytes_per_s: What is slowed.
        told: Called with each outcome.
        quick: Kills one after another instead of each in a start of its own, and less patience.
    """
    served, places = prepared(model, folder)
    if quick:
        served = replace(served, timeout_s=TIMEOUT_QUICK_S)
    killed_at = [places] if quick else [[place] for place in places]
    outcomes = []
    for scenario in scenarios(served, killed_at, disk_bytes_per_s):
        outcomes.append(scenario())
        told(outcomes[-1])
    return outcomes


def prepared(model: Path, folder: Path) -> tuple[Served, list[str]]:
    """How a model is served, with the answer of an undisturbed server, and a start's places."""
    folder.mkdir(exist_ok=True)
    served = Served(str(model), model, tuple(CAPPED.flags(model)), folder)
    served, moments = chaos.undisturbed(served, model_bytes(model).whole / LOAD_S)
    return served, chaos.places(moments)


def scenarios(
    served: Served, killed_at: Sequence[Sequence[str]], disk_bytes_per_s: float
) -> Iterator[Callable[[], Outcome]]:
    """All that can be run here.

    Args:
        served: What is served.
        killed_at: Places, those together that are visited in one scenario.
        disk_bytes_per_s: What is slowed.
    """
    rate = model_bytes(served.path).whole / LOAD_S
    for places in killed_at:
        yield lambda places=places: chaos.killed_engine(served, places, rate)
    for places in killed_at:
        yield lambda places=places: chaos.killed_server(served, places, rate)
    for from_the_start in (True, False):
        yield lambda when=from_the_start: chaos.missing_shard(
            served, from_the_start=when, away_s=CAUSE_S
        )
    yield lambda: chaos.cut_shard(served, CAUSE_S)
    for while_ready in (False, True):
        yield lambda when=while_ready: chaos.read_error(served, while_ready=when, broken_s=CAUSE_S)
    yield lambda: _slow_disk(served, disk_bytes_per_s / SLOWDOWN)
    if can_cap() is None:
        yield lambda: _shrunk_memory(served)


def _slow_disk(served: Served, bytes_per_s: float) -> Outcome:
    """The disk itself where that can be done, the reads of the processes elsewhere."""
    # A small model, too, is to be seen on its way.
    bytes_per_s = min(bytes_per_s, model_bytes(served.path).whole / SLOW_S / 2)
    if os.geteuid() == 0 and (BLKIO / READ_RATE).parent.exists():
        with disk_group() as group:
            path = served.path
            return chaos.slow_disk(
                served,
                lambda _faults: limit_reads(group, path, round(bytes_per_s)),
                lambda _faults: limit_reads(group, path, 0),
                SLOW_S,
                [group],
            )
    return chaos.slow_disk(
        served, lambda faults: faults.slow(bytes_per_s), lambda faults: faults.end(), SLOW_S
    )


def _shrunk_memory(served: Served) -> Outcome:
    cap_bytes = CAPPED.cap_bytes(served.path)
    assert cap_bytes is not None
    with memory_group(cap_bytes) as group:
        assert group is not None
        return chaos.shrunk_memory(served, group, cap_bytes, CAUSE_S)
