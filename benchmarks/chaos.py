"""Causes that keep a server from serving, and what it does about them: one server for each.

A server is started as an operator would, something happens to it, and goes again. All along it is
looked at from outside (`observer`): it may not say that it is ready and not be; while the cause
lasts it must name it; when the cause has gone it must give right answers without anybody's help
(but for a server that was killed, which is started again). `coldstart_chaos` lists the scenarios
that are run and tests run the quick ones.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.cgroups import limit_memory, memory_in_use
from benchmarks.engine_server import ServerFailedError, children_of, engine_of, running_server
from benchmarks.faults import Faults
from benchmarks.observer import UNREACHABLE, Moment, Observer, Question, answer_of

READY_TIMEOUT_S = 240.0
WHY_TIMEOUT_S = 60.0
"""How long it may take until a server names what keeps it."""
ENGINE_DIES_WITHIN_S = 5.0
STARTING, LOADING = "starting", "loading"
KILLED = ("SIGKILL", "signal 9", "killed")
READ_ERROR = ("Input/output error",)
MEMORY = ("memory",)
CUT_BYTES = 100_000
SPARE_BYTES = (50 * 10**6, 150 * 10**6, 400 * 10**6)
"""What a shrunk group leaves; more where the kernel refuses."""
ASKED = Question((3, 1, 4, 1, 5, 9, 2, 6), new_tokens=8)


@dataclass(frozen=True)
class Served:
    """What the servers serve, and how."""

    model: str
    """As `serve` takes it."""
    path: Path
    """Its directory."""
    flags: tuple[str, ...]
    folder: Path
    """For logs, sockets and faults."""
    question: Question = ASKED
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of one scenario."""

    name: str
    said: str
    """The first thing it said that names the cause."""
    recovered_s: float | None
    """From the cause's end to a right answer; None: it did not."""
    problems: tuple[str, ...]
    """What must not happen, and did."""

    @property
    def passed(self) -> bool:
        return not self.problems


