"""Random matrices in every format that kernels serve, with the float64 weights they stand for."""

from dataclasses import dataclass

import torch

from moe_server.kernels.formats import MatrixLayout, WeightFormat
from moe_server.kernels.packing import pack_int4, pack_int8


@dataclass(frozen=True, slots=True)
class Matrix:
    layout: MatrixLayout
    weights: torch.Tensor
    """uint8 (layout.nbytes,)."""
    values: torch.Tensor
    """float64 (N, K)."""


def random_matrix(layout: MatrixLayout, generator: torch.Generator) -> Matrix:
    """Every code occurs, the extreme ones too."""
    n, k, groups = layout.rows, layout.columns, layout.num_groups
    if layout.format is WeightFormat.BFLOAT16:
        values = torch.randn(n, k, generator=generator).bfloat16()
        return Matrix(layout, values.view(torch.uint8).flatten(), values.double())
    if layout.format is WeightFormat.INT8:
        codes = torch.randint(0, 256, (n, k), generator=generator, dtype=torch.uint8)
        scale = torch.rand(n, generator=generator) + 0.1
        values = (codes.double() - 128) * scale.double()[:, None]
        return Matrix(layout, pack_int8(codes, scale, layout), values)
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 16, (n, groups), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(n, groups, generator=generator) + 0.1).bfloat16()
    of_column = torch.arange(k) // layout.group_columns
    values = (codes.double() - zero.double()[:, of_column]) * scale.double()[:, of_column]
    return Matrix(layout, pack_int4(codes, scale, zero, layout), values)
