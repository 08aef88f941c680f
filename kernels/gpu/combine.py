"""The weighted sum of experts' outputs, on a GPU: the bits of `kernels/routing.py`'s.

Triton is imported when something is summed. Shape legend as there.
"""

import torch

from moe_server.kernels.gpu.tiles import COMBINE_COLUMNS, COMBINE_WARPS


def combine(
    outputs_PH: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Weights the experts' outputs and sums them per token, in ascending order of expert.

    Each product is rounded to bfloat16 before it is added, and each sum.

    Args:
        outputs_PH: bfloat16 (T * K, H), row `token * K + choice`.
        expert_ids_TK: int64 (T, K), different ones in a row.
        weights_TK: float32 (T, K).

    Returns:
        bfloat16 (T, H).
    """
    from moe_server.kernels.gpu.programs import combine as programs  # noqa: PLC0415

    num_tokens, top_k = expert_ids_TK.shape
    hidden_size = outputs_PH.shape[1]
    assert outputs_PH.dtype is torch.bfloat16
    assert expert_ids_TK.dtype is torch.int64
    assert weights_TK.dtype is torch.float32
    assert outputs_PH.shape[0] == num_tokens * top_k
    assert weights_TK.shape == expert_ids_TK.shape
    assert all(one.is_contiguous() for one in (outputs_PH, expert_ids_TK, weights_TK))
    total_TH = outputs_PH.new_empty(num_tokens, hidden_size)
    programs.combine_tokens[(num_tokens, -(-hidden_size // COMBINE_COLUMNS))](
        outputs_PH, expert_ids_TK, weights_TK, total_TH,
        TOP_K=top_k, HIDDEN=hidden_size, BLOCK_H=COMBINE_COLUMNS,
        num_warps=COMBINE_WARPS, num_stages=1,
    )  # fmt: skip
    return total_TH
