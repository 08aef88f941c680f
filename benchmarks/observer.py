"""Whoever looks at a server from outside all along: what it says of itself, and whether it is so.

One thread asks for the two healths and the status every few milliseconds and remembers what
changed; another sends a request whenever the server says that it is ready, and holds the answer to
the right one. Servers may come and go at the address meanwhile. Knows no processes.
"""

import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.engine_server import ServerFailedError
from moe_server.commands.startup import state_name
from moe_server.proto.moe_server.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
)
from moe_server.service.health import LIVENESS, READINESS

POLL_S = 0.01
LIVES_POLL_S = 0.2
CALL_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 120.0
WITNESS_PAUSE_S = 0.05
UNREACHABLE = "unreachable"
CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True)
class Question:
    """A request and, once an undisturbed server has answered it, its tokens."""

    prompt: tuple[int, ...]
    new_tokens: int
    answer: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Moment:
    """What a server said of itself from then on."""

    at_s: float
    """`time.monotonic()`."""
    state: str = UNREACHABLE
    """For example "loading"."""
    stage: str = ""
    stage_index: int = 0
    reason: str = ""
    is_ready: bool = False
    """By its health."""
    restarts: int = 0
    failures: tuple[str, ...] = ()
    """Why stages' last attempts failed."""
    bytes_done: int = 0
    bytes_per_s: float = 0.0

    @property
    def text(self) -> str:
        """All that it says of why it is not ready."""
        return " | ".join(filter(None, [self.stage, self.reason, *self.failures]))

    @property
    def place(self) -> str:
        """State and stage, whichever round or probe of them it is."""
        return re.sub(r"\d+", "#", f"{self.state}: {self.stage}".rstrip(": "))

    def same_as(self, other: "Moment") -> bool:
        """Whether nothing but time and bytes have passed."""
        passing = {"at_s": 0.0, "bytes_done": 0, "bytes_per_s": 0.0}
        return replace(self, **passing) == replace(other, **passing)


