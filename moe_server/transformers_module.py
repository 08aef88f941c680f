"""A transformers model, for every configuration that `mixtral` does not compute itself.

Two of its functions are replaced by ours, registered by name: attention (ragged, over paged keys
and values) and the experts (whatever `model` attaches to each layer). Built without storage.
"""

import os
from typing import Any

import torch
from torch import nn

from moe_server.attention import ATTENTION_NAME, paged_attention
from moe_server.checkpoint import Checkpoint
from moe_server.errors import MoeServerError

EXPERTS_NAME = "moe_server_cached"


def _cached_experts(experts: Any, *args: torch.Tensor) -> torch.Tensor:
    """What transformers calls for every experts module; each carries its own."""
    output: torch.Tensor = experts.run_chosen(*args)
    return output


def build_module(checkpoint: Checkpoint, device: torch.device) -> nn.Module:
    """The transformers module with its dense parameters on `meta`, calling our two functions."""
    # transformers looks for missing pieces on the hub; a served directory has all it needs.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers  # noqa: PLC0415
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: PLC0415

    transformers.AttentionInterface.register(ATTENTION_NAME, paged_attention)
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, _cached_experts)
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
        # Some rope types read it and do not fall back to hidden_size / heads.
        config.head_dim = checkpoint.head_dim
        config.output_router_logits = False
        config.use_cache = False
        with torch.device("meta"):
            module: nn.Module = transformers.AutoModelForCausalLM.from_config(
                config,
                dtype=getattr(torch, checkpoint.dtype),
                attn_implementation=ATTENTION_NAME,
                experts_implementation=EXPERTS_NAME,
            )
    except Exception as error:
        # It checks config.json in many places and raises whatever each of them does.
        raise MoeServerError(
            f"transformers cannot build {checkpoint.architecture} from "
            f"{checkpoint.path / 'config.json'}: {error!r}.",
            "Restore the checkpoint's own config.json.",
            field="model",
        ) from error
    # Rotary frequencies are computed, not stored, and float32 whatever the model's dtype.
    base: Any = module.get_submodule("model")
    with torch.device(device):
        base.rotary_emb = type(base.rotary_emb)(config)
    return module.eval()
