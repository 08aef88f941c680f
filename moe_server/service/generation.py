"""moe_server.v1.GenerationService: one request from its bytes to its last delta.

Find the model -> admit -> validate -> tokenise -> submit -> detokenise -> write. `Generate` walks
the same path as `GenerateStream` and gathers. However a request ends - finished, cancelled,
disconnected, past its deadline, or by an error - leaving `admit` makes the engine forget it.
"""

import asyncio
import hmac
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TypeAlias

from google.protobuf.duration_pb2 import Duration

from moe_server.messages import FinishReason, Timings, TokenEvent
from moe_server.open_requests import OpenRequest
from moe_server.proto.moe_server.v1 import generation_pb2 as pb
from moe_server.service import validation
from moe_server.service.deadline import deadline_of
from moe_server.service.recorder import Recorder
from moe_server.service.registration import Context
from moe_server.service.registry import Registry
from moe_server.service.request_metrics import FollowedRequest, RequestMetrics
from moe_server.service.running_model import RunningModel
from moe_server.service.text_stream import Released, TextStream

SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"]

PROBE_METADATA_KEY = "x-moe-server-probe"
"""Carries a secret of this process: the warm-up's requests come before READY."""

FINISH_REASONS = {
    FinishReason.END_OF_SEQUENCE: pb.FINISH_REASON_END_OF_SEQUENCE,
    FinishReason.STOP_SEQUENCE: pb.FINISH_REASON_STOP_SEQUENCE,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.STOP_TOKEN: pb.FINISH_REASON_STOP_TOKEN,
}

Write: TypeAlias = Callable[[pb.GenerateStreamResponse], Awaitable[None]]


