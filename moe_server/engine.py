"""The step loop's body: what happens to requests between two looks into the inbox.

schedule -> model -> sample -> postprocess. Knows messages, not where they come from or go to:
`engine_process` brings and takes them. No gRPC, no text.
"""

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

import torch

from moe_server.backlog import Backlog
from moe_server.budget import MemoryPlan, usable_cores
from moe_server.config import ModelConfig
from moe_server.constraints.compiler import Compiler
from moe_server.constraints.matcher import CrowdedError
from moe_server.deadlines import hopeless
from moe_server.errors import MoeServerError, Reason
from moe_server.hot_experts import HotExperts
from moe_server.kernels import native
from moe_server.messages import (
    Cancel,
    EngineLoad,
    ExpertCounters,
    FinishReason,
    FromEngine,
    HotSet,
    Offload,
    RequestFailed,
    Rewarm,
    StepDone,
    StopRewarm,
    Submit,
    TellHotSet,
    ToEngine,
    TokenEvent,
    Vocabulary,
)
from moe_server.model import Model
from moe_server.offload.counters import CacheCounters
from moe_server.offload.tiers import MoveCounters
from moe_server.readout import not_finite
from moe_server.sampler import Sampled, sample
from moe_server.scheduler import Scheduled, Scheduler
from moe_server.sequence import Sequence
from moe_server.step import StepInput
from moe_server.step_costs import StepCosts
from moe_server.weights import Weights

COMPILED_WITHIN_S = 0.01
"""How long a step without work waits for a constraint before the inbox is looked into again."""


