"""moe_server.v1.ScoringService: prompts that are read instead of continued.

Every continuation is a request of its own to the engine, which computes once what they share. A few
of them are there at a time, so that one call does not take all places of the server.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from moe_server.errors import MoeServerError
from moe_server.messages import Submit, TokenEvent
from moe_server.open_requests import OpenRequest
from moe_server.proto.moe_server.v1 import generation_pb2 as pb
from moe_server.service.deadline import deadline_of
from moe_server.service.labels import LabelScore, probabilities
from moe_server.service.prompts import AnyPromptRequest
from moe_server.service.registration import Context
from moe_server.service.registry import Registry
from moe_server.service.request_metrics import FollowedRequest, RequestMetrics
from moe_server.service.running_model import RunningModel
from moe_server.service.scoring_validation import check_continuations, check_labels, check_lengths
from moe_server.service.validation import check_priority

SERVICE = pb.DESCRIPTOR.services_by_name["ScoringService"]

MAX_AT_ONCE = 8
"""Continuations of one call that are in the engine side by side."""

REMEDY = "Allow more time, or send less at a time."


class ScoringService:
    """The servicer."""

    def __init__(self, registry: Registry, metrics: RequestMetrics) -> None:
        self._registry = registry
        self._metrics = metrics

    async def Score(  # noqa: N802  # named by the protocol
        self, request: pb.ScoreRequest, context: Context
    ) -> pb.ScoreResponse:
        """Continuations of one prompt."""
        running = self._registry.find(request.model)
        async with self._call(running, request.priority, context) as (call, deadline):
            with running.supervisor.admit() as place:
                continuations = check_continuations(request.continuations, running.model)
                scored = await call.score(
                    place, request, continuations, deadline, field="continuations"
                )
        scores = [_continuation_score(one) for one in scored]
        return pb.ScoreResponse(model=running.name, scores=scores, usage=call.usage)

    async def Classify(  # noqa: N802  # named by the protocol
        self, request: pb.ClassifyRequest, context: Context
    ) -> pb.ClassifyResponse:
        """Labels after one prompt."""
        running = self._registry.find(request.model)
        content_free = []
        async with self._call(running, request.priority, context) as (call, deadline):
            with running.supervisor.admit() as place:
                labels = check_labels(request)
                scored = await call.score(place, request, labels, deadline, field="labels")
            for index, prompt in enumerate(request.content_free_prompts):
                try:
                    with running.supervisor.admit() as place:
                        others = await call.score(place, prompt, labels, deadline, field="labels")
                except MoeServerError as error:
                    error.field = f"content_free_prompts[{index}].{error.field}"
                    raise
                content_free.append([one.label_score for one in others])
        chances = probabilities(
            [one.label_score for one in scored],
            content_free,
            normalizes_length=request.normalizes_length,
        )
        return pb.ClassifyResponse(
            model=running.name,
            label=labels[chances.index(max(chances))],
            labels=[
                pb.LabelProbability(
                    label=label,
                    probability=chance,
                    logprob=one.logprob,
                    num_tokens=len(one.token_ids),
                )
                for label, chance, one in zip(labels, chances, scored, strict=True)
            ],
            usage=call.usage,
        )

    async def Embed(  # noqa: N802  # named by the protocol
        self, request: pb.EmbedRequest, context: Context
    ) -> pb.EmbedResponse:
        """One prompt's mean hidden state."""
        running = self._registry.find(request.model)
        async with self._call(running, request.priority, context) as (call, deadline):
            with running.supervisor.admit() as place:
                embedding = await call.embed(place, request, deadline)
        return pb.EmbedResponse(model=running.name, embedding=embedding, usage=call.usage)

    @asynccontextmanager
    async def _call(
        self, running: RunningModel, priority: int, context: Context
    ) -> "AsyncIterator[tuple[_Call, float | None]]":
        """A call that is counted and kept within its deadline, which comes with it."""
        with self._metrics.follow(running.name) as followed:
            call = _Call(running, priority, followed)
            async with deadline_of(context, lambda: call.stage, REMEDY) as deadline:
                yield call, deadline