class GenerationService:
    """The servicer. `probe_secret` is what the warm-up presents, whose requests count nowhere."""

    def __init__(self, registry: Registry, probe_secret: str, metrics: RequestMetrics) -> None:
        self._registry = registry
        self._metrics = metrics
        self._uncounted = RequestMetrics(None)
        self._probe_secret = probe_secret

    async def GenerateStream(  # noqa: N802  # named by the protocol
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> None:
        """Streams a completion."""
        await self._run(request, context, context.write)

    async def Generate(  # noqa: N802  # named by the protocol
        self, request: pb.GenerateRequest, context: Context
    ) -> pb.GenerateResponse:
        """Gathers a completion."""
        response = pb.GenerateResponse()
        samples: defaultdict[int, pb.Sample] = defaultdict(pb.Sample)
        texts: defaultdict[int, list[str]] = defaultdict(list)

        async def gather(message: pb.GenerateStreamResponse) -> None:
            if message.HasField("started"):
                response.request_id = message.started.request_id
                response.model = message.started.model
                response.seed = message.started.seed
            elif message.HasField("delta"):
                delta = message.delta
                sample = samples[delta.index]
                texts[delta.index].append(delta.text)
                sample.token_ids.extend(delta.token_ids)
                sample.logprobs.extend(delta.logprobs)
            else:
                samples[message.finished.index].finished.CopyFrom(message.finished)

        await self._run(request, context, gather)
        for index, sample in samples.items():
            sample.text = "".join(texts[index])
        first, *others = (samples[index] for index in sorted(samples))
        response.text = first.text
        response.token_ids.extend(first.token_ids)
        response.logprobs.extend(first.logprobs)
        response.finished.CopyFrom(first.finished)
        response.further_samples.extend(others)
        return response

    async def _run(
        self, request: validation.AnyGenerateRequest, context: Context, write: Write
    ) -> None:
        running = self._registry.find(request.model)
        is_probe = self._is_probe(context)

        def admit() -> AbstractContextManager[OpenRequest]:
            return running.supervisor.admit(is_probe=is_probe)

        remedy = "Allow more time or ask for fewer tokens."
        metrics = self._uncounted if is_probe else self._metrics
        with metrics.follow(running.name) as followed, ExitStack() as places:
            recorder = None if is_probe else running.recorder
            completion = _Completion(running, write, admit, followed, recorder)
            async with deadline_of(context, lambda: completion.stage, remedy) as deadline:
                await completion.run(request, places, deadline)

    def _is_probe(self, context: Context) -> bool:
        for key, value in context.invocation_metadata() or ():
            if key == PROBE_METADATA_KEY and isinstance(value, str):
                return hmac.compare_digest(value, self._probe_secret)
        return False


@dataclass(frozen=True, slots=True)
class _Place:
    """An admitted sample; once left, the engine forgets it."""

    request: OpenRequest
    leave: Callable[[], None]


class _Completion:
    """One request on its way; `stage` says how far it has come, for people."""

    def __init__(
        self,
        running: RunningModel,
        write: Write,
        admit: Callable[[], AbstractContextManager[OpenRequest]],
        followed: FollowedRequest,
        recorder: Recorder | None,
    ) -> None:
        self._running = running
        self._model = running.model
        self._write = write
        self._admit = admit
        self._followed = followed
        self._recorder = recorder
        self._writing = asyncio.Lock()
        self._num_tokens = 0
        self.stage = "its prompt was tokenised"

    async def run(
        self, request: validation.AnyGenerateRequest, places: ExitStack, deadline: float | None
    ) -> None:
        """Answers the request; whatever is in `places` when it ends is forgotten by the engine."""
        model = self._model
        first = self._take_place(places)
        options = validation.check_options(request, model)
        prompt = await self._running.prompts.encode(request)
        trials = self._running.trials
        if options.constraint is not None and trials is not None:
            self.stage = "its constraint was compiled"
            await trials.check(options.constraint)
        samples = [first, *(self._take_place(places) for _ in range(1, options.num_samples))]
        submits = [
            validation.build_submit(
                sample.request.request_id,
                prompt,
                options,
                model,
                deadline,
                index,
                is_patient=self._recorder is None,
            )
            for index, sample in enumerate(samples)
        ]
        for sample, submit in zip(samples, submits, strict=True):
            self._running.supervisor.submit(sample.request, submit)
        self._followed.accept()
        if self._recorder is not None:
            self._recorder.offer(request, len(prompt))
        self.stage = "it waited for its first token"
        started = pb.Started(
            request_id=f"{self._running.id_prefix}-{first.request.request_id}",
            model=model.name,
            prompt_tokens=len(prompt),
            seed=options.sampling.seed,
        )
        await self._write(pb.GenerateStreamResponse(started=started))
        relays = [
            self._relay(index, sample, len(prompt), options.stop_sequences)
            for index, sample in enumerate(samples)
        ]
        if len(relays) == 1:
            await relays[0]
            return
        try:
            async with asyncio.TaskGroup() as group:
                for relay in relays:
                    group.create_task(relay)
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    def _take_place(self, places: ExitStack) -> _Place:
        """A place that is left with all others at the latest."""
        stack = places.enter_context(ExitStack())
        return _Place(stack.enter_context(self._admit()), stack.close)

    async def _relay(
        self, index: int, place: _Place, prompt_tokens: int, stop_sequences: Sequence[str]
    ) -> None:
        """Writes the deltas of one sample, and its end."""
        detokenizer = self._model.tokenizer.detokenizer() if self._model.tokenizer else None
        stream = TextStream(detokenizer, stop_sequences)
        async for events in place.request:
            finish, before = events[-1].finish, stream.num_tokens
            released = stream.push(events, is_last=finish is not None)
            self._num_tokens += stream.num_tokens - before
            self._followed.take_tokens(stream.num_tokens - before, index)
            self.stage = f"it generated, {self._num_tokens} tokens so far"
            if released:
                delta = _delta(released, index)
                async with self._writing:
                    await self._write(pb.GenerateStreamResponse(delta=delta))
            if stream.is_stopped:
                finish = FinishReason.STOP_SEQUENCE
            if finish is not None:
                # Other samples may go on: the engine is not to work for this one meanwhile.
                place.leave()
                usage = pb.Usage(
                    prompt_tokens=prompt_tokens,
                    completion_tokens=stream.num_tokens,
                    cached_tokens=events[-1].cached_tokens,
                )
                finished = pb.Finished(
                    reason=FINISH_REASONS[finish],
                    usage=usage,
                    timings=_timings(events[-1].timings),
                    index=index,
                )
                async with self._writing:
                    await self._write(pb.GenerateStreamResponse(finished=finished))
                return


def _delta(released: Released, index: int) -> pb.Delta:
    return pb.Delta(
        index=index,
        text=released.text,
        token_ids=[event.token_id for event in released.tokens],
        logprobs=_logprobs(released.tokens),
    )


def _logprobs(events: Sequence[TokenEvent]) -> list[pb.Logprob]:
    return [
        pb.Logprob(
            token_id=event.token_id,
            logprob=event.logprob,
            top=[pb.TokenLogprob(token_id=i, logprob=logprob) for i, logprob in event.top_logprobs],
        )
        for event in events
        if event.logprob is not None
    ]


def _timings(timings: Timings) -> pb.Timings:
    return pb.Timings(
        queue=to_duration(timings.queue_s),
        prefill=to_duration(timings.prefill_s),
        decode=to_duration(timings.decode_s),
        router=to_duration(timings.router_s),
        expert_transfer=to_duration(timings.transfer_s),
        expert_read=to_duration(timings.read_s),
        expert_transfer_bytes=timings.transfer_bytes,
        expert_read_bytes=timings.read_bytes,
    )


def to_duration(seconds: float) -> Duration:
    """A protocol duration, to the nanosecond."""
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
