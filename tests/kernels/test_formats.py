"""The byte layout, held element by element; packing in pieces; what dequantising reads back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_server.kernels.formats import GROUP_CHOICES, MatrixLayout, WeightFormat
from moe_server.kernels.packing import pack_int4, pack_int8
from moe_server.kernels.quantised import dequantise, linear_by_dequantising
from tests.kernels.matrices import random_matrix

INTEGERS = [WeightFormat.INT8, WeightFormat.INT4]
layouts = st.builds(
    MatrixLayout,
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    format=st.sampled_from(INTEGERS),
    group_columns=st.sampled_from(GROUP_CHOICES),
)


@settings(max_examples=60)
@given(layouts, st.integers(0, 2**31))
def test_dequantise_gives_the_weights_that_were_packed(layout, seed):
    matrix = random_matrix(layout, torch.Generator().manual_seed(seed))
    assert matrix.weights.shape == (layout.nbytes,)
    assert torch.equal(dequantise(matrix.weights, layout), matrix.values.float())
    first = layout.num_blocks // 2
    rows = dequantise(matrix.weights, layout, first_block=first, num_blocks=1)
    assert torch.equal(rows, matrix.values.float()[first * 16 : first * 16 + 16])


def test_int8_bytes_lie_where_the_layout_says():
    layout = MatrixLayout(20, 70, WeightFormat.INT8, 64)
    codes = torch.arange(20 * 70).remainder(251).to(torch.uint8).view(20, 70)
    scale = torch.arange(20).float() + 0.5
    weights = pack_int8(codes, scale, layout)
    blocks = weights.view(2, layout.block_bytes)
    for row in range(32):
        block = blocks[row // 16]
        for column in range(128):
            byte = block[(column // 4 * 16 + row % 16) * 4 + column % 4].item()
            expected = codes[row, column].item() if row < 20 and column < 70 else 128
            assert byte == expected
        stored = block[layout.scales_offset :].view(torch.float32)[row % 16].item()
        assert stored == (scale[row].item() if row < 20 else 0)


def test_int4_bytes_lie_where_the_layout_says():
    layout = MatrixLayout(20, 70, WeightFormat.INT4, 32)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (20, 70), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 16, (20, 3), generator=generator, dtype=torch.uint8)
    scale = torch.rand(20, 3, generator=generator).bfloat16()
    blocks = pack_int4(codes, scale, zero, layout).view(2, layout.block_bytes)
    for row in range(20):
        block = blocks[row // 16]
        scales = block[layout.scales_offset : layout.zeros_offset].view(torch.bfloat16)
        for column in range(96):
            step, place = divmod(column, 8)
            byte = block[(step * 16 + row % 16) * 4 + place % 4].item()
            code = byte >> 4 if place >= 4 else byte & 15
            # Padding is a weight of zero.
            assert code == (codes[row, column] if column < 70 else zero[row, 2]).item()
            group = column // 32
            assert scales[group * 16 + row % 16] == scale[row, group]
            assert block[layout.zeros_offset + group * 16 + row % 16] == zero[row, group]
    assert layout.block_bytes % 64 == 0


@pytest.mark.parametrize("weight_format", INTEGERS)
def test_pieces_of_whole_blocks_are_the_matrix(weight_format):
    layout = MatrixLayout(75, 200, weight_format, 64)
    generator = torch.Generator().manual_seed(1)
    high = 256 if weight_format is WeightFormat.INT8 else 16
    codes = torch.randint(0, high, (75, 200), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 16, (75, 4), generator=generator, dtype=torch.uint8)
    scale = torch.rand(75, 4, generator=generator)

    def pack(rows: slice) -> torch.Tensor:
        if weight_format is WeightFormat.INT8:
            return pack_int8(codes[rows], scale[rows, 0], layout)
        return pack_int4(codes[rows], scale[rows].bfloat16(), zero[rows], layout)

    pieces = [pack(slice(0, 16)), pack(slice(16, 64)), pack(slice(64, 75))]
    assert torch.equal(torch.cat(pieces), pack(slice(0, 75)))


@pytest.mark.parametrize("weight_format", INTEGERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stand_in_multiplies_by_the_packed_weights(weight_format, dtype):
    layout = MatrixLayout(1100, 70, weight_format, 32)
    generator = torch.Generator().manual_seed(2)
    matrix = random_matrix(layout, generator)
    x = torch.randn(3, 70, generator=generator).to(dtype)
    out = torch.empty(3, 1100)
    linear_by_dequantising(x, matrix.weights, layout, out)
    expected = x.double() @ matrix.values.T
    assert (out - expected).abs().max() < 1e-6 * expected.abs().max()
