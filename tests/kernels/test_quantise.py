"""Scales, zeros and codes: never worse than plain rounding, and the error is what it says."""

import pytest
import torch

from moe_server.kernels.formats import GROUP_CHOICES, MatrixLayout, WeightFormat
from moe_server.kernels.packing import pack_int4, pack_int8
from moe_server.kernels.quantise import QuantisedRows, quantise_int4, quantise_int8
from moe_server.kernels.quantised import dequantise


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Normal ones of very different rows, some with outliers, one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    w *= 10.0 ** torch.randint(-6, 3, (rows, 1), generator=generator)
    w[1] *= torch.where(torch.rand(columns, generator=generator) < 0.01, 20.0, 1.0)
    w[2] = 0
    w[3] = w[3].abs() + 1e-3
    return w


def restored_int8(w: torch.Tensor, made: QuantisedRows) -> torch.Tensor:
    layout = MatrixLayout(*w.shape, WeightFormat.INT8)
    return dequantise(pack_int8(made.codes, made.scales, layout), layout)


def restored_int4(w: torch.Tensor, made: QuantisedRows, group: int) -> torch.Tensor:
    layout = MatrixLayout(*w.shape, WeightFormat.INT4, group)
    assert made.zeros is not None
    return dequantise(pack_int4(made.codes, made.scales, made.zeros, layout), layout)


def squared_error(w: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (w.double() - other.double()).square().sum(1)


@pytest.mark.parametrize("columns", [1, 100, 512, 4096])
def test_int8_is_no_worse_than_rounding_with_the_largest_weight(columns):
    w = weights(20, columns)
    made = quantise_int8(w)
    error = squared_error(w, restored_int8(w, made))
    scale = w.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    plain = (w / scale).round() * scale
    in_float32 = 1e-13 * w.double().square().sum(1)
    assert (error <= squared_error(w, plain) * 1.001 + in_float32).all()
    assert made.codes.min() >= 1  # as far from the zero of 128 as 255
    assert made.squared_error == pytest.approx(float(error.sum()), rel=1e-3, abs=1e-6)
    assert (restored_int8(w, made)[2] == 0).all()


@pytest.mark.parametrize("group", GROUP_CHOICES)
@pytest.mark.parametrize("columns", [7, 128, 512, 1000])
def test_int4_is_no_worse_than_rounding_the_whole_range(columns, group):
    w = weights(20, columns)
    made = quantise_int4(w, group)
    restored = restored_int4(w, made, group)
    padded = torch.nn.functional.pad(w, (0, -columns % group)).view(20, -1, group)
    low, high = padded.amin(2, True).clamp(max=0), padded.amax(2, True).clamp(min=0)
    scale = ((high - low) / 15).bfloat16().float()
    scale = torch.where(scale > 0, scale, 1.0)
    zero = (-low / scale).round().clamp(0, 15)
    plain = (((padded / scale).round() + zero).clamp(0, 15) - zero) * scale
    plain_error = squared_error(w, plain.view(20, -1)[:, :columns])
    error = squared_error(w, restored)
    assert (error <= plain_error * 1.001 + 1e-30).all()
    assert made.squared_error == pytest.approx(float(error.sum()), rel=1e-3)
    assert (restored[2] == 0).all()
    assert made.codes.max() <= 15
    assert made.scales.dtype is torch.bfloat16


@pytest.mark.parametrize(("group", "most"), [(128, 0.097), (64, 0.089), (32, 0.080)])
def test_the_error_of_normal_weights_in_int4(group, most):
    """Plain rounding gives 10.1 % in groups of 128."""
    w = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    made = quantise_int4(w, group)
    assert (made.squared_error / float(w.square().sum())) ** 0.5 < most


def test_the_error_of_normal_weights_in_int8():
    w = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1))
    made = quantise_int8(w)
    assert (made.squared_error / float(w.square().sum())) ** 0.5 < 0.0092


def test_weights_that_fit_the_grid_are_kept_exactly():
    codes = torch.arange(16).repeat(16, 8)
    w = (codes - 5).float() * 0.25
    made = quantise_int4(w, 128)
    assert torch.equal(restored_int4(w, made, 128), w)
    assert made.squared_error == 0
    w = torch.arange(-127, 128).float().repeat(16, 1) * 0.5
    assert torch.equal(restored_int8(w, quantise_int8(w)), w)


def test_rows_do_not_depend_on_their_neighbours():
    w = weights(48, 256)
    whole = quantise_int4(w, 64)
    part = quantise_int4(w[16:32], 64)
    assert torch.equal(whole.codes[16:32], part.codes)
    assert torch.equal(whole.scales[16:32], part.scales)