class Scene:
    """A server on which something happens; use `scene`."""

    def __init__(
        self, served: Served, observer: Observer, faults: Faults, groups: Sequence[Path]
    ) -> None:
        self.observer = observer
        self.faults = faults
        self.problems: list[str] = []
        self.said = ""
        self.recovered_s: float | None = None
        self._served = served
        self._groups = groups
        self._running: list[subprocess.Popen[bytes]] = []

    @property
    def server(self) -> "subprocess.Popen[bytes]":
        return self._running[-1]

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Starts a server; ends it on leaving."""
        log = self._served.folder / "logs/chaos.log"
        with running_server(
            self._served.model,
            self._served.flags,
            address_in(self._served.folder),
            log,
            groups=self._groups,
            environ={**self._served.environ, **self.faults.environ},
        ) as process:
            self._running.append(process)
            yield

    def reach(self, what: str, condition: Callable[[Moment], bool]) -> bool:
        """Waits until a condition holds; False where the server was READY without."""
        moment = self.observer.wait(
            lambda moment: moment.is_ready or condition(moment), READY_TIMEOUT_S, what
        )
        return condition(moment)

    def arrive(self, place: str) -> bool:
        """Waits until the server is at a place of `places`; a problem where it never is."""
        if self.reach(place, lambda moment: moment.place == place):
            return True
        self.problems.append("it was READY without having been there")
        return False

    def hear(self, since_s: float, words: Sequence[str]) -> None:
        """Waits until the server has named the cause, in one of these words."""

        def names_it(moment: Moment) -> bool:
            text = moment.text.lower()
            return moment.at_s >= since_s and any(word.lower() in text for word in words)

        give_up_at = time.monotonic() + WHY_TIMEOUT_S
        while time.monotonic() < give_up_at:
            named = [moment.text for moment in self.observer.since(since_s) if names_it(moment)]
            if named:
                self.said = named[0]
                return
            if self.server.poll() is not None:
                self.problems.append(f"the server ended with {self.server.returncode}")
                return
            time.sleep(0.02)
        told = {moment.text for moment in self.observer.since(since_s)}
        self.problems.append(f"it did not say why (none of {list(words)}): {sorted(told)}")

    def recover(self, gone_s: float) -> None:
        """Waits for a right answer, now that the cause has gone."""
        if self.server.poll() is not None:
            self.problems.append("it did not recover: it is not running")
            return
        try:
            right_s = self.observer.wait_right(time.monotonic(), READY_TIMEOUT_S)
        except ServerFailedError as error:
            self.problems.append(f"it did not recover: {error}")
        else:
            self.recovered_s = right_s - gone_s

    def outcome(self, name: str) -> Outcome:
        """All that was seen."""
        wrong = tuple(dict.fromkeys([*self.observer.wrong, *self.observer.dead]))
        return Outcome(name, self.said, self.recovered_s, (*self.problems, *wrong))


def ended(processes: Sequence[int], within_s: float) -> bool:
    """Whether all have ended, now or soon."""
    give_up_at = time.monotonic() + within_s
    while any(map(_lives, processes)):
        if time.monotonic() > give_up_at:
            return False
        time.sleep(0.02)
    return True


def _lives(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def address_in(folder: Path) -> str:
    """Where the servers listen."""
    return f"unix:{folder / 'chaos.sock'}"


@contextmanager
def scene(served: Served, groups: Sequence[Path] = ()) -> Iterator[Scene]:
    """A stage that is set; nothing has been started."""
    (served.folder / "logs").mkdir(exist_ok=True)
    faults = Faults(served.folder / "faults.json", served.path)
    with Observer(address_in(served.folder), served.question) as observer:
        yield Scene(served, observer, faults, groups)


def undisturbed(served: Served, slow_bytes_per_s: float) -> tuple[Served, list[Moment]]:
    """A start that nothing happens to.

    Args:
        served: Whose question has no answer yet.
        slow_bytes_per_s: Of its disk, so that stages can be seen.

    Returns:
        With the answer; and what the server said until it was READY.
    """
    with scene(served) as set_up, set_up.serving():
        set_up.faults.slow(slow_bytes_per_s)
        set_up.observer.wait(lambda moment: moment.is_ready, READY_TIMEOUT_S, "READY")
        set_up.faults.end()
        answer = answer_of(address_in(served.folder), served.question)
        moments = list(set_up.observer.moments)
    return replace(served, question=replace(served.question, answer=answer)), moments


def places(moments: Sequence[Moment]) -> list[str]:
    """The places of a start, READY included, in order, each once."""
    return list(dict.fromkeys(moment.place for moment in moments if moment.state != UNREACHABLE))


def killed_engine(served: Served, place: str, slow_bytes_per_s: float) -> Outcome:
    """SIGKILL of the engine as soon as the server is at a place."""
    with scene(served) as on, on.serving():
        on.faults.slow(slow_bytes_per_s)
        if on.arrive(place):
            killed_s = time.monotonic()
            try:
                os.kill(engine_of(on.server.pid), signal.SIGKILL)
            except ServerFailedError:  # it is about to be spawned
                on.observer.wait(lambda moment: moment.state != STARTING, READY_TIMEOUT_S, "on")
                os.kill(engine_of(on.server.pid), signal.SIGKILL)
            on.faults.end()
            on.hear(killed_s, KILLED)
            on.recover(killed_s)
        on.faults.end()
        return on.outcome(f"engine killed at {place}")


def killed_server(served: Served, place: str, slow_bytes_per_s: float) -> Outcome:
    """SIGKILL of the server as soon as it is at a place; then it is started again."""
    with scene(served) as on:
        with on.serving():
            on.faults.slow(slow_bytes_per_s)
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
            return on.outcome(f"server killed at {place}")


def slow_disk(
    served: Served,
    slow: Callable[[Faults], None],
    fast: Callable[[Faults], None],
    slow_s: float,
    groups: Sequence[Path] = (),
) -> Outcome:
    """A slow disk from the start on, until it has been loading for `slow_s`."""
    with scene(served, groups) as on, on.serving():
        slow(on.faults)
        on.observer.wait(lambda moment: moment.state == LOADING, READY_TIMEOUT_S, LOADING)
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
        return on.outcome("disk slowed 10x")


def missing_shard(served: Served, *, from_the_start: bool, away_s: float) -> Outcome:
    """A shard is away for a while: when the server is started, or once its port answers."""
    shard = max(served.path.glob("*.safetensors"))
    away = shard.with_suffix(".away")
    with scene(served) as on:
        try:
            if from_the_start:
                shard.rename(away)
            with on.serving():
                begun_s = time.monotonic()
                if not from_the_start:
                    on.faults.hold()  # before its first byte was read
                    on.observer.wait(
                        lambda moment: moment.state != UNREACHABLE, READY_TIMEOUT_S, "there"
                    )
                    shard.rename(away)
                    on.faults.end()
                _wait_or_ready(on, away_s)
                if not on.observer.now.is_ready:  # it may have opened the shard before
                    on.hear(begun_s, [shard.name])
                away.rename(shard)
                on.recover(time.monotonic())
                when = "before the start" if from_the_start else "during the load"
                return on.outcome(f"shard missing {when}")
        finally:
            if away.exists():
                away.rename(shard)


def cut_shard(served: Served, broken_s: float) -> Outcome:
    """A shard ends early when the server is started, as one that is still being copied."""
    shard = max(served.path.glob("*.safetensors"))
    whole, part = shard.with_suffix(".whole"), shard.with_suffix(".part")
    with shard.open("rb") as stream:
        part.write_bytes(stream.read(CUT_BYTES))
    with scene(served) as on:
        shard.rename(whole)
        part.rename(shard)
        try:
            with on.serving():
                begun_s = time.monotonic()
                _wait_or_ready(on, broken_s)
                on.hear(begun_s, [shard.name])
                whole.replace(shard)
                on.recover(time.monotonic())
                return on.outcome("shard cut short before the start")
        finally:
            if whole.exists():
                whole.replace(shard)


def read_error(served: Served, *, while_ready: bool, broken_s: float) -> Outcome:
    """Every read fails for a while: from the start on, or once the server is READY."""
    with scene(served) as on, on.serving():
        begun_s = time.monotonic()
        if while_ready:
            on.reach("READY", lambda moment: moment.is_ready)
            on.observer.wait_right(begun_s, READY_TIMEOUT_S)
        on.faults.fail()
        _wait(on, broken_s)
        if not while_ready:
            on.hear(begun_s, READ_ERROR)
        on.faults.end()
        on.recover(time.monotonic())
        when = "while READY" if while_ready else "from the start"
        return on.outcome(f"read errors {when}")


def shrunk_memory(served: Served, group: Path, whole_bytes: int, shrunk_s: float) -> Outcome:
    """The memory group shrinks during the load to what is in use, and grows again.

    Args:
        served: What is served.
        group: A memory group, not limited yet.
        whole_bytes: What it may hold at first and at last.
        shrunk_s: For how long.
    """
    limit_memory(group, whole_bytes)
    with scene(served, [group]) as on, on.serving():
        on.faults.slow(whole_bytes / shrunk_s)
        on.observer.wait(lambda moment: moment.state == LOADING, READY_TIMEOUT_S, LOADING)
        since_s = time.monotonic()
        _shrink(group)
        _wait(on, shrunk_s)
        on.hear(since_s, MEMORY)
        on.faults.end()
        limit_memory(group, whole_bytes)
        on.recover(time.monotonic())
        return on.outcome("memory group shrunk during the load")


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
