"""Rounding weights to int8 and int4: scales, zero points and codes with the least squared error.

Round to nearest with a searched range: clipping a few large weights makes the steps finer for all
others. The error is measured with the scale as it is stored, so rounding it costs nothing unseen.
Torch only, imports nothing of ours; `packing` interleaves what comes out. Called by `pack` with a
few rows at a time. Shape legend: N rows, K columns, G groups.
"""

from dataclasses import dataclass

import torch

INT8_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Parts of a row's range that are tried; a normal row of 4096 weights is best near 0.95."""
INT4_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Parts of a group's range that are tried."""
INT8_ZERO = 128
INT8_RANGE = (1, 255)
"""Symmetric about the zero."""
INT4_MAX = 15
INT4_RANGE = (0, INT4_MAX)


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """Rows of a matrix in an integer format."""

    codes: torch.Tensor
    """uint8 (N, K); int4 has values 0..15."""
    scales: torch.Tensor
    """int8: float32 (N,); int4: bfloat16 (N, G)."""
    zeros: torch.Tensor | None
    """int4: uint8 (N, G), 0..15."""
    squared_error: float
    """Sum over the weights."""


def quantise_int8(w_NK: torch.Tensor) -> QuantisedRows:
    """W = (code - 128) * scale, one float32 scale a row, for float32 `w_NK`."""
    smallest, largest = w_NK.aminmax(dim=1, keepdim=True)
    largest = torch.maximum(largest, -smallest)
    # A row of zeros has any scale; 1 keeps it finite.
    largest = torch.where(largest > 0, largest, 127.0)
    best = _Choice.none(largest)
    scratch = torch.empty_like(w_NK)
    zero = torch.full_like(largest, INT8_ZERO)
    for shrink in INT8_SHRINKS:
        best = best.or_better(w_NK, largest * (shrink / 127), zero, INT8_RANGE, scratch)
    codes = _codes(w_NK, best.scale, zero, INT8_RANGE, scratch).to(torch.uint8)
    return QuantisedRows(codes, best.scale[:, 0], None, best.squared_error)


def quantise_int4(w_NK: torch.Tensor, group_columns: int) -> QuantisedRows:
    """W = (code - zero) * scale, one bfloat16 scale and one zero for each group of columns.

    Args:
        w_NK: float32.
        group_columns: Columns of a group; the last group is filled up with zeros.
    """
    num_rows, columns = w_NK.shape
    num_groups = -(-columns // group_columns)
    padding = num_groups * group_columns - columns
    w = torch.nn.functional.pad(w_NK, (0, padding)) if padding else w_NK
    w = w.reshape(num_rows, num_groups, group_columns)
    # Zero is always in the range, as its code must be one of the sixteen.
    low = w.amin(2, keepdim=True).clamp_(max=0)
    high = w.amax(2, keepdim=True).clamp_(min=0)
    best = _Choice.none(low)
    scratch = torch.empty_like(w)
    for shrink in INT4_SHRINKS:
        scale = _storable((high - low) * (shrink / INT4_MAX))
        zero = (low * -shrink / scale).round_().clamp_(0, INT4_MAX)
        best = best.or_better(w, scale, zero, INT4_RANGE, scratch)
    # The least-squares scale of the codes found.
    steps = _codes(w, best.scale, best.zero, INT4_RANGE, scratch).sub_(best.zero)
    norm = torch.linalg.vector_norm(steps, dim=2, keepdim=True).square_()
    fitted = steps.mul_(w).sum(2, keepdim=True) / norm
    best = best.or_better(w, _storable(fitted), best.zero, INT4_RANGE, scratch)
    codes = _codes(w, best.scale, best.zero, INT4_RANGE, scratch)
    return QuantisedRows(
        codes.to(torch.uint8).reshape(num_rows, -1)[:, :columns],
        best.scale[..., 0].to(torch.bfloat16),
        best.zero[..., 0].to(torch.uint8),
        best.squared_error,
    )


@dataclass(frozen=True, slots=True)
class _Choice:
    """The best scale and zero so far, of every row or group."""

    error: torch.Tensor
    """Root of the squared error."""
    scale: torch.Tensor
    zero: torch.Tensor

    @classmethod
    def none(cls, like: torch.Tensor) -> "_Choice":
        return cls(torch.full_like(like, torch.inf), torch.ones_like(like), torch.zeros_like(like))

    @property
    def squared_error(self) -> float:
        return float(self.error.double().square().sum())

    def or_better(
        self,
        w: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        code_range: tuple[int, int],
        scratch: torch.Tensor,
    ) -> "_Choice":
        steps = _codes(w, scale, zero, code_range, scratch).sub_(zero)
        residual = torch.addcmul(w, steps, scale, value=-1, out=scratch)
        error = torch.linalg.vector_norm(residual, dim=-1, keepdim=True)
        better = error < self.error
        return _Choice(
            torch.where(better, error, self.error),
            torch.where(better, scale, self.scale),
            torch.where(better, zero, self.zero),
        )


def _codes(
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    code_range: tuple[int, int],
    scratch: torch.Tensor,
) -> torch.Tensor:
    """The nearest codes, as floats, in `scratch`: allocating costs more than computing here."""
    codes = torch.mul(w, scale.reciprocal(), out=scratch).add_(zero)
    return codes.round_().clamp_(*code_range)


def _storable(scale: torch.Tensor) -> torch.Tensor:
    """As bfloat16 holds it; 1 where it is zero, as in a group of zeros."""
    rounded = scale.to(torch.bfloat16).float()
    return torch.where(rounded > 0, rounded, 1.0)
