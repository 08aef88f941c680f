"""Causes that keep a server from serving, and what it does about them: one server for each.

A server is started as an operator would, something happens to it, and goes again. All along it is
looked at from outside (`scene`, `observer`): it may not say that it is ready and not be; while the
cause lasts it must name it; when the cause has gone it must give right answers without anybody's
help (but for a server that was killed, which is started again). `coldstart_chaos` lists the
scenarios that are run; `tests/warmup/test_chaos.py` runs those that need no root.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.cgroups import limit_memory, memory_in_use
from benchmarks.engine_server import ServerFailedError, children_of, engine_of
from benchmarks.faults import Faults
from benchmarks.observer import UNREACHABLE, Moment, answer_of
from benchmarks.scene import (
    Outcome,
    Scene,
    Served,
    address_in,
    ended,
    scene,
)
from moe_server.warmup.stages import PREFLIGHT

ENGINE_DIES_WITHIN_S = 5.0
STARTING, LOADING = "starting", "loading"
PREFLIGHT_PLACE = f"{STARTING}: {PREFLIGHT}"
KILLED = ("SIGKILL", "signal 9", "killed")
READ_ERROR = ("Input/output error",)
MEMORY = ("memory",)
CUT_BYTES = 100_000
"""What there is of a shard that is cut short, or half of it."""
SPARE_BYTES = (50 * 10**6, 150 * 10**6, 400 * 10**6)
"""What a shrunk group leaves; more where the kernel refuses."""


def undisturbed(served: Served, slow_bytes_per_s: float) -> tuple[Served, list[Moment]]:
    """A start that nothing happens to.

    Args:
        served: Whose question has no answer yet.
        slow_bytes_per_s: Of its disk, so that stages can be seen.

    Returns:
        With the answer; and what the server said until it was READY.

    Raises:
        ServerFailedError: It was not READY in time.
    """
    answer, moments = None, list[Moment]()
    with scene("undisturbed", served) as set_up, set_up.serving():
        set_up.faults.slow(slow_bytes_per_s)
        set_up.wait("READY", lambda moment: moment.is_ready)
        set_up.faults.end()
        answer = answer_of(address_in(served.folder), served.question)
        moments = list(set_up.observer.moments)
    if set_up.problems:
        raise ServerFailedError(set_up.problems[0])
    return replace(served, question=replace(served.question, answer=answer)), moments


def places(moments: Sequence[Moment]) -> list[str]:
    """The places of a start, READY included, in order, each once.

    Without the preflight, which is over between two looks.
    """
    seen = dict.fromkeys(moment.place for moment in moments if moment.state != UNREACHABLE)
    return [place for place in seen if place != PREFLIGHT_PLACE]


def killed_engine(served: Served, places: Sequence[str], slow_bytes_per_s: float) -> Outcome:
    """SIGKILL of the engine as soon as the server is at a place, and of the next at the next.

    Args:
        served: What is served.
        places: In the order of a start.
        slow_bytes_per_s: Of its disk until then.
    """
    with scene(f"engine killed at {_all(places)}", served) as on, on.serving():
        for place in places:
            on.faults.slow(slow_bytes_per_s)
            if not on.arrive(place):
                break
            killed_s = time.monotonic()
            try:
                os.kill(engine_of(on.server.pid), signal.SIGKILL)
            except ServerFailedError:  # it is about to be spawned
                on.wait("on", lambda moment: moment.state != STARTING)
                os.kill(engine_of(on.server.pid), signal.SIGKILL)
            on.faults.end()
            on.hear(killed_s, KILLED)
        on.recover(killed_s)
    return on.outcome()


def killed_server(served: Served, places: Sequence[str], slow_bytes_per_s: float) -> Outcome:
    """SIGKILL of the server as soon as it is at a place; it is started again, until the next.

    Args:
        served: What is served.
        places: In any order.
        slow_bytes_per_s: Of its disk until then.
    """
    with scene(f"server killed at {_all(places)}", served) as on:
        for place in places:
            on.faults.slow(slow_bytes_per_s)
            with on.serving():
                if on.arrive(place):
                    children = children_of(on.server.pid)
                    on.server.kill()
                    on.server.wait()
                    on.said = f"ended with {on.server.returncode}"
                    if not ended(children, ENGINE_DIES_WITHIN_S):
                        on.problems.append("its engine outlived it")
        on.faults.end()
        gone_s = time.monotonic()
        with on.serving():
            on.recover(gone_s)
    return on.outcome()


def _all(places: Sequence[str]) -> str:
    return places[0] if len(places) == 1 else f"each of {len(places)} places"


def slow_disk(
    served: Served,
    slow: Callable[[Faults], None],
    fast: Callable[[Faults], None],
    slow_s: float,
    groups: Sequence[Path] = (),
) -> Outcome:
    """A slow disk from the start on, until it has been loading for `slow_s`."""
    with scene("disk slowed 10x", served, groups) as on, on.serving():
        slow(on.faults)
        on.wait(LOADING, lambda moment: moment.state == LOADING)
        begun_s = time.monotonic()
        seen = []
        while time.monotonic() - begun_s < slow_s and not on.observer.now.is_ready:
            seen.append((on.observer.now.stage, on.observer.now.bytes_done))
            time.sleep(0.1)
        stages_seen = {stage for stage, _ in seen}
        if len({number for _, number in seen}) < 4:
            on.problems.append(f"it did not say how far it is: {sorted(set(seen))}")
        on.said = ", ".join(sorted(stages_seen))
        fast(on.faults)
        on.recover(time.monotonic())
        if on.observer.now.restarts:
            on.problems.append(f"its engine was started {on.observer.now.restarts} times again")
    return on.outcome()


def missing_shard(served: Served, *, from_the_start: bool, away_s: float) -> Outcome:
    """A shard is away for a while: when the server is started, or once its port answers."""
    when = "before the start" if from_the_start else "during the load"
    with scene(f"shard missing {when}", served) as on, _shard_back(served) as (shard, away):
        if from_the_start:
            shard.rename(away)
        else:
            on.faults.hold()  # before its first byte was read
        with on.serving():
            begun_s = time.monotonic()
            if not from_the_start:
                on.wait("there", lambda moment: moment.state != UNREACHABLE)
                shard.rename(away)
                on.faults.end()
            _wait_or_ready(on, away_s)
            if not on.observer.now.is_ready:  # it may have opened the shard before
                on.hear(begun_s, [shard.name])
            away.rename(shard)
            on.recover(time.monotonic())
    return on.outcome()


def cut_shard(served: Served, broken_s: float) -> Outcome:
    """A shard ends early when the server is started, as one that is still being copied."""
    name = "shard cut short before the start"
    with scene(name, served) as on, _shard_back(served) as (shard, away):
        shard.rename(away)
        with away.open("rb") as stream:
            shard.write_bytes(stream.read(min(CUT_BYTES, away.stat().st_size // 2)))
        with on.serving():
            begun_s = time.monotonic()
            _wait_or_ready(on, broken_s)
            on.hear(begun_s, [shard.name])
            away.replace(shard)
            on.recover(time.monotonic())
    return on.outcome()


@contextmanager
def _shard_back(served: Served) -> Iterator[tuple[Path, Path]]:
    """A shard's place, and where it may be meanwhile; it is back on leaving."""
    shard = max(served.path.glob("*.safetensors"))
    away = shard.with_suffix(".away")
    try:
        yield shard, away
    finally:
        if away.exists():
            away.replace(shard)


