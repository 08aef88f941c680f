"""A stage for chaos: a server, who looks at it from outside, and what became of it.

Knows how to start a server, to wait for its states and reasons, and to tell what was wrong; what
happens to it is in `chaos`.
"""

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.engine_server import ServerFailedError, running_server
from benchmarks.faults import Faults
from benchmarks.observer import Moment, Observer, Question

ENVIRON = {
    "MOE_SERVER_WARMUP__MAX_TTFT_MS": "60000",
    "MOE_SERVER_WARMUP__MAX_TPOT_MS": "60000",
    "MOE_SERVER_WARMUP__BATCH": "2",
}
"""Limits of a proof that a disk can keep which is slow so that stages are seen; and a stage that a
CPU does without."""
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
    timeout_s: float = 240.0
    """How long it may take until a server is READY, or names what keeps it."""
    question: Question = ASKED
    environ: Mapping[str, str] = field(default_factory=lambda: ENVIRON)


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
        self, name: str, served: Served, observer: Observer, faults: Faults, groups: Sequence[Path]
    ) -> None:
        self.name = name
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

    def wait(self, what: str, condition: Callable[[Moment], bool]) -> Moment:
        """The first moment from now on, the present one included, of which a condition holds.

        Raises:
            ServerFailedError: There was none in time.
        """
        return self.observer.wait(condition, self._served.timeout_s, what)

    def wait_right(self) -> float:
        """When the next right answer came.

        Raises:
            ServerFailedError: None came in time.
        """
        return self.observer.wait_right(time.monotonic(), self._served.timeout_s)

    def arrive(self, place: str) -> bool:
        """Waits until the server is at a place of `places`; a problem where it never is."""
        moment = self.wait(place, lambda moment: moment.is_ready or moment.place == place)
        if moment.place == place:
            return True
        self.problems.append("it was READY without having been there")
        return False

    def hear(self, since_s: float, words: Sequence[str]) -> None:
        """Waits until the server has named the cause, in one of these words."""

        def names_it(moment: Moment) -> bool:
            text = moment.text.lower()
            return moment.at_s >= since_s and any(word.lower() in text for word in words)

        give_up_at = time.monotonic() + self._served.timeout_s
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
            right_s = self.wait_right()
        except ServerFailedError as error:
            self.problems.append(f"it did not recover: {error}")
        else:
            self.recovered_s = right_s - gone_s

    def outcome(self) -> Outcome:
        """All that was seen."""
        wrong = tuple(dict.fromkeys([*self.observer.wrong, *self.observer.dead]))
        return Outcome(self.name, self.said, self.recovered_s, (*self.problems, *wrong))


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
def scene(name: str, served: Served, groups: Sequence[Path] = ()) -> Iterator[Scene]:
    """A stage that is set; nothing has been started.

    What a server did not do in time ends the scene and is a problem of it, no error.
    """
    (served.folder / "logs").mkdir(exist_ok=True)
    faults = Faults(served.folder / "faults.json", served.path)
    with Observer(address_in(served.folder), served.question) as observer:
        on = Scene(name, served, observer, faults, groups)
        try:
            yield on
        except ServerFailedError as error:
            on.problems.append(str(error))
        finally:
            faults.end()
