"""An expert that is computed while its record arrives, with the kernels and without."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_server.kernels import native
from moe_server.kernels.experts import ExpertRun, swiglu
from moe_server.kernels.formats import WeightFormat
from moe_server.kernels.products import prepare
from moe_server.offload.layout import RecordLayout
from tests.kernels.matrices import random_matrix

compiled = pytest.mark.skipif(
    not native.is_available(), reason=f"no compiled kernels: {native.unavailable_reason()}"
)
COMPILED_FORMATS = [WeightFormat.BFLOAT16, WeightFormat.INT8, WeightFormat.INT4]
HIDDEN, INTERMEDIATE = 70, 100


def make(weight_format: WeightFormat) -> tuple[RecordLayout, torch.Tensor, list[torch.Tensor]]:
    """A layout, a record with rubbish between its matrices, and w1, w3, w2 in float64."""
    layout = RecordLayout(HIDDEN, INTERMEDIATE, weight_format, 32)
    generator = torch.Generator().manual_seed(0)
    record = torch.full((layout.stride_bytes,), 0xFF, dtype=torch.uint8)
    values = []
    for offset, matrix_layout in (
        (layout.w1_offset, layout.w13),
        (layout.w3_offset, layout.w13),
        (layout.w2_offset, layout.w2),
    ):
        matrix = random_matrix(matrix_layout, generator)
        record[offset : offset + matrix_layout.nbytes] = matrix.weights
        values.append(matrix.values)
    return layout, record, values


def start(layout: RecordLayout, record: torch.Tensor, x_MH: torch.Tensor) -> ExpertRun:
    return ExpertRun(
        prepare(x_MH, layout.w13),
        record,
        layout.w13,
        layout.w2,
        layout.w3_offset,
        layout.w2_offset,
    )


def rows(num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return (torch.randn(num_rows, HIDDEN, generator=generator) / 20).to(dtype)


@pytest.mark.parametrize("weight_format", COMPILED_FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_rows", [1, 9])
def test_an_expert_equals_float64(weight_format, dtype, num_rows):
    layout, record, (w1, w3, w2) = make(weight_format)
    x_MH = rows(num_rows, dtype)
    run = start(layout, record, x_MH)
    run.advance(layout.stride_bytes)
    output = run.output()
    x = x_MH.double()
    gate, up = x @ w1.T, x @ w3.T
    expected = (gate * gate.sigmoid() * up) @ w2.T
    assert output.dtype is dtype
    # Activations are rounded twice, to 8 bits of mantissa at worst; errors of a row's columns add
    # up as a random walk.
    error = (output.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert (error < 0.03).all()


@compiled
@settings(max_examples=40)
@given(st.sampled_from(COMPILED_FORMATS), st.integers(1, 9), st.data())
def test_how_the_bytes_arrive_changes_no_bit(weight_format, num_rows, data):
    layout, record, _ = make(weight_format)
    x_MH = rows(num_rows, torch.bfloat16)
    at_once = start(layout, record, x_MH)
    at_once.advance(layout.stride_bytes)
    cuts = data.draw(st.lists(st.integers(0, layout.stride_bytes), max_size=8).map(sorted))
    # Bytes become right as they arrive: what is read too early is rubbish.
    arriving = torch.full_like(record, 0xFF)
    bit_by_bit = start(layout, arriving, x_MH)
    for first, last in itertools.pairwise([0, *cuts, layout.stride_bytes]):
        arriving[first:last] = record[first:last]
        bit_by_bit.advance(last)
    assert torch.equal(bit_by_bit.output(), at_once.output())


def test_an_output_before_the_last_byte_is_an_error():
    layout, record, _ = make(WeightFormat.INT8)
    run = start(layout, record, rows(2, torch.bfloat16))
    run.advance(layout.w2_offset + layout.w2.nbytes - 1)
    with pytest.raises(AssertionError):
        run.output()
    run.advance(layout.w2_offset + layout.w2.nbytes)
    assert run.output().shape == (2, HIDDEN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_formats_are_torch_s_swiglu(dtype):
    layout = RecordLayout(HIDDEN, INTERMEDIATE, WeightFormat(str(dtype).removeprefix("torch.")))
    record = torch.zeros(layout.stride_bytes, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(layout.weight_bytes // dtype.itemsize, generator=generator).to(dtype)
    record[: layout.weight_bytes] = weights.view(torch.uint8)
    x_MH = rows(4, dtype)
    run = start(layout, record, x_MH)
    run.advance(layout.weight_bytes - 1)
    run.advance(layout.stride_bytes)
    expected = swiglu(
        x_MH,
        record,
        intermediate_size=INTERMEDIATE,
        w2_offset=layout.w2_offset,
        activation=torch.nn.functional.silu,
    )
    assert torch.equal(run.output(), expected)


@pytest.mark.parametrize("weight_format", COMPILED_FORMATS)
def test_tensors_on_another_device_are_torch_s(weight_format):
    layout, record, _ = make(weight_format)
    run = start(layout, record.to("meta"), rows(3, torch.bfloat16).to("meta"))
    run.advance(layout.stride_bytes)
    assert run.output().is_meta
    assert run.output().shape == (3, HIDDEN)


def test_without_the_library_every_format_is_served():
    """The values above hold in a process that is not to load it."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "float64", __file__],
        env=os.environ | {native.ENVIRONMENT_VARIABLE: "torch"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout
