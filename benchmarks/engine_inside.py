"""An engine in this process, loaded as the engine process loads it, without sockets."""

from collections.abc import Callable

from moe_server.budget import plan_memory
from moe_server.checkpoint import Checkpoint
from moe_server.config import Config
from moe_server.engine import Engine
from moe_server.step import nothing
from moe_server.warmup.preload import preload
from moe_server.weights import Weights


def loaded_engine(
    config: Config, checkpoint: Checkpoint, poll: Callable[[], None] = nothing
) -> Engine:
    """Ready to step; close it.

    Args:
        config: The whole configuration.
        checkpoint: What is served.
        poll: As the engine's.
    """
    plan = plan_memory(config, checkpoint)
    weights = Weights(config, checkpoint, plan)
    weights.begin()
    engine = Engine(config, plan, weights, poll)
    preload(engine, config, plan, lambda _progress: None)
    return engine
