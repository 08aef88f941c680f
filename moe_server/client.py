"""A small blocking client; the commands use it, and it is an example of how to write one.

    with Client("127.0.0.1:50051") as client:
        for event in client.generate_stream("Once upon a time"):
            print(event.delta.text, end="", flush=True)

Turns failed RPCs into MoeServerErrors whose remedy comes from the status details.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeAlias

import grpc
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status

from moe_server.address import check_address
from moe_server.errors import MoeServerError, Reason
from moe_server.proto.moe_server.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)

Messages: TypeAlias = Sequence[Mapping[str, str]]
"""A conversation: {"role": "user", "content": "Hello"} and so on."""

STATUS_DETAILS_KEY = "grpc-status-details-bin"
MAX_RECEIVE_BYTES = 64 * 2**20

REASONS = {
    "NOT_FOUND": Reason.NOT_FOUND,
    "FAILED_PRECONDITION": Reason.UNSUPPORTED,
    "RESOURCE_EXHAUSTED": Reason.EXHAUSTED,
    "UNAVAILABLE": Reason.UNAVAILABLE,
    "DEADLINE_EXCEEDED": Reason.EXPIRED,
}
RETRYABLE = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


class UnreachableError(MoeServerError):
    """Nobody answers at the target, or not a moe-server."""


class RetryableError(MoeServerError):
    """The server cannot do it now: it is not ready, is full, or the deadline passed."""


class Client:
    """A connection to one server; made lazily, re-made when lost.

    Args:
        target: HOST:PORT, [IPV6]:PORT or unix:PATH.
        timeout_s: For every call but generation.

    Raises:
        MoeServerError: The target is none of these.
    """

    def __init__(self, target: str = "127.0.0.1:50051", timeout_s: float = 10.0) -> None:
        try:
            self.target = check_address(target, min_port=1)
        except ValueError as error:
            raise MoeServerError(
                f"target {target!r} is not usable: {error}.",
                "Give the address that `moe-server serve` listens at.",
                field="target",
            ) from None
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(
            target, options=[("grpc.max_receive_message_length", MAX_RECEIVE_BYTES)]
        )
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._scoring = generation_pb2_grpc.ScoringServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._tokenizer = generation_pb2_grpc.TokenizerServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._admin = admin_pb2_grpc.AdminServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._channel.close()

    def generate_stream(
        self,
        prompt: str | Sequence[int] | Messages,
        *,
        model: str = "",
        sampling: generation_pb2.Sampling | None = None,
        stopping: generation_pb2.Stopping | None = None,
        output: generation_pb2.Output | None = None,
        json_schema: str | Mapping[str, Any] | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choices: Sequence[str] | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Iterator[generation_pb2.GenerateStreamResponse]:
        """Yields `started`, `delta`s, `finished`. Leaving the iteration early cancels the request.

        With several samples, deltas and finishes carry the sample's index.

        Args:
            prompt: Text, token ids or messages.
            model: Which one; absent: the server's first.
            sampling: Absent: greedy.
            stopping: Absent: the server's default length.
            output: What to return beside tokens.
            json_schema: The text is to be a JSON document of this schema, given as JSON or decoded.
            regex: The text is to match this regular expression.
            grammar: The text is to be of this grammar, in Lark's syntax.
            choices: The text is to be one of these. At most one of the four may be given.
            priority: -10 to 10; higher goes first.
            timeout_s: The deadline; absent: none.

        Raises:
            MoeServerError: The server refused or failed; UnreachableError where there is none.
        """
        request = generation_pb2.GenerateStreamRequest(
            model=model, sampling=sampling, stopping=stopping, output=output, priority=priority
        )
        if sum(given is not None for given in (json_schema, regex, grammar, choices)) > 1:
            raise MoeServerError("At most one of json_schema, regex, grammar and choices.")
        if json_schema is not None:
            given = json_schema
            request.json_schema = given if isinstance(given, str) else json.dumps(given)
        elif regex is not None:
            request.regex = regex
        elif grammar is not None:
            request.grammar = grammar
        elif choices is not None:
            request.choices.values.extend(choices)
            request.choices.SetInParent()
        _set_prompt(request, prompt)
        with self._readable_errors():
            call = self._generation.GenerateStream(request, timeout=timeout_s)
            try:
                yield from call
            finally:
                call.cancel()

    def score(
        self,
        prompt: str | Sequence[int] | Messages,
        continuations: Sequence[str | Sequence[int]],
        *,
        model: str = "",
        timeout_s: float | None = None,
    ) -> generation_pb2.ScoreResponse:
        """The log-likelihood of each continuation after the prompt.

        Args:
            prompt: Text, token ids or messages.
            continuations: Texts, each as it is written, or token ids.
            model: Which one; absent: the server's first.
            timeout_s: The deadline; absent: none.

        Raises:
            MoeServerError: As `generate_stream`.
        """
        request = generation_pb2.ScoreRequest(model=model)
        _set_prompt(request, prompt)
        for continuation in continuations:
            added = request.continuations.add()
            if isinstance(continuation, str):
                added.text = continuation
            else:
                added.token_ids.ids.extend(continuation)
        with self._readable_errors():
            response: generation_pb2.ScoreResponse = self._scoring.Score(request, timeout=timeout_s)
            return response

    def classify(
        self,
        prompt: str | Messages,
        labels: Sequence[str],
        *,
        model: str = "",
        normalizes_length: bool = False,
        content_free_prompts: Sequence[str | Messages] = (),
        timeout_s: float | None = None,
    ) -> generation_pb2.ClassifyResponse:
        """The probability of each label after the prompt.

        Args:
            prompt: Text or messages.
            labels: Each as it is written: most begin with a space.
            model: Which one; absent: the server's first.
            normalizes_length: Compares log-likelihoods per token.
            content_free_prompts: The prompt with an input that says nothing, to calibrate with.
            timeout_s: The deadline; absent: none.

        Raises:
            MoeServerError: As `generate_stream`.
        """
        request = generation_pb2.ClassifyRequest(
            model=model, labels=labels, normalizes_length=normalizes_length
        )
        _set_prompt(request, prompt)
        for content_free in content_free_prompts:
            _set_prompt(request.content_free_prompts.add(), content_free)
        with self._readable_errors():
            response: generation_pb2.ClassifyResponse = self._scoring.Classify(
                request, timeout=timeout_s
            )
            return response

    def embed(
        self,
        prompt: str | Sequence[int] | Messages,
        *,
        model: str = "",
        timeout_s: float | None = None,
    ) -> list[float]:
        """The mean of the prompt's last hidden states, of length 1.

        Raises:
            MoeServerError: As `generate_stream`.
        """
        request = generation_pb2.EmbedRequest(model=model)
        _set_prompt(request, prompt)
        with self._readable_errors():
            response: generation_pb2.EmbedResponse = self._scoring.Embed(request, timeout=timeout_s)
            return list(response.embedding)

    def tokenize(self, prompt: str | Messages, *, model: str = "") -> list[int]:
        """The token ids that generation makes of a text or of messages."""
        request = generation_pb2.TokenizeRequest(model=model)
        _set_prompt(request, prompt)
        with self._readable_errors():
            response: generation_pb2.TokenizeResponse = self._tokenizer.Tokenize(
                request, timeout=self._timeout_s
            )
            return list(response.token_ids)

    def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """The text of token ids, without special tokens."""
        request = generation_pb2.DetokenizeRequest(model=model, token_ids=token_ids)
        with self._readable_errors():
            response: generation_pb2.DetokenizeResponse = self._tokenizer.Detokenize(
                request, timeout=self._timeout_s
            )
            return response.text

    def status(self) -> admin_pb2.GetServerStatusResponse:
        """State, memory and counters."""
        with self._readable_errors():
            response: admin_pb2.GetServerStatusResponse = self._admin.GetServerStatus(
                admin_pb2.GetServerStatusRequest(), timeout=self._timeout_s
            )
            return response

    def models(self) -> list[model_pb2.Model]:
        """Every model of the server, in the order of its configuration."""
        with self._readable_errors():
            response: model_pb2.ListModelsResponse = self._models.ListModels(
                model_pb2.ListModelsRequest(), timeout=self._timeout_s
            )
            return list(response.models)

    def drain(self, wait_s: float = 0.0) -> int:
        """Makes the server refuse new requests; returns how many still run after `wait_s`."""
        request = admin_pb2.DrainRequest()
        request.wait.FromNanoseconds(round(wait_s * 1e9))
        with self._readable_errors():
            response: admin_pb2.DrainResponse = self._admin.Drain(
                request, timeout=self._timeout_s + wait_s
            )
            return response.remaining_requests

    def undrain(self) -> None:
        """Makes the server accept requests again."""
        with self._readable_errors():
            self._admin.Undrain(admin_pb2.UndrainRequest(), timeout=self._timeout_s)

    def run_warmup(self, model: str = "") -> Iterator[admin_pb2.RunWarmupResponse]:
        """Rewarms a READY model; yields how far that is.

        Args:
            model: Which one; empty: the server's first.

        Raises:
            MoeServerError: The server refused, or the engine was lost.
        """
        request = admin_pb2.RunWarmupRequest(model=model)
        with self._readable_errors():
            call = self._admin.RunWarmup(request)
            try:
                yield from call
            finally:
                call.cancel()

    def record_requests(self, model: str, count: int, timeout_s: float) -> Iterator[str]:
        """Yields real requests as the server accepts them: lines for the file of warmup.requests.

        Args:
            model: Those to which; empty: the server's first.
            count: It ends after so many,
            timeout_s: or when this time is over.

        Raises:
            MoeServerError: The server refused; its configuration may not let them be recorded.
        """
        request = admin_pb2.RecordRequestsRequest(model=model, count=count)
        with self._readable_errors():
            try:
                for response in self._admin.RecordRequests(request, timeout=timeout_s):
                    yield response.line
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise _readable(error, self.target) from None


def _set_prompt(request: Any, prompt: str | Sequence[int] | Messages) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], Mapping):
        request.messages.messages.extend(
            generation_pb2.ChatMessage(**message)  # type: ignore[arg-type]
            for message in prompt
        )
    else:
        request.token_ids.ids.extend(prompt)


def _readable(error: grpc.RpcError, target: str) -> MoeServerError:
    code: str = error.code().name
    message: str = error.details() or code
    trailing: dict[str, Any] = dict(error.trailing_metadata() or ())  # type: ignore[arg-type]
    # Our server's errors carry details. Without them the transport speaks, or someone else.
    if STATUS_DETAILS_KEY not in trailing:
        if code in ("UNAVAILABLE", "UNIMPLEMENTED", "DEADLINE_EXCEEDED"):
            return UnreachableError(
                f"No moe-server answers at {target}: {message}.",
                "Check --target, and that `moe-server serve` runs there.",
                reason=Reason.UNAVAILABLE,
            )
        # A request above max_message_bytes is refused by gRPC itself, and always will be.
        remedy = (
            "Send less at once, or raise service.max_message_bytes of the server."
            if "larger than max" in message
            else ""
        )
        return MoeServerError(
            f"{code}: {message}", remedy, reason=REASONS.get(code, Reason.INVALID)
        )
    remedies: list[str] = []
    field = ""
    for detail in Status.FromString(trailing[STATUS_DETAILS_KEY]).details:
        retry, bad_request = RetryInfo(), BadRequest()
        if detail.Unpack(retry):
            remedies.append(f"Retry after {retry.retry_delay.ToTimedelta().total_seconds():g} s.")
        elif detail.Unpack(bad_request):
            fields = [violation.field for violation in bad_request.field_violations]
            field = ", ".join(name for name in fields if name)
    if field:
        remedies.append(f"Field: {field}.")
    kind = RetryableError if code in RETRYABLE else MoeServerError
    return kind(
        f"{code}: {message}",
        " ".join(remedies),
        reason=REASONS.get(code, Reason.INVALID),
        field=field,
    )