def read_error(served: Served, *, while_ready: bool, broken_s: float) -> Outcome:
    """Every read fails for a while: from the start on, or once the server is READY."""
    when = "while READY" if while_ready else "from the start"
    with scene(f"read errors {when}", served) as on, on.serving():
        begun_s = time.monotonic()
        if while_ready:
            on.wait_right()
        on.faults.fail()
        _wait(on, broken_s)
        if not while_ready:
            on.hear(begun_s, READ_ERROR)
        on.faults.end()
        on.recover(time.monotonic())
    return on.outcome()


def shrunk_memory(served: Served, group: Path, whole_bytes: int, shrunk_s: float) -> Outcome:
    """The memory group shrinks during the load to what is in use, and grows again.

    Args:
        served: What is served.
        group: A memory group, not limited yet.
        whole_bytes: What it may hold at first and at last.
        shrunk_s: For how long.
    """
    limit_memory(group, whole_bytes)
    name = "memory group shrunk during the load"
    with scene(name, served, [group]) as on, on.serving():
        on.faults.slow(whole_bytes / shrunk_s)
        on.wait(LOADING, lambda moment: moment.state == LOADING)
        since_s = time.monotonic()
        _shrink(group)
        _wait(on, shrunk_s)
        on.hear(since_s, MEMORY)
        on.faults.end()
        limit_memory(group, whole_bytes)
        on.recover(time.monotonic())
    return on.outcome()


def _shrink(group: Path) -> None:
    for spare in SPARE_BYTES:
        try:
            limit_memory(group, memory_in_use(group) + spare)
        except OSError:  # it has grown meanwhile
            continue
        return


def _wait(on: Scene, seconds: float) -> None:
    """Lets the cause last."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s and on.server.poll() is None:
        time.sleep(0.02)


def _wait_or_ready(on: Scene, seconds: float) -> None:
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s and not on.observer.now.is_ready and on.server.poll() is None:
        time.sleep(0.02)
