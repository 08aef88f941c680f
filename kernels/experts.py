"""One expert's feed-forward network over its record in a slot.

Imports nothing of ours outside kernels: a record comes as a plain uint8 tensor with the byte
offsets of its matrices. `ExpertRun` computes an expert while its bytes arrive; `swiglu` is torch's
way, for the formats and machines that no kernel serves. Shape legend: N and M rows, H hidden size,
I intermediate size.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F

from moe_server.kernels.formats import MatrixLayout, WeightFormat
from moe_server.kernels.products import Activations, are_compiled, linear, swiglu_rows
from moe_server.kernels.quantised import linear_by_dequantising

Activation: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

_DTYPES = {
    WeightFormat.FLOAT32: torch.float32,
    WeightFormat.FLOAT16: torch.float16,
    WeightFormat.BFLOAT16: torch.bfloat16,
}


def swiglu(
    x_NH: torch.Tensor,
    record: torch.Tensor,
    *,
    intermediate_size: int,
    w2_offset: int,
    activation: Activation,
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


class ExpertRun:
    """An expert over its rows, advanced as the bytes of its record arrive.

    The record is read from its start: w1, w3, then w2. Every whole row block is computed once, as
    soon as its bytes are there; how they arrived changes no bit of the output. Where no kernel
    serves the format, the device or the activation, all is computed when the last byte has
    arrived, by torch.

    Args:
        x: M rows, prepared for `w13`.
        record: uint8, at least up to the end of w2; bytes that have not arrived are not looked at.
        w13: Layout of w1, at byte 0, and of w3.
        w2: Layout of w2.
        w3_offset: Byte offset of w3.
        w2_offset: Byte offset of w2, behind w3.
        activation: Of the gate; kernels serve SiLU, and integer formats know no other.
        out_MH: Where the output goes, in the rows' dtype, on any device; somewhere if None.
    """

    def __init__(
        self,
        x: Activations,
        record: torch.Tensor,
        w13: MatrixLayout,
        w2: MatrixLayout,
        w3_offset: int,
        w2_offset: int,
        activation: Activation = F.silu,
        out_MH: torch.Tensor | None = None,
    ) -> None:
        assert w13.columns == w2.rows
        assert w13.rows == w2.columns
        assert w13.nbytes <= w3_offset <= w2_offset - w13.nbytes
        self._x = x
        self._w13 = w13
        self._w2 = w2
        self._w2_end = w2_offset + w2.nbytes
        self._record = record
        self._activation = activation
        self._is_compiled = activation is F.silu and are_compiled(w13.format, record.device)
        if out_MH is None:
            out_MH = torch.empty(x.num_rows, w2.rows, dtype=x.dtype, device=record.device)
        self._output = out_MH
        # Kernels write where the weights are, and no float16.
        dtype = torch.float32 if out_MH.dtype is torch.float16 else out_MH.dtype
        is_served = out_MH.device == record.device and dtype is out_MH.dtype
        self._computed = (
            out_MH if is_served else torch.empty_like(out_MH, device=record.device, dtype=dtype)
        )
        self._is_complete = False
        if self._is_compiled:
            shape = x.num_rows, w13.rows
            self._gate_MI, self._up_MI = torch.empty(shape), torch.empty(shape)
            self._w1_part = _Part(record, 0, w13)
            self._w3_part = _Part(record, w3_offset, w13)
            self._w2_part = _Part(record, w2_offset, w2)
            self._hidden: Activations | None = None
        self._w3_offset = w3_offset
        self._w2_offset = w2_offset

    def advance(self, arrived_bytes: int) -> None:
        """Computes what can be computed now that bytes [0, arrived_bytes) of the record are there.

        `arrived_bytes` may count padding behind w2, and never falls.
        """
        if self._is_complete:
            return
        if not self._is_compiled:
            if arrived_bytes >= self._w2_end:
                self._compute_with_torch()
                self._complete()
            return
        self._w1_part.advance(self._x, self._gate_MI, arrived_bytes)
        self._w3_part.advance(self._x, self._up_MI, arrived_bytes)
        if not self._w3_part.is_complete:
            return
        if self._hidden is None:
            self._hidden = swiglu_rows(self._gate_MI, self._up_MI, self._w2, self._x.dtype)
        self._w2_part.advance(self._hidden, self._computed, arrived_bytes)
        if self._w2_part.is_complete:
            self._complete()

    def output(self) -> torch.Tensor:
        """(M, H) in the dtype of the rows that were prepared; the whole record has to be there."""
        assert self._is_complete
        return self._output

    def _complete(self) -> None:
        if self._computed is not self._output:
            self._output.copy_(self._computed)
        self._is_complete = True

    def _compute_with_torch(self) -> None:
        x = self._x.values
        assert x is not None
        if not self._w13.format.is_integer:
            assert self._w3_offset == self._w13.nbytes
            output = swiglu(
                x.to(_DTYPES[self._w13.format]),
                self._record,
                intermediate_size=self._w13.rows,
                w2_offset=self._w2_offset,
                activation=self._activation,
            )
            self._computed.copy_(output)
            return
        gate, up = torch.empty(2, self._x.num_rows, self._w13.rows, device=x.device)
        for offset, out in ((0, gate), (self._w3_offset, up)):
            weights = self._record[offset : offset + self._w13.nbytes]
            linear_by_dequantising(x, weights, self._w13, out)
        w2 = self._record[self._w2_offset : self._w2_end]
        linear_by_dequantising(self._activation(gate) * up, w2, self._w2, self._computed)


class _Part:
    """One matrix of the record, and how many of its row blocks have been computed."""

    def __init__(self, record: torch.Tensor, offset: int, layout: MatrixLayout) -> None:
        self._weights = record[offset : offset + layout.nbytes]
        self._offset = offset
        self._layout = layout
        self._num_done = 0

    @property
    def is_complete(self) -> bool:
        return self._num_done == self._layout.num_blocks

    def advance(self, x: Activations, out: torch.Tensor, arrived_bytes: int) -> None:
        num_whole = (arrived_bytes - self._offset) // self._layout.block_bytes
        num_whole = min(num_whole, self._layout.num_blocks)
        if num_whole > self._num_done:
            linear(
                x,
                self._weights,
                self._layout,
                out,
                first_block=self._num_done,
                num_blocks=num_whole - self._num_done,
            )
            self._num_done = num_whole
