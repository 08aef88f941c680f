"""A day of requests through the real scheduler, on a clock of its own.

`moe_server.scheduler` decides what is in each step, `deadlines` who cannot make it and `day_costs`
what the step would take on the mission's hardware; nothing is computed. Requests end where their
services would have ended them. As in the front door, whoever finds no place is refused, and as in
the engine, who is past the deadline leaves.
"""

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from benchmarks.day_costs import Hardware
from benchmarks.day_requests import Request
from moe_server.backlog import Backlog
from moe_server.config import SchedulerConfig
from moe_server.deadlines import hopeless
from moe_server.messages import Submit
from moe_server.scheduler import Scheduled, Scheduler
from moe_server.sequence import Sequence
from moe_server.step_costs import StepCosts

BLOCK_TOKENS = 16
BIN_S = 900.0
"""Of what is told by the time of day."""
ENDS = ("done", "refused", "hopeless", "overdue", "expired")
"""No place; could not make its deadline; would have waited for too long; was late."""
TOKEN_ID = 5
"""Of all prompts: nothing reads them, and one list serves for all of a length."""


@dataclass(slots=True)
class Answer:
    """How one request fared."""

    arrived_s: float
    task: str
    first_s: float | None = None
    """When its first token came."""
    last_s: float | None = None
    new_tokens: int = 0
    end: str = ""
    """One of ENDS; empty while it is open."""

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """Of the tokens after the first."""
        if self.first_s is None or self.last_s is None or self.new_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.new_tokens - 1)


@dataclass
class Day:
    """What came of it."""

    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    busy_s: float = 0.0
    compute_s: float = 0.0
    """Of the busy ones, those in which the processor of the device would have worked."""
    copy_bound_s: float = 0.0
    """Of the busy ones, in steps that waited for copies of experts."""
    steps: int = 0
    tokens: int = 0
    """Run through the model."""
    useful_tokens: int = 0
    """As many as the requests that were done would have needed alone."""
    preemptions: int = 0
    busy_by_bin: dict[int, float] = field(default_factory=dict)


class Simulation:
    """One server.

    Args:
        hardware: What steps cost.
        settings: The scheduler's; its `max_batch_tokens` is the hardware's.
    """

    def __init__(self, hardware: Hardware, settings: SchedulerConfig) -> None:
        self._hardware = hardware
        self._max_open = settings.max_running + settings.max_waiting
        self._scheduler = Scheduler(
            max_batch_tokens=hardware.max_batch_tokens,
            max_running=settings.max_running,
            num_blocks=hardware.kv_tokens // BLOCK_TOKENS,
            block_tokens=BLOCK_TOKENS,
            reuse_prefixes=False,  # no two prompts are alike
            priority_s=settings.priority_s,
        )
        self._costs = StepCosts()
        self._backlog = Backlog(settings.max_wait_s)
        self._open: dict[int, tuple[Request, Answer]] = {}
        self._day = Day()
        self._now = 0.0

    def run(self, requests: Iterable[Request]) -> Day:
        """Runs all of them to their ends."""
        scheduler, coming = self._scheduler, iter(requests)
        following = next(coming, None)
        began = self._now = following.arrives_s if following else 0.0
        while following is not None or self._open:
            if not self._open and following is not None:
                self._now = max(self._now, following.arrives_s)
            while following is not None and following.arrives_s <= self._now:
                self._submit(following)
                following = next(coming, None)
            self._end_late()
            step = scheduler.schedule(self._now)
            self._end_overdue()
            if step:
                self._run_step(step)
        self._day.seconds = self._now - began
        self._day.preemptions = scheduler.counters.preemptions
        return self._day

    def _submit(self, request: Request) -> None:
        answer = Answer(request.arrives_s, request.task.name)
        number = len(self._day.answers)
        self._day.answers.append(answer)
        if len(self._open) >= self._max_open:
            answer.end = "refused"
            return
        submit = Submit(
            number,
            [TOKEN_ID] * request.prompt_tokens,
            request.task.max_new_tokens,
            eos_token_ids=[],
            deadline=request.arrives_s + request.task.deadline_s,
            priority=request.task.priority,
        )
        self._open[number] = (request, answer)
        self._scheduler.add(Sequence.of(submit, self._now))

    def _end_late(self) -> None:
        scheduler = self._scheduler
        for sequence in scheduler.expired(self._now):
            self._end(sequence, "expired")
        for verdict in list(hopeless(scheduler, self._costs, self._now)):
            self._end(verdict.sequence, "hopeless")

    def _end_overdue(self) -> None:
        self._backlog.observe(self._scheduler, self._now)
        for verdict in list(self._backlog.refused(self._scheduler, self._now)):
            self._end(verdict.sequence, "overdue")

    def _run_step(self, step: list[Scheduled]) -> None:
        day = self._day
        num_tokens = sum(part.num_tokens for part in step)
        context = sum(part.sequence.num_computed + part.num_tokens for part in step)
        cost = self._hardware.step(num_tokens, context)
        total_s = cost.total_s
        self._costs.observe(num_tokens, total_s)
        self._now += total_s
        day.steps += 1
        day.tokens += num_tokens
        day.busy_s += total_s
        day.compute_s += cost.compute_s
        day.copy_bound_s += total_s if cost.copy_s == total_s else 0.0
        of_bin = int(self._now // BIN_S)
        day.busy_by_bin[of_bin] = day.busy_by_bin.get(of_bin, 0.0) + total_s
        complete = [part.sequence for part in step if part.completes_input]
        self._scheduler.advance(step)
        for sequence in complete:
            sequence.token_ids.append(TOKEN_ID)
            request, answer = self._open[sequence.request.request_id]
            answer.first_s = answer.first_s or self._now
            answer.new_tokens += 1
            if answer.new_tokens == request.new_tokens:
                answer.last_s = self._now
                day.useful_tokens += len(sequence.token_ids) - 1
                self._end(sequence, "done")

    def _end(self, sequence: Sequence, how: str) -> None:
        request_id = sequence.request.request_id
        self._scheduler.remove(request_id)
        _, answer = self._open.pop(request_id)
        answer.end = how


def summary(day: Day) -> dict[str, float]:
    """Figures of a day or a part of one; times in seconds, of requests that were done."""
    done = [answer for answer in day.answers if answer.end == "done"]
    ttft = [answer.ttft_s for answer in done if answer.ttft_s is not None]
    tpot = [answer.tpot_s for answer in done if answer.tpot_s is not None]
    count = len(day.answers)
    by_task = Counter(answer.task for answer in day.answers)
    done_by_task = Counter(answer.task for answer in done)
    ends = {end: sum(answer.end == end for answer in day.answers) / count for end in ENDS}
    return {
        "requests": count,
        **ends,
        **{f"done, {task}": done_by_task[task] / by_task[task] for task in sorted(by_task)},
        "done_per_s": len(done) / day.seconds,
        "wasted_tokens": 1 - day.useful_tokens / day.tokens,
        **{f"ttft_p{p}_s": percentile(ttft, p) for p in (50, 99)},
        **{f"tpot_p{p}_s": percentile(tpot, p) for p in (50, 99)},
        "utilisation": day.busy_s / day.seconds,
        "compute_utilisation": day.compute_s / day.seconds,
        "copy_bound_share": day.copy_bound_s / day.busy_s,
        "preemptions": day.preemptions,
        "steps": day.steps,
    }


def percentile(values: list[float], percent: int) -> float:
    """Of any number of values; 0 of none."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
