"""Requests that operators recorded from their own traffic, to be sent again before READY.

One line of JSON for each, as protobuf writes its messages. A redacted one has no words of anybody:
the length of its prompt, and a seed for tokens to take its place. `moe-server warmup record` writes
such files, `warmup.requests` names the one that a start sends.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from google.protobuf import json_format

from moe_server.errors import MoeServerError, Reason
from moe_server.proto.moe_server.v1 import generation_pb2

MAX_REQUESTS = 1000
MAX_FILE_BYTES = 64 * 2**20
MAX_NEW_TOKENS = 16
"""Of each when it is sent again: it is its prompt that brings the experts in."""


def to_line(recorded: generation_pb2.RecordedRequest) -> str:
    """JSON without a line's end."""
    return json_format.MessageToJson(
        recorded, preserving_proto_field_name=True, indent=None, ensure_ascii=False
    )


def read_requests(file: Path) -> list[generation_pb2.RecordedRequest]:
    """All requests of a file.

    Raises:
        MoeServerError: It cannot be read, has none or too many, or a line is none; says which.
    """
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise _unusable(file, f"it is larger than {MAX_FILE_BYTES} bytes")
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise _unusable(file, error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        raise _unusable(file, str(error)) from None
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            recorded = json_format.Parse(line, generation_pb2.RecordedRequest())
        except json_format.ParseError as error:
            raise _unusable(file, f"line {number} is no recorded request: {error}") from None
        has_prompt = recorded.request.WhichOneof("prompt") is not None
        if has_prompt == recorded.HasField("random_prompt"):
            raise _unusable(file, f"line {number} must have one of prompt and random_prompt")
        requests.append(recorded)
    if not requests:
        raise _unusable(file, "it has no requests")
    if len(requests) > MAX_REQUESTS:
        raise _unusable(file, f"it has {len(requests)} requests, at most {MAX_REQUESTS} are sent")
    return requests


def _unusable(file: Path, problem: str) -> MoeServerError:
    return MoeServerError(
        f"warmup.requests = {str(file)!r} is not usable: {problem.rstrip('.')}.",
        "Record it anew: moe-server warmup record --help.",
        reason=Reason.INVALID,
        field="warmup.requests",
    )


def of_model(
    recorded: Sequence[generation_pb2.RecordedRequest],
    name: str,
    vocab_size: int,
    max_request_tokens: int,
) -> list[generation_pb2.GenerateStreamRequest]:
    """Those that were sent to the model of that name, ready to be sent to it again.

    A length that it refuses stays one that it refuses, and gets no more tokens than that takes.
    """
    return [
        _replayed(one, vocab_size, max_request_tokens + 1)
        for one in recorded
        if one.request.model in (name, "")
    ]


def _replayed(
    recorded: generation_pb2.RecordedRequest, vocab_size: int, most_tokens: int
) -> generation_pb2.GenerateStreamRequest:
    request = generation_pb2.GenerateStreamRequest()
    request.CopyFrom(recorded.request)
    if recorded.HasField("random_prompt"):
        prompt = recorded.random_prompt
        numbers = random.Random(prompt.seed)  # noqa: S311  # no secret: the same in every run
        num_tokens = max(1, min(prompt.tokens, most_tokens))
        request.token_ids.ids.extend(numbers.choices(range(vocab_size), k=num_tokens))
    wanted = request.stopping.max_new_tokens or MAX_NEW_TOKENS
    request.stopping.max_new_tokens = min(wanted, MAX_NEW_TOKENS)
    return request
