"""One expert's feed-forward network over its record in a slot.

Torch only, imports nothing of ours: a record comes as a plain uint8 tensor with the byte offsets of
its matrices. Shape legend: N rows, H hidden size, I intermediate size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def swiglu(
    x_NH: torch.Tensor,
    record: torch.Tensor,
    *,
    intermediate_size: int,
    w2_offset: int,
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """w2 @ (activation(w1 @ x) * (w3 @ x)), row by row.

    Args:
        x_NH: (N, H) activations in the weights' dtype.
        record: uint8 (stride,): w1 (I, H) at byte 0, w3 (I, H) right behind it, w2 (H, I) at
            `w2_offset`. w1 and w3 are one fused matrix to the product.
        intermediate_size: I.
        w2_offset: Byte offset of w2.
        activation: The gate's activation, SiLU for Mixtral.

    Returns:
        (N, H) in the dtype of `x_NH`.
    """
    hidden_size = x_NH.shape[1]
    matrix_bytes = intermediate_size * hidden_size * x_NH.element_size()
    w13 = record[: 2 * matrix_bytes].view(x_NH.dtype).view(2 * intermediate_size, hidden_size)
    w2 = record[w2_offset : w2_offset + matrix_bytes].view(x_NH.dtype)
    gate, up = F.linear(x_NH, w13).chunk(2, dim=-1)
    return F.linear(activation(gate) * up, w2.view(hidden_size, intermediate_size))
