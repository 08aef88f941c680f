"""Checks every field of a generation request but its prompt, and makes of it what the engine takes.

Knows the protocol's messages and the served model, but no connection: deadlines and request ids are
added by the caller. Every refusal names its field and says what was got and what is expected.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from moe_server.errors import MoeServerError, Reason
from moe_server.messages import Constraint, ConstraintKind, Sampling, Submit
from moe_server.proto.moe_server.v1 import generation_pb2
from moe_server.service.errors import shorten
from moe_server.service.served_model import ServedModel

AnyGenerateRequest: TypeAlias = (
    generation_pb2.GenerateRequest | generation_pb2.GenerateStreamRequest
)

MAX_STOP_SEQUENCES = 16
MAX_STOP_SEQUENCE_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_TOP_LOGPROBS = 20
MAX_SAMPLES = 16
MAX_CONSTRAINT_CHARS = 64 * 1024
MAX_CHOICES = 1000
MAX_COUNT_PENALTY = 2.0
"""As OpenAI and vLLM have it."""
MAX_PRIORITY = 10
"""And the lowest is its negative: a bound of what waiting can make up for."""
GREEDY_BELOW_TEMPERATURE = 1e-5
"""Dividing logits by less overflows float32; the limit of what it would mean is greedy."""
MAX_REPETITION_PENALTY = 1e6
"""Its inverse is the smallest: beyond, penalised logits overflow float32."""


@dataclass(frozen=True, slots=True)
class Options:
    """Everything of a request but its prompt, checked and resolved."""

    sampling: Sampling
    max_new_tokens: int
    stop_sequences: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    logprobs: int
    """As in messages.Submit."""
    num_samples: int
    constraint: Constraint | None
    """Checked for its size only: whether it compiles is found out elsewhere."""
    priority: int


def check_options(request: AnyGenerateRequest, model: ServedModel) -> Options:
    """Checks sampling, stopping, output, the constraint and priority.

    Raises:
        MoeServerError: INVALID; UNSUPPORTED for stop sequences or a constraint without a tokenizer.
    """
    sampling = _sampling(request.sampling, model)
    return Options(
        sampling=sampling,
        max_new_tokens=request.stopping.max_new_tokens or model.default_max_new_tokens,
        stop_sequences=_stop_sequences(request.stopping.stop_sequences, model),
        stop_token_ids=_stop_token_ids(request.stopping.stop_token_ids, model),
        ignore_eos=request.stopping.ignore_eos,
        logprobs=_logprobs(request.output, model),
        num_samples=_num_samples(request.sampling.num_samples, sampling),
        constraint=_constraint(request, model),
        priority=check_priority(request.priority),
    )


def build_submit(
    request_id: int,
    prompt: list[int],
    options: Options,
    model: ServedModel,
    deadline: float | None,
    sample_index: int = 0,
    *,
    is_patient: bool = False,
) -> Submit:
    """Fits a completion beside the prompt.

    Raises:
        MoeServerError: INVALID where the prompt leaves no room for a single new token.
    """
    room = model.max_request_tokens - len(prompt)
    if room < 1 or not prompt:
        raise MoeServerError(
            f"The prompt has {len(prompt)} tokens; at least 1 and at most "
            f"{model.max_request_tokens - 1} fit this server ({model.max_request_tokens} with the "
            "completion).",
            field="prompt",
        )
    max_new_tokens = min(options.max_new_tokens, room)
    eos_token_ids = [] if options.ignore_eos else list(model.eos_token_ids)
    may_end_early = bool(
        eos_token_ids or options.stop_sequences or options.stop_token_ids or options.constraint
    )
    return Submit(
        request_id=request_id,
        token_ids=prompt,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
        sampling=msgspec.structs.replace(options.sampling, sample_index=sample_index),
        logprobs=options.logprobs,
        stop_token_ids=list(options.stop_token_ids),
        constraint=options.constraint,
        deadline=deadline,
        priority=options.priority,
        fewest_new_tokens=1 if may_end_early else max_new_tokens,
        is_patient=is_patient or sample_index > 0,
    )


def _sampling(sampling: generation_pb2.Sampling, model: ServedModel) -> Sampling:
    def number(name: str, default: float, low: float, high: float, expected: str) -> float:
        if not sampling.HasField(name):
            return default
        value: float = getattr(sampling, name)
        if not low <= value <= high:  # Also refuses NaN.
            message = f"{name} is {value:g}; expected {expected}."
            raise MoeServerError(message, field=f"sampling.{name}")
        return value

    def count_penalty(name: str) -> float:
        limit = MAX_COUNT_PENALTY
        return number(name, 0.0, -limit, limit, f"a number from {-limit:g} to {limit:g}")

    # The smallest float above 0: the bound itself is excluded.
    above_zero = math.ulp(0.0)
    largest = 3.5e38
    temperature = number("temperature", 0.0, 0.0, largest, "a finite number of at least 0")
    return Sampling(
        temperature=temperature if temperature >= GREEDY_BELOW_TEMPERATURE else 0.0,
        top_k=min(sampling.top_k, model.vocab_size),
        top_p=number("top_p", 1.0, above_zero, 1.0, "a number above 0 and at most 1"),
        min_p=number("min_p", 0.0, 0.0, 1.0, "a number from 0 to 1"),
        seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(64),
        repetition_penalty=number(
            "repetition_penalty",
            1.0,
            # As a float, which the field is, 1e-6 is a little less.
            (1 - 2**-23) / MAX_REPETITION_PENALTY,
            MAX_REPETITION_PENALTY,
            f"a number above 0, from {1 / MAX_REPETITION_PENALTY:g} to {MAX_REPETITION_PENALTY:g}",
        ),
        presence_penalty=count_penalty("presence_penalty"),
        frequency_penalty=count_penalty("frequency_penalty"),
    )


def _num_samples(requested: int, sampling: Sampling) -> int:
    field = "sampling.num_samples"
    if requested > MAX_SAMPLES:
        raise MoeServerError(
            f"num_samples is {requested}; expected 1 to {MAX_SAMPLES}.", field=field
        )
    if requested > 1 and sampling.temperature == 0:
        raise MoeServerError(
            f"num_samples is {requested} and temperature 0: all samples would be the same.",
            "Set a temperature, or ask for one.",
            field=field,
        )
    return max(1, requested)


def _stop_token_ids(token_ids: Sequence[int], model: ServedModel) -> tuple[int, ...]:
    field = "stopping.stop_token_ids"
    if len(token_ids) > MAX_STOP_TOKEN_IDS:
        raise MoeServerError(
            f"There are {len(token_ids)} stop token ids; at most {MAX_STOP_TOKEN_IDS}.", field=field
        )
    for index, token_id in enumerate(token_ids):
        if token_id >= model.vocab_size:
            raise MoeServerError(
                f"Token id {token_id} is outside the vocabulary of {model.vocab_size}.",
                field=f"{field}[{index}]",
            )
    return tuple(token_ids)


def _constraint(request: AnyGenerateRequest, model: ServedModel) -> Constraint | None:
    field = request.WhichOneof("constraint")
    if field is None:
        return None
    if model.tokenizer is None:
        raise MoeServerError(
            f"Model {model.name!r} has no tokenizer, so a constraint has no text to hold for.",
            "Leave the constraint away.",
            reason=Reason.UNSUPPORTED,
            field=field,
        )
    texts = request.choices.values if field == "choices" else [getattr(request, field)]
    if not texts or len(texts) > MAX_CHOICES:
        raise MoeServerError(
            f"There are {len(texts)} choices; expected 1 to {MAX_CHOICES}.", field="choices.values"
        )
    for index, text in enumerate(texts):
        if not text:
            name = field if field != "choices" else f"choices.values[{index}]"
            raise MoeServerError(f"{name} is empty.", field=name)
    num_chars = sum(map(len, texts))
    if num_chars > MAX_CONSTRAINT_CHARS:
        raise MoeServerError(
            f"{field} has {num_chars} characters; at most {MAX_CONSTRAINT_CHARS}.", field=field
        )
    return Constraint(ConstraintKind(field), tuple(texts))


def _stop_sequences(stops: Sequence[str], model: ServedModel) -> tuple[str, ...]:
    field = "stopping.stop_sequences"
    if stops and model.tokenizer is None:
        raise MoeServerError(
            f"Model {model.name!r} has no tokenizer, so stop sequences have no text to match.",
            "Leave stop_sequences empty.",
            reason=Reason.UNSUPPORTED,
            field=field,
        )
    if len(stops) > MAX_STOP_SEQUENCES:
        raise MoeServerError(
            f"There are {len(stops)} stop sequences; at most {MAX_STOP_SEQUENCES}.", field=field
        )
    for index, stop in enumerate(stops):
        if not stop:
            raise MoeServerError(f"Stop sequence {index} is empty.", field=f"{field}[{index}]")
        if len(stop) > MAX_STOP_SEQUENCE_CHARS:
            raise MoeServerError(
                f"Stop sequence {index} ({shorten(stop, 20)!r}) has {len(stop)} characters; "
                f"at most {MAX_STOP_SEQUENCE_CHARS}.",
                field=f"{field}[{index}]",
            )
    return tuple(stops)


def _logprobs(output: generation_pb2.Output, model: ServedModel) -> int:
    if output.top_logprobs > MAX_TOP_LOGPROBS:
        raise MoeServerError(
            f"top_logprobs is {output.top_logprobs}; expected 0 to {MAX_TOP_LOGPROBS}.",
            field="output.top_logprobs",
        )
    if output.top_logprobs:
        return min(output.top_logprobs, model.vocab_size)
    return 0 if output.logprobs else -1


def check_priority(priority: int) -> int:
    """The priority itself.

    Raises:
        MoeServerError: INVALID.
    """
    if abs(priority) > MAX_PRIORITY:
        raise MoeServerError(
            f"priority is {priority}; expected {-MAX_PRIORITY} to {MAX_PRIORITY}.", field="priority"
        )
    return priority