@dataclass(frozen=True, slots=True)
class _Scored:
    """What the model says to one continuation."""

    token_ids: list[int]
    event: TokenEvent

    @property
    def logprob(self) -> float:
        return sum(score.logprob for score in self.event.target_scores)

    @property
    def label_score(self) -> LabelScore:
        return LabelScore(self.logprob, len(self.token_ids))


class _Call:
    """One call on its way; `stage` says how far it has come, for people."""

    def __init__(self, running: RunningModel, priority: int, followed: FollowedRequest) -> None:
        self._running = running
        self._followed = followed
        self._model = running.model
        self._priority = check_priority(priority)
        self._num_read = 0
        self.stage = "its prompt was tokenised"
        self.usage = pb.Usage()

    async def score(
        self,
        place: OpenRequest,
        prompt: AnyPromptRequest,
        continuations: Sequence[str | list[int]],
        deadline: float | None,
        *,
        field: str,
    ) -> list[_Scored]:
        """The continuations' scores, in order; the first one uses `place`."""
        alone, wholes = await self._running.prompts.encode_continued(prompt, continuations, field)
        start = check_lengths(alone, wholes, self._model, field)
        self.usage.prompt_tokens += len(alone)
        at_once = asyncio.Semaphore(MAX_AT_ONCE - 1)

        async def read(whole: list[int], own_place: OpenRequest | None = None) -> _Scored:
            if own_place is None:
                async with at_once:
                    with self._running.supervisor.admit() as later_place:
                        return await read(whole, later_place)
            targets = whole[start:]
            # Nothing is generated; the token that every request ends with is nobody's.
            submit = Submit(
                own_place.request_id,
                whole[:-1],
                1,
                [],
                targets=targets,
                deadline=deadline,
                priority=self._priority,
                is_patient=own_place is not place,
            )
            event = await self._last_event(own_place, submit)
            self.usage.completion_tokens += len(targets)
            return _Scored(targets, event)

        try:
            async with asyncio.TaskGroup() as group:
                first = group.create_task(read(wholes[0], place))
                others = [group.create_task(read(whole)) for whole in wholes[1:]]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in (first, *others)]

    async def embed(
        self, place: OpenRequest, prompt: AnyPromptRequest, deadline: float | None
    ) -> list[float]:
        """The pooled hidden states of the prompt's tokens."""
        token_ids = await self._running.prompts.encode(prompt)
        if len(token_ids) >= self._model.max_request_tokens:
            raise MoeServerError(
                f"The prompt has {len(token_ids)} tokens; at most "
                f"{self._model.max_request_tokens - 1} fit this server.",
                field="prompt",
            )
        self.usage.prompt_tokens += len(token_ids)
        submit = Submit(
            place.request_id,
            token_ids,
            1,
            [],
            pools=True,
            deadline=deadline,
            priority=self._priority,
        )
        return (await self._last_event(place, submit)).embedding

    async def _last_event(self, place: OpenRequest, submit: Submit) -> TokenEvent:
        self._running.supervisor.submit(place, submit)
        self._followed.accept()
        self.stage = f"{self._num_read} of its prompts were computed"
        async for events in place:
            if events[-1].finish is not None:
                self._num_read += 1
                self.usage.cached_tokens += events[-1].cached_tokens
                self.stage = f"{self._num_read} of its prompts were computed"
                return events[-1]
        raise AssertionError("the iteration raises where there is no last event")


def _continuation_score(scored: _Scored) -> pb.ContinuationScore:
    scores = scored.event.target_scores
    return pb.ContinuationScore(
        logprob=scored.logprob,
        num_tokens=len(scored.token_ids),
        is_greedy=all(score.is_greedy for score in scores),
        tokens=[
            pb.TokenScore(token_id=token_id, logprob=score.logprob, is_greedy=score.is_greedy)
            for token_id, score in zip(scored.token_ids, scores, strict=True)
        ],
    )