class Observer:
    """Looks on from `start` until `stop`; a context manager.

    Args:
        address: Of the server.
        question: What is asked whenever the server is ready; None: nothing is.
    """

    def __init__(self, address: str, question: Question | None = None) -> None:
        self.moments: list[Moment] = []
        """One for each change, in order."""
        self.now = Moment(0.0)
        """The last look."""
        self.answered_at_s: float | None = None
        """When the port first answered."""
        self.dead: list[str] = []
        """Answers to the liveness check that were not SERVING."""
        self.wrong: list[str] = []
        """Times when the server said that it is ready and was not."""
        self.right_answers: list[float] = []
        """When each came."""
        self._question = question
        self._address = address
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._look, daemon=True)]
        if question is not None:
            self._threads.append(threading.Thread(target=self._bear_witness, daemon=True))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def wait(
        self,
        condition: Callable[[Moment], bool],
        timeout_s: float,
        what: str,
        lives: Callable[[], bool] = lambda: True,
    ) -> Moment:
        """The first moment from now on, the present one included, of which `condition` holds.

        Args:
            condition: What is waited for.
            timeout_s: For how long.
            what: The condition, for people.
            lives: Whether it still can come.

        Raises:
            ServerFailedError: There was none in time; says what the server said last.
        """
        give_up_at = time.monotonic() + timeout_s
        with self._changed:
            index = max(0, len(self.moments) - 1)
            while True:
                for moment in self.moments[index:]:
                    if condition(moment):
                        return moment
                index = len(self.moments)
                left_s = give_up_at - time.monotonic()
                if left_s <= 0 or not lives():
                    last = self.moments[-1] if self.moments else Moment(0)
                    why = f"within {timeout_s:g} s" if left_s <= 0 else "before it ended"
                    raise ServerFailedError(f"not {what} {why}; it is {last.state}: {last.text}")
                self._changed.wait(min(left_s, LIVES_POLL_S))

    def wait_right(self, after_s: float, timeout_s: float) -> float:
        """When the first right answer after a time came.

        Raises:
            ServerFailedError: None came in time.
        """
        give_up_at = time.monotonic() + timeout_s
        with self._changed:
            while not (self.right_answers and self.right_answers[-1] > after_s):
                left_s = give_up_at - time.monotonic()
                if left_s <= 0:
                    last = self.moments[-1] if self.moments else Moment(0)
                    raise ServerFailedError(
                        f"no right answer within {timeout_s:g} s; it is {last.state}: {last.text}"
                    )
                self._changed.wait(left_s)
            return next(at_s for at_s in self.right_answers if at_s > after_s)

    def since(self, at_s: float) -> list[Moment]:
        """What held at that time, and every change after it."""
        with self._changed:
            before = [moment for moment in self.moments if moment.at_s <= at_s]
            return before[-1:] + [moment for moment in self.moments if moment.at_s > at_s]

    def _look(self) -> None:
        while not self._stopped.is_set():
            # A channel that found nobody waits for seconds before it looks again: a new one.
            with grpc.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                admin = admin_pb2_grpc.AdminServiceStub(channel)  # type: ignore[no-untyped-call]
                while self._note(self._ask(health, admin)) and not self._stopped.wait(POLL_S):
                    pass
            self._stopped.wait(POLL_S)

    def _note(self, moment: Moment) -> bool:
        """Remembers what is new; returns whether the server was there."""
        with self._changed:
            self.now = moment
            if not self.moments or not moment.same_as(self.moments[-1]):
                self.moments.append(moment)
                self._changed.notify_all()
        return moment.state != UNREACHABLE

    def _ask(
        self, health: health_pb2_grpc.HealthStub, admin: admin_pb2_grpc.AdminServiceStub
    ) -> Moment:
        try:
            life = _check(health, LIVENESS)
            now = time.monotonic()
            self.answered_at_s = self.answered_at_s or now
            if life != health_pb2.HealthCheckResponse.SERVING:
                self.dead.append(f"liveness was {life} at {now:.3f}")
            is_ready = _check(health, READINESS) == health_pb2.HealthCheckResponse.SERVING
            status = admin.GetServerStatus(
                admin_pb2.GetServerStatusRequest(), timeout=CALL_TIMEOUT_S
            )
        except grpc.RpcError as error:
            now = time.monotonic()
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and self.answered_at_s:
                self.dead.append(f"no answer for {CALL_TIMEOUT_S:g} s until {now:.3f}")
            return Moment(now)
        startup = status.startup
        return Moment(
            now,
            state_name(status.state),
            startup.stage,
            startup.stage_index,
            status.reason,
            is_ready,
            status.engine_restarts,
            tuple(stage.failure for stage in startup.stages if stage.failure),
            startup.bytes_done,
            startup.bytes_per_second,
        )

    def _bear_witness(self) -> None:
        assert self._question is not None
        while not self._stopped.wait(WITNESS_PAUSE_S):
            with self._changed:
                if not (self.moments and self.moments[-1].is_ready):
                    continue
            with grpc.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
                self._bear_witness_once(channel, self._question)

    def _bear_witness_once(self, channel: grpc.Channel, question: Question) -> None:
        health = health_pb2_grpc.HealthStub(channel)
        stub = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        if not _is_ready(health):
            return
        try:
            answer = ask(stub, question)
        except grpc.RpcError as error:
            # Ready may end while a request is on its way, but it has ended then.
            if _is_ready(health):
                told = f"{error.code().name}: {error.details()}"
                self.wrong.append(f"READY, and a request failed with {told}")
            return
        if question.answer not in (None, answer):
            self.wrong.append(f"READY, and the tokens were {answer}")
            return
        with self._changed:
            self.right_answers.append(time.monotonic())
            self._changed.notify_all()


def ask(stub: generation_pb2_grpc.GenerationServiceStub, question: Question) -> tuple[int, ...]:
    """The tokens of a greedy completion.

    Raises:
        grpc.RpcError: The request failed.
    """
    request = generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=question.prompt),
        stopping=generation_pb2.Stopping(max_new_tokens=question.new_tokens, ignore_eos=True),
    )
    return tuple(stub.Generate(request, timeout=ANSWER_TIMEOUT_S).token_ids)


def answer_of(address: str, question: Question) -> tuple[int, ...]:
    """What the server at an address says; for one that is READY and undisturbed."""
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        return ask(generation_pb2_grpc.GenerationServiceStub(channel), question)  # type: ignore[no-untyped-call]


def stages(moments: Sequence[Moment], until_s: float) -> dict[str, float]:
    """Seconds in each state and stage, in the order of their first appearance.

    Args:
        moments: Changes, in order.
        until_s: The end of the last one.
    """
    ends = [moment.at_s for moment in moments[1:]] + [until_s]
    seconds: dict[str, float] = {}
    for moment, end_s in zip(moments, ends, strict=True):
        if moment.at_s >= until_s:
            break
        name = f"{moment.state}: {moment.stage}".rstrip(": ")
        seconds[name] = seconds.get(name, 0.0) + min(end_s, until_s) - moment.at_s
    return seconds


def _check(health: health_pb2_grpc.HealthStub, service: str) -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return int(health.Check(request, timeout=CALL_TIMEOUT_S).status)


def _is_ready(health: health_pb2_grpc.HealthStub) -> bool:
    with suppress(grpc.RpcError):
        return _check(health, READINESS) == health_pb2.HealthCheckResponse.SERVING
    return False
