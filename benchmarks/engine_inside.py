"""An engine in this process, loaded as the engine process loads it, without sockets."""

from collections.abc import Callable

from moe_server.budget import plan_memory
from moe_server.checkpoint import read_checkpoint
from moe_server.config import Config
from moe_server.engine import Engine
from moe_server.step import nothing
from moe_server.warmup.preload import preload
from moe_server.weights import Weights


def loaded_engine(config: Config, poll: Callable[[], None] = nothing) -> Engine:
    """Ready to step; close it.

    Args:
        config: The whole configuration.
        poll: As the engine's.
    """
    plan = plan_memory(config, read_checkpoint(config.model_path))
    weights = Weights(config, read_checkpoint(config.model_path), plan)
    weights.begin()
    engine = Engine(config, plan, weights, poll)
    preload(engine, config, plan, lambda _progress: None)
    return engine