class Engine:
    """The model and the requests that run on it. One thread only.

    Args:
        config: The model's.
        plan: How memory is divided.
        weights: What is being read from disk.
        poll: Called often while a step waits for the disk: takes in what has happened meanwhile.
    """

    def __init__(
        self,
        config: ModelConfig,
        plan: MemoryPlan,
        weights: Weights,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        torch.set_num_threads(config.threads or usable_cores())
        native.set_num_threads(config.threads or usable_cores())
        device = torch.device(config.device)
        block_tokens = config.scheduler.block_tokens
        self.weights = weights
        self.cache = weights.cache
        self.model = Model(
            weights,
            device=device,
            num_blocks=plan.num_blocks,
            block_tokens=block_tokens,
            # Where every expert has a place there is nothing to read ahead.
            prefetch=config.prefetch and plan.num_absent > 0,
            readout_rows=min(config.scheduler.max_running, config.scheduler.max_batch_tokens),
        )
        self._poll = poll
        self.scheduler = Scheduler(
            max_batch_tokens=config.scheduler.max_batch_tokens,
            max_running=config.scheduler.max_running,
            num_blocks=plan.num_blocks,
            block_tokens=block_tokens,
            reuse_prefixes=config.scheduler.reuse_prefixes,
            priority_s=config.scheduler.priority_s,
        )
        self.compiler = Compiler()
        self.hot_experts = HotExperts(weights, plan, config.warmup.hot_set_every_s)
        self._costs = StepCosts()
        self._backlog = Backlog(config.scheduler.max_wait_s)
        self._num_hopeless = self._num_overdue = 0
        self._failed: list[RequestFailed] = []

    def take(self, message: ToEngine) -> None:
        """Does what the supervisor asks for; Shutdown is not for the engine."""
        match message:
            case Submit():
                self.submit(message)
            case Cancel(request_id):
                self.cancel(request_id)
            case Vocabulary():
                self.compiler.use(message)
            case HotSet():
                self.hot_experts.begin(message)
            case TellHotSet():
                self.hot_experts.ask()
            case Rewarm():
                self.hot_experts.rewarm(message)
            case StopRewarm():
                self.hot_experts.stop(message)

    def submit(self, request: Submit) -> None:
        """Queues a request, once its constraint is compiled if it has one."""
        sequence = Sequence.of(request, time.monotonic())
        if request.constraint is None:
            self.scheduler.add(sequence)
        else:
            self.compiler.begin(sequence)

    def cancel(self, request_id: int) -> None:
        """Forgets a request; nothing is reported for it any more."""
        self.scheduler.remove(request_id)
        self.compiler.forget(request_id)
        # It may have failed in the step that reads the cancellation.
        self._failed = [failed for failed in self._failed if failed.request_id != request_id]

    @property
    def idle(self) -> bool:
        return not (self.scheduler.waiting or self.scheduler.running or self.compiler.waiting)

    def step(self) -> StepDone:
        """Runs one step and reports what it brought; an idle engine reports its load."""
        self._take_compiled()
        self._expire()
        self._refuse_hopeless()
        step = self.scheduler.schedule(time.monotonic())
        self._refuse_overdue()
        tokens: list[TokenEvent] = []
        if step:
            started, before = time.monotonic(), self._spent()
            inputs = [self._step_input(scheduled) for scheduled in step]
            logits = self.model.forward(inputs, self._take_in)
            completing = [scheduled.sequence for scheduled in step if scheduled.completes_input]
            logits, completing = _without_left(logits, completing)
            logits, completing = self._without_broken(logits, completing)
            sampled = sample(logits, completing)
            self._account(step, started, before)
            self.scheduler.advance(step)
            tokens = self._postprocess(completing, sampled)
        failed, self._failed = self._failed, []
        return StepDone(self._load(), tokens, failed)

    def between_steps(self) -> Many[FromEngine]:
        """Does what is to be done beside the steps; returns what is to be told."""
        return self.hot_experts.between_steps()

    def cancel_all(self) -> None:
        """Forgets all requests: a step that waits for the disk ends."""
        everyone = (*self.scheduler.waiting, *self.scheduler.running, *self.compiler.waiting)
        for sequence in everyone:
            self.cancel(sequence.request.request_id)

    def close(self) -> None:
        """Ends the reader's threads and the compiler's."""
        self.compiler.close()
        self.weights.close()

    def _take_compiled(self) -> None:
        """Queues requests whose constraint is ready."""
        has_work = self.scheduler.waiting or self.scheduler.running
        for sequence, error in self.compiler.take_ready(0.0 if has_work else COMPILED_WITHIN_S):
            if error is None:
                self.scheduler.add(sequence)
            else:
                self._fail([sequence], error)

    def _postprocess(self, sequences: Many[Sequence], sampled: Many[Sampled]) -> list[TokenEvent]:
        """Appends the new tokens; requests that are complete leave."""
        events = []
        for sequence, choice in zip(sequences, sampled, strict=True):
            request, readout = sequence.request, sequence.readout
            sequence.token_ids.append(choice.token_id)
            if readout is not None and readout.is_broken:
                self._fail([sequence], not_finite())
                continue
            try:
                finish = _finish(sequence)
            except CrowdedError:
                finish = None
                self._go_on_alone(sequence)
            except MoeServerError as error:
                self._fail([sequence], error)
                continue
            if finish is not None:
                self.scheduler.remove(request.request_id)
            events.append(
                TokenEvent(
                    request_id=request.request_id,
                    token_id=choice.token_id,
                    logprob=choice.logprob,
                    top_logprobs=list(choice.top_logprobs),
                    finish=finish,
                    cached_tokens=sequence.cached_tokens or 0,
                    target_scores=[] if readout is None else readout.scores,
                    embedding=[] if readout is None else readout.embedding,
                    # Always: a stop string may end the request at any token.
                    timings=sequence.timings,
                )
            )
        return events

    def _go_on_alone(self, sequence: Sequence) -> None:
        """Takes a request out of the schedule until it has a matcher that it shares with nobody."""
        self.scheduler.remove(sequence.request.request_id)
        sequence.num_computed = 0
        sequence.waiting_since = time.monotonic()
        self.compiler.begin_alone(sequence)

    def _account(self, step: Many[Scheduled], started: float, before: "_Spent") -> None:
        """Adds the step's time and bytes to each of its requests."""
        elapsed, after = time.monotonic() - started, self._spent()
        if all(scheduled.sequence.is_running for scheduled in step):  # else it was cut short
            self._costs.observe(sum(scheduled.num_tokens for scheduled in step), elapsed)
        for scheduled in step:
            sequence, timings = scheduled.sequence, scheduled.sequence.timings
            if sequence.num_completion_tokens == 0:
                timings.prefill_s += elapsed
            else:
                timings.decode_s += elapsed
            timings.router_s += after.router_s - before.router_s
            timings.transfer_s += after.moves.transfer_s - before.moves.transfer_s
            timings.read_s += after.cache.read_s - before.cache.read_s
            timings.transfer_bytes += after.moves.transfer_bytes - before.moves.transfer_bytes
            timings.read_bytes += after.cache.read_bytes - before.cache.read_bytes

    def _spent(self) -> "_Spent":
        cache, router_s = self.cache, self.model.experts.router_s
        return _Spent(router_s, replace(cache.counters), replace(cache.tiers.counters))

    def _without_broken(
        self, logits: torch.Tensor, sequences: list[Sequence]
    ) -> tuple[torch.Tensor, list[Sequence]]:
        """Ends requests whose logits are not finite: there is no token to choose from them."""
        # A sum is finite only if everything in it is, and takes 0.15 ms for 32 rows of 32,000 where
        # looking at each number takes 2.6. Finite numbers can have a sum that is not.
        if logits.sum(dim=-1).isfinite().all():
            return logits, sequences
        finite = logits.isfinite().all(dim=-1).tolist()
        if all(finite):
            return logits, sequences
        broken = [sequences[row] for row, is_finite in enumerate(finite) if not is_finite]
        self._fail(broken, not_finite())
        rows = [row for row, is_finite in enumerate(finite) if is_finite]
        return logits[rows], [sequences[row] for row in rows]

    def _take_in(self) -> None:
        """While a step waits for the disk: requests that leave now take their reads with them."""
        self._poll()
        self._expire()

    def _expire(self) -> None:
        """Ends requests whose deadline has passed."""
        for sequence in self.scheduler.expired(time.monotonic()):
            stage = (
                "waiting in the queue"
                if sequence in self.scheduler.waiting
                else "prefilling the prompt"
                if sequence.num_completion_tokens == 0
                else f"decoding after {sequence.num_completion_tokens} tokens"
            )
            error = MoeServerError(
                f"The deadline passed while {stage}.",
                "Give it more time, a shorter prompt or fewer new tokens.",
                reason=Reason.EXPIRED,
            )
            self._fail([sequence], error)

    def _refuse_hopeless(self) -> None:
        """Ends requests that cannot make their deadline, before anything is done for them."""
        for verdict in list(hopeless(self.scheduler, self._costs, time.monotonic())):
            self._num_hopeless += 1
            self._fail([verdict.sequence], verdict.error())

    def _refuse_overdue(self) -> None:
        """Ends requests that could not start and wait for too long, or would."""
        now = time.monotonic()
        self._backlog.observe(self.scheduler, now)
        for verdict in list(self._backlog.refused(self.scheduler, now)):
            self._num_overdue += 1
            self._fail([verdict.sequence], verdict.error())

    def _step_input(self, scheduled: Scheduled) -> StepInput:
        sequence = scheduled.sequence
        end = sequence.num_computed + scheduled.num_tokens
        return StepInput(
            token_ids=sequence.token_ids[sequence.num_computed : end],
            num_context=end,
            num_prompt=sequence.num_prompt_tokens,
            block_table=sequence.block_table,
            wants_logits=scheduled.completes_input,
            still_wanted=lambda: sequence.is_running,
            fail=lambda error: self._fail([sequence], error),
            readout=sequence.readout,
        )

    def _fail(self, sequences: Iterable[Sequence], error: MoeServerError) -> None:
        """Ends requests that cannot go on; the engine can."""
        for sequence in sequences:
            request_id = sequence.request.request_id
            self.scheduler.remove(request_id)
            self._failed.append(
                RequestFailed(
                    request_id,
                    error.reason,
                    error.message,
                    error.remedy,
                    error.field,
                    error.retry_s,
                )
            )

    def _load(self) -> EngineLoad:
        blocks, counters = self.scheduler.blocks, self.cache.counters
        scheduled = self.scheduler.counters
        return EngineLoad(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            blocks_used=blocks.num_blocks - blocks.num_free,
            blocks_total=blocks.num_blocks,
            blocks_kept=blocks.num_kept,
            preemptions=scheduled.preemptions,
            hopeless=self._num_hopeless,
            overdue=self._num_overdue,
            prompt_tokens=scheduled.prompt_tokens,
            cached_tokens=scheduled.cached_tokens,
            experts=ExpertCounters(
                device_hits=counters.device_hits,
                host_hits=counters.host_hits,
                disk_reads=counters.disk_reads,
                transfer_bytes=self.cache.tiers.counters.transfer_bytes,
                read_bytes=counters.read_bytes,
                prefetches=counters.prefetches,
                prefetch_hits=counters.prefetch_hits,
                cancelled_reads=counters.cancelled,
            ),
            offload=self._offload(),
        )

    def _offload(self) -> Offload:
        cost, reader = self.cache.tiers.cost, self.weights.reader
        return Offload(
            disk_bytes_per_second=cost.disk.bytes_per_s or 0.0,
            copy_bytes_per_second=cost.copy.bytes_per_s or 0.0,
            read_block_bytes=reader.block_bytes,
            read_depth=reader.depth,
            copied=cost.copied,
            computed_in_place=cost.computed_in_place,
            demoted=cost.demoted,
            forgotten=cost.forgotten,
            demotion_reuse=cost.reuse,
            read_retries=reader.counters.retries,
            checksum_mismatches=reader.counters.mismatches,
            read_failures=reader.counters.failures,
            buffered_files=reader.buffered_files,
            host_memory_pinned=self.cache.tiers.host.is_pinned,
        )


@dataclass(frozen=True, slots=True)
class _Spent:
    """What routing and experts have cost so far."""

    router_s: float
    cache: CacheCounters
    moves: MoveCounters


def _finish(sequence: Sequence) -> FinishReason | None:
    """Why a request ends with its newest token, if it does; moves its constraint on if not.

    Raises:
        CrowdedError: Its constraint takes too much together with those of others.
        MoeServerError: It takes too much, or no token can follow.
    """
    request, token_id, matcher = sequence.request, sequence.token_ids[-1], sequence.matcher
    if token_id in request.eos_token_ids and (matcher is None or matcher.may_end):
        return FinishReason.END_OF_SEQUENCE
    if token_id in request.stop_token_ids:
        return FinishReason.STOP_TOKEN
    is_last = sequence.num_completion_tokens == request.max_new_tokens
    if matcher is not None:
        try:
            matcher.accept(token_id, look=not is_last)
        except CrowdedError:
            if is_last:  # Nothing follows; whether something might have is not known.
                return FinishReason.LENGTH
            raise
        if matcher.is_complete:
            return FinishReason.END_OF_SEQUENCE
    return FinishReason.LENGTH if is_last else None


def _without_left(
    logits: torch.Tensor, sequences: list[Sequence]
) -> tuple[torch.Tensor, list[Sequence]]:
    """Leaves out requests that ended during the step: what was computed for them is rubbish."""
    rows = [row for row, sequence in enumerate(sequences) if sequence.is_running]
    if len(rows) == len(sequences):
        return logits, sequences
    return logits[rows], [sequences[row] for row in rows]
