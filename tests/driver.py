"""Runs an engine in the test's own process, without sockets."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_server.budget import plan_memory
from moe_server.checkpoint import read_checkpoint
from moe_server.config import load_config
from moe_server.engine import Engine
from moe_server.messages import NO_HOT_SET, HotSet, Sampling, Submit, TokenEvent
from moe_server.warmup.preload import preload
from moe_server.weights import Weights, lasting_memory


@contextmanager
def running_engine(
    path: Path, memory: int | None = None, hot_set: HotSet = NO_HOT_SET, **flags: Any
) -> Iterator[Engine]:
    """A loaded engine for a checkpoint; keys of the configuration as keyword arguments.

    `memory` is the descriptor of the file that experts are kept in, `hot_set` what is known of
    their use.
    """
    defaults = {
        "model": str(path),
        "dense_backend": "resident",
        "threads": 1,
        "scheduler.max_wait_s": 0,  # a busy machine refuses nothing
    }
    flags = defaults | flags
    config = load_config(flags=flags, environ={})
    checkpoint = read_checkpoint(path)
    plan = plan_memory(config, checkpoint)
    lasting = None if memory is None else lasting_memory(memory, config, checkpoint, plan)
    weights = Weights(config, checkpoint, plan, lasting, hot_set)
    weights.begin()
    engine = Engine(config, plan, weights)
    preload(engine, config, plan, lambda progress: None)
    try:
        yield engine
    finally:
        engine.close()


def greedy(
    prompts: Sequence[Sequence[int]], new_tokens: int, sampling: Sampling | None = None
) -> list[Submit]:
    """One request a prompt, with log-probabilities."""
    return [
        Submit(number, list(prompt), new_tokens, [], sampling or Sampling(), logprobs=0)
        for number, prompt in enumerate(prompts)
    ]


def run(engine: Engine, requests: Sequence[Submit]) -> list[list[TokenEvent]]:
    """Submits the requests together and steps until all are done; events of each, in order."""
    events: dict[int, list[TokenEvent]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while not engine.idle:
        done = engine.step()
        assert not done.failed
        for event in done.tokens:
            events[event.request_id].append(event)
        engine.cache.check_integrity()
        engine.scheduler.check_integrity()
    return list(events.values())


def token_ids(events: Sequence[TokenEvent]) -> list[int]:
    return [event.token_id for event in events]
