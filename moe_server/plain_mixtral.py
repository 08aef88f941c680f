"""Which Mixtrals our own module serves: those whose config.json asks for nothing unusual.

Pure facts about config.json, without torch: `checkpoint` asks, and `budget` counts by the answer
what the engine has to import.
"""

from collections.abc import Mapping
from typing import Any

DEFAULT_ROPE_THETA = 1e6
DEFAULT_EPS = 1e-5


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes what `mixtral` computes; it says nothing of sizes."""
    rope = rope_parameters(config)
    numbers = (rope.get("rope_theta", 1.0), config.get("rms_norm_eps", DEFAULT_EPS))
    return (
        config.get("model_type") == "mixtral"
        and config.get("hidden_act", "silu") == "silu"
        and rope.keys() <= {"rope_theta", "rope_type", "type"}
        and rope.get("rope_type", rope.get("type", "default")) == "default"
        and all(type(number) in (int, float) and number > 0 for number in numbers)
        and not config.get("attention_bias")
        and not config.get("quantization_config")
    )


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """How positions are rotated, whichever version of transformers wrote the file."""
    # transformers 5 writes rope_parameters; before, rope_theta stood alone.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        return {"unknown": rope}
    theta = config.get("rope_theta")
    return {**({} if theta is None else {"rope_theta": theta}), **rope}
