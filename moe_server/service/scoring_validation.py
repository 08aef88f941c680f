"""Checks what is to be scored, and finds where it begins in tokens.

Beside `prompts`, which checks prompts. Every refusal names its field.
"""

from collections.abc import Sequence

from moe_server.errors import MoeServerError
from moe_server.proto.moe_server.v1 import generation_pb2 as pb
from moe_server.service.errors import shorten
from moe_server.service.served_model import ServedModel

MAX_CONTINUATIONS = 128
MAX_CONTENT_FREE_PROMPTS = 8


def check_continuations(
    continuations: Sequence[pb.Continuation], model: ServedModel
) -> list[str | list[int]]:
    """Texts still to be tokenised, and checked token ids.

    Raises:
        MoeServerError: INVALID.
    """
    if not 1 <= len(continuations) <= MAX_CONTINUATIONS:
        raise MoeServerError(
            f"There are {len(continuations)} continuations; expected 1 to {MAX_CONTINUATIONS}.",
            field="continuations",
        )
    checked: list[str | list[int]] = []
    for index, continuation in enumerate(continuations):
        field = f"continuations[{index}]"
        token_ids = list(continuation.token_ids.ids)
        if not (continuation.text or token_ids):
            raise MoeServerError(f"Continuation {index} is empty.", field=field)
        if token_ids and (largest := max(token_ids)) >= model.vocab_size:
            raise MoeServerError(
                f"Token id {largest} is outside the vocabulary of {model.vocab_size}.",
                field=f"{field}.token_ids.ids",
            )
        checked.append(continuation.text or token_ids)
    return checked


def check_labels(request: pb.ClassifyRequest) -> list[str]:
    """The labels, each as it is to be scored.

    Raises:
        MoeServerError: INVALID.
    """
    labels = list(request.labels)
    if not 2 <= len(labels) <= MAX_CONTINUATIONS:
        raise MoeServerError(
            f"There are {len(labels)} labels; expected 2 to {MAX_CONTINUATIONS}.", field="labels"
        )
    for index, label in enumerate(labels):
        if not label:
            raise MoeServerError(f"Label {index} is empty.", field=f"labels[{index}]")
        if (first := labels.index(label)) < index:
            raise MoeServerError(
                f"Labels {first} and {index} are both {shorten(label, 20)!r}.",
                field=f"labels[{index}]",
            )
    if len(request.content_free_prompts) > MAX_CONTENT_FREE_PROMPTS:
        raise MoeServerError(
            f"There are {len(request.content_free_prompts)} content-free prompts; at most "
            f"{MAX_CONTENT_FREE_PROMPTS}.",
            field="content_free_prompts",
        )
    return labels


def check_lengths(
    prompt: Sequence[int], wholes: Sequence[Sequence[int]], model: ServedModel, field: str
) -> int:
    """Where scoring begins: at the first token in which a continuation parts from the prompt.

    That is the prompt's end, unless a continuation's text forms a token with the prompt's last
    characters. Then all are scored from there: the probability of what they have in common of the
    prompt is a factor that all of them get.

    Args:
        prompt: The prompt alone.
        wholes: The prompt with each continuation, in tokens.
        model: What they must fit.
        field: Of the continuations.

    Raises:
        MoeServerError: INVALID where one is too long, adds nothing, or has nothing before it.
    """
    start = len(prompt)
    for index, whole in enumerate(wholes):
        if len(whole) > model.max_request_tokens:
            raise MoeServerError(
                f"The prompt and {field}[{index}] have {len(whole)} tokens; at most "
                f"{model.max_request_tokens} fit this server.",
                field=f"{field}[{index}]",
            )
        pairs = zip(prompt, whole, strict=False)
        parts = [place for place, (ours, its) in enumerate(pairs) if ours != its]
        start = min(start, len(whole), *parts[:1])
    for index, whole in enumerate(wholes):
        if list(whole) == list(prompt) or len(whole) <= start:
            raise MoeServerError(
                f"{field}[{index}] adds no token to the prompt.", field=f"{field}[{index}]"
            )
    if start == 0:
        raise MoeServerError(
            f"The prompt has no token that the {field} leave as it is, so nothing predicts them.",
            "Send a longer prompt.",
            field="prompt",
        )
    return start
