"""The first requests: every shape that steps will have, side by side.

Prompts from one token to the longest, and completions of which each is one token longer than the
one before, so that one batch decodes with every size from all of them down to one. Beside them a
request as people send it, which loads tokenizer, chat template and grammar compiler.

A GPU makes a program for each size when it first comes. A CPU has nothing to make, and where half
of the experts fit each of these requests reads half of the model: there they are not sent.
"""

from collections.abc import Iterator

from moe_server.config import ModelConfig
from moe_server.proto.moe_server.v1 import generation_pb2
from moe_server.warmup.probe import ProbeShape

BATCH_ON_GPU = 4
SHORTER = 4
"""Each prompt is so many times shorter than the one before."""
TEXT = "hello world"
CHOICES = ("yes", "no")


def num_shapes(config: ModelConfig) -> int:
    """Requests side by side."""
    unset = 0 if config.device == "cpu" else BATCH_ON_GPU
    batch = unset if config.warmup.batch is None else config.warmup.batch
    return min(batch, config.scheduler.max_running)


def longest_prompt(config: ModelConfig) -> int:
    """Tokens of the longest of them."""
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
