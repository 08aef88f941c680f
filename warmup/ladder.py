"""The first requests: every shape that steps will have, side by side.

Prompts from one token to the longest, and completions of which each is one token longer than the
one before, so that one batch decodes with every size from all of them down to one. Beside them a
request as people send it, which loads tokenizer, chat template and grammar compiler.
"""

from collections.abc import Iterator

from moe_server.config import ModelConfig
from moe_server.proto.moe_server.v1 import generation_pb2
from moe_server.warmup.probe import ProbeShape

SHORTER = 4
"""Each prompt is so many times shorter than the one before."""
TEXT = "hello world"
CHOICES = ("yes", "no")


def longest_prompt(config: ModelConfig) -> int:
    """Tokens. Programs for a GPU are made for each size; a CPU computes them all alike."""
    if config.warmup.longest_prompt_tokens is not None:
        return config.warmup.longest_prompt_tokens
    is_cpu = config.device == "cpu"
    return config.warmup.prompt_tokens if is_cpu else config.scheduler.max_batch_tokens


def ladder(probe: ProbeShape, longest: int, batch: int) -> Iterator[ProbeShape]:
    """The shapes of `batch` requests, the longest prompt first."""
    for index in range(batch):
        yield ProbeShape.fitting(
            longest // SHORTER**index,
            index + 2,
            model=probe.model,
            vocab_size=probe.vocab_size,
            max_request_tokens=probe.max_request_tokens,
        )


def as_people_send_it(model: str, *, is_chat: bool) -> generation_pb2.GenerateStreamRequest:
    """A conversation where the model knows how to lead one, else a text; one of two answers."""
    request = generation_pb2.GenerateStreamRequest(model=model)
    if is_chat:
        request.messages.messages.add(role="user", content=TEXT)
    else:
        request.text = TEXT
    request.choices.values.extend(CHOICES)
    request.stopping.max_new_tokens = 2
    return request
