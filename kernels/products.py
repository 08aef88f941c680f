"""Products of activations with a matrix in any of the formats that kernels serve row by row.

`prepare` the activations once for a layout, then `linear` any range of row blocks: an output
element's bits depend on its row of activations and its row of weights alone, whatever the range,
the number of rows beside it, the threads or the instruction set. Knows no experts; `experts.py`
calls it. Shape legend: M rows, K columns, N rows of the matrix, I intermediate size, G groups.
"""

from dataclasses import dataclass

import torch

from moe_server.kernels import native
from moe_server.kernels.formats import MatrixLayout, WeightFormat

_CPU = torch.device("cpu")


def are_compiled(weight_format: WeightFormat, device: torch.device = _CPU) -> bool:
    """Whether products in this format are served here, by the compiled kernels."""
    is_served = weight_format.is_integer or weight_format is WeightFormat.BFLOAT16
    return is_served and device.type == "cpu" and native.is_available()


@dataclass(frozen=True, slots=True)
class Activations:
    """M rows as a product's left side: values, or int8 codes by group of columns."""

    dtype: torch.dtype
    """Of the rows they were made of."""
    values: torch.Tensor | None = None
    """(M, K) for a float matrix: contiguous bfloat16 for the kernels, as they are for torch."""
    codes: torch.Tensor | None = None
    """int8 (G, M, group columns) for an integer matrix: x is about codes * scales."""
    scales: torch.Tensor | None = None
    """float32 (G, M)."""
    sums: torch.Tensor | None = None
    """float32 (G, M): sums of codes, whole numbers."""

    @property
    def num_rows(self) -> int:
        if self.values is not None:
            return self.values.shape[0]
        assert self.codes is not None
        return self.codes.shape[1]

    def rows(self, index: torch.Tensor) -> "Activations":
        """The rows that an int64 index names, in its order."""
        if self.values is not None:
            return Activations(self.dtype, values=self.values.index_select(0, index))
        assert self.codes is not None
        assert self.scales is not None
        assert self.sums is not None
        return Activations(
            self.dtype,
            codes=self.codes.index_select(1, index),
            scales=self.scales.index_select(1, index),
            sums=self.sums.index_select(1, index),
        )


def prepare(x_MK: torch.Tensor, layout: MatrixLayout) -> Activations:
    """Rows in the form that products with `layout` want.

    Args:
        x_MK: bfloat16, float32 or float16 (M, K).
        layout: A matrix of K columns. Where no kernel serves its format the rows stay as they are.
    """
    assert x_MK.shape[1] == layout.columns
    if not are_compiled(layout.format, x_MK.device):
        return Activations(x_MK.dtype, values=x_MK)
    if not layout.format.is_integer:
        return Activations(x_MK.dtype, values=x_MK.to(torch.bfloat16).contiguous())
    x = x_MK.float() if x_MK.dtype is torch.float16 else x_MK
    x = x if x.stride(1) == 1 else x.contiguous()
    codes, scales, sums = native.quantise(x, layout.group_columns)
    return Activations(x_MK.dtype, codes=codes, scales=scales, sums=sums)


def swiglu_rows(
    gate_MI: torch.Tensor, up_MI: torch.Tensor, layout: MatrixLayout, dtype: torch.dtype
) -> Activations:
    """silu(gate) * up in float32, straight into what products with `layout` (w2) want.

    Args:
        gate_MI: float32 (M, I), contiguous.
        up_MI: As `gate_MI`.
        layout: A matrix of I columns.
        dtype: Of the rows that the expert was given.
    """
    assert gate_MI.shape[1] == layout.columns
    if not layout.format.is_integer:
        return Activations(dtype, values=native.swiglu_bfloat16(gate_MI, up_MI))
    codes, scales, sums = native.swiglu_quantise(gate_MI, up_MI, layout.group_columns)
    return Activations(dtype, codes=codes, scales=scales, sums=sums)


def linear(
    x: Activations,
    weights: torch.Tensor,
    layout: MatrixLayout,
    out_MN: torch.Tensor,
    *,
    first_block: int = 0,
    num_blocks: int | None = None,
) -> None:
    """out[:, rows of the blocks] = x @ W[those rows].T.

    Args:
        x: Made by `prepare` or `swiglu_rows` for this layout.
        weights: uint8 (layout.nbytes,); bytes of other blocks are not looked at.
        layout: The matrix W (N, K).
        out_MN: float32 or bfloat16 (M, N), rows contiguous in themselves.
        first_block: The first row block.
        num_blocks: How many; all that follow if None.
    """
    assert out_MN.shape[0] == x.num_rows
    last_block = layout.num_blocks if num_blocks is None else first_block + num_blocks
    if x.values is not None:
        native.bfloat16_linear(x.values, weights, layout, out_MN, first_block, last_block)
        return
    assert x.codes is not None
    assert x.scales is not None
    assert x.sums is not None
    native.integer_linear(
        x.codes, x.scales, x.sums, weights, layout, out_MN, first_block, last_block
    )
