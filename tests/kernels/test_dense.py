"""int8 dense matrices against the weights they stand for."""

import pytest
import torch
import torch.nn.functional as F

from moe_server.kernels.dense import int8_embedding, int8_linear
from moe_server.kernels.formats import MatrixLayout, WeightFormat
from moe_server.kernels.packing import pack_int8
from moe_server.kernels.quantise import quantise_int8
from moe_server.kernels.quantised import dequantise


def matrix(rows: int, columns: int) -> tuple[torch.Tensor, MatrixLayout]:
    layout = MatrixLayout(rows, columns, WeightFormat.INT8)
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    made = quantise_int8(w)
    return pack_int8(made.codes, made.scales, layout), layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(16, 128), (100, 96), (320, 64)])
def test_linear_is_the_product_with_the_dequantised_weights(rows, columns, dtype):
    weights, layout = matrix(rows, columns)
    x = torch.randn(2, 5, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
    out = int8_linear(x, weights, layout)
    expected = F.linear(x.float(), dequantise(weights, layout))
    assert out.dtype is dtype
    assert out.shape == (2, 5, rows)
    # Kernels round activations to int8, too: to 1/254 of a group's largest.
    assert (out.float() - expected).norm() < 0.015 * expected.norm()


@pytest.mark.parametrize(("rows", "columns"), [(16, 128), (100, 96), (320, 64)])
def test_an_embedding_is_rows_of_the_dequantised_weights(rows, columns):
    weights, layout = matrix(rows, columns)
    ids = torch.randint(0, rows, (3, 7), generator=torch.Generator().manual_seed(3))
    ids[0, 0] = rows - 1
    out = int8_embedding(ids, weights, layout, torch.float32)
    assert torch.equal(out, dequantise(weights, layout)[ids])
