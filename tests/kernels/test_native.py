"""The compiled kernels against float64, and bit for bit against themselves.

A product's bits may depend on a row of activations and a row of weights, on nothing else: not on
the rows beside them, the range of blocks, the threads or the instruction set.
"""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_server.kernels import native
from moe_server.kernels.formats import GROUP_CHOICES, MatrixLayout, WeightFormat
from moe_server.kernels.products import Activations, linear, prepare, swiglu_rows
from tests.kernels.matrices import Matrix, random_matrix

pytestmark = pytest.mark.skipif(
    not native.is_available(), reason=f"no compiled kernels: {native.unavailable_reason()}"
)

FORMATS = [WeightFormat.BFLOAT16, WeightFormat.INT8, WeightFormat.INT4]
SHAPES = [(1, 1), (15, 31), (16, 32), (17, 33), (37, 129), (50, 300), (96, 512), (131, 1000)]
NUM_ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17, 33, 70, 130]


@pytest.fixture(params=native.INSTRUCTION_SETS)
def instruction_set(request):
    if request.param not in native.supported_instruction_sets():
        pytest.skip(f"this CPU has no {request.param}")
    before = native.instruction_set()
    native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set(before)


@pytest.fixture(autouse=True)
def _threads():
    before = native.num_threads()
    yield
    native.set_num_threads(before)


def values_of(x: Activations, layout: MatrixLayout) -> torch.Tensor:
    """float64 (M, K): what activations stand for."""
    if x.values is not None:
        return x.values.double()
    groups = x.codes.double() * x.scales.double()[..., None]
    return groups.transpose(0, 1).flatten(1)[:, : layout.columns]


def run(x: Activations, matrix: Matrix, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full((x.num_rows, matrix.layout.rows), torch.nan, dtype=dtype)
    linear(x, matrix.weights, matrix.layout, out)
    return out


def make(
    weight_format: WeightFormat, rows: int, columns: int, num_rows: int, group: int = 64
) -> tuple[Matrix, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + columns + num_rows)
    layout = MatrixLayout(rows, columns, weight_format, group)
    x = torch.randn(num_rows, columns, generator=generator).bfloat16()
    return random_matrix(layout, generator), x


# Values


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_products_equal_float64(instruction_set, weight_format, rows, columns):
    for num_rows in (1, 7, 20):
        matrix, x_MK = make(weight_format, rows, columns, num_rows)
        x = prepare(x_MK, matrix.layout)
        values = values_of(x, matrix.layout)
        expected = values @ matrix.values.T
        # Each partial sum rounds once: bounded by the sum of magnitudes.
        bound = (values.abs() @ matrix.values.abs().T) * 2.0**-24 * (8 + columns / 16)
        assert ((run(x, matrix).double() - expected).abs() <= bound).all()
        rounded = run(x, matrix, torch.bfloat16)
        assert torch.equal(rounded, run(x, matrix).bfloat16())


@pytest.mark.parametrize("group", GROUP_CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_the_nearest_of_their_group(instruction_set, group, dtype):
    generator = torch.Generator().manual_seed(group)
    x_MK = (torch.randn(5, 300, generator=generator) * torch.logspace(-3, 3, 300)).to(dtype)
    x_MK[2] = 0
    layout = MatrixLayout(1, 300, WeightFormat.INT8, group)
    x = prepare(x_MK, layout)
    groups = torch.nn.functional.pad(x_MK.double(), (0, layout.padded_columns - 300))
    groups = groups.view(5, -1, group).transpose(0, 1)
    largest = groups.abs().amax(-1)
    assert torch.allclose(x.scales.double(), largest / 127, rtol=1e-6, atol=0)
    assert torch.equal(x.sums.double(), x.codes.double().sum(-1))
    error = (x.codes.double() * x.scales.double()[..., None] - groups).abs()
    assert (error <= x.scales.double()[..., None] * 0.5001).all()
    # Symmetric, and the whole range is used.
    assert torch.equal(x.codes.abs().amax(-1) == 127, largest > 0)
    assert x.dtype is dtype
    index = torch.tensor([4, 0, 4])
    assert torch.equal(x.rows(index).codes, prepare(x_MK[index], layout).codes)


def test_codes_of_a_slice_are_those_of_its_copy(instruction_set):
    wide = torch.randn(6, 200, generator=torch.Generator().manual_seed(0))
    layout = MatrixLayout(1, 100, WeightFormat.INT4, 32)
    for part in (wide[::2, 50:150], wide[:, ::2]):
        assert torch.equal(prepare(part, layout).codes, prepare(part.clone(), layout).codes)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_number_that_is_none_spoils_its_row_and_no_other(instruction_set, weight_format, bad):
    matrix, x_MK = make(weight_format, 40, 70, 9)
    clean = run(prepare(x_MK, matrix.layout), matrix)
    x_MK[4, 3] = bad
    spoilt = run(prepare(x_MK, matrix.layout), matrix)
    assert not spoilt[4].isfinite().any()
    others = torch.arange(9) != 4
    assert torch.equal(spoilt[others], clean[others])


@pytest.mark.parametrize("weight_format", [WeightFormat.INT8, WeightFormat.INT4])
def test_extreme_codes_do_not_overflow(instruction_set, weight_format):
    layout = MatrixLayout(16, 256, weight_format, 128)
    generator = torch.Generator().manual_seed(0)
    matrix = random_matrix(layout, generator)
    for byte in (0x00, 0xFF):
        matrix.weights.view(1, -1)[:, : layout.scales_offset] = byte
        if weight_format is WeightFormat.INT4:
            matrix.weights.view(1, -1)[:, layout.zeros_offset :] = 15 - byte % 16
        from moe_server.kernels.quantised import dequantise

        values = dequantise(matrix.weights, layout).double()
        for sign in (1.0, -1.0):
            x = prepare(torch.full((3, 256), sign), layout)
            expected = values_of(x, layout) @ values.T
            out = run(x, Matrix(layout, matrix.weights, values))
            assert torch.allclose(out.double(), expected, rtol=1e-6)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_swiglu_equals_float64(instruction_set, weight_format):
    generator = torch.Generator().manual_seed(3)
    gate = torch.randn(5, 400, generator=generator) * 20
    gate[0, :6] = torch.tensor([0.0, -0.0, 100.0, -100.0, 1e30, -1e30])
    up = torch.randn(5, 400, generator=generator)
    layout = MatrixLayout(1, 400, weight_format, 128)
    made = swiglu_rows(gate, up, layout, torch.bfloat16)
    exact = gate.double() * gate.double().sigmoid() * up.double()
    if weight_format is WeightFormat.BFLOAT16:
        close = torch.allclose(made.values.double(), exact, rtol=2.0**-8, atol=1e-35)
        assert close
        return
    error = (values_of(made, layout) - exact).abs()
    scales = made.scales.T.repeat_interleave(128, dim=1)[:, :400].double()
    assert (error <= scales * 0.5001).all()


# Bits


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize(("rows", "columns", "group"), [(37, 129, 32), (83, 700, 128)])
def test_a_row_s_bits_do_not_depend_on_its_company(
    instruction_set, weight_format, rows, columns, group
):
    matrix, x_MK = make(weight_format, rows, columns, max(NUM_ROWS), group)
    together = prepare(x_MK, matrix.layout)
    expected = run(together, matrix)
    for num_rows in NUM_ROWS:
        start = max(NUM_ROWS) - num_rows
        alone = prepare(x_MK[start:], matrix.layout)
        assert torch.equal(run(alone, matrix), expected[start:])
    index = torch.randperm(max(NUM_ROWS))[:11]
    assert torch.equal(run(together.rows(index), matrix), expected[index])


@settings(max_examples=60)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 90),
    st.integers(1, 400),
    st.integers(1, 20),
    st.sampled_from(GROUP_CHOICES),
    st.data(),
)
def test_bits_depend_on_no_range_no_threads_and_no_instruction_set(
    weight_format, rows, columns, num_rows, group, data
):
    matrix, x_MK = make(weight_format, rows, columns, num_rows, group)
    layout = matrix.layout
    native.set_num_threads(1)
    expected = run(prepare(x_MK, layout), matrix)
    cuts = data.draw(st.lists(st.integers(0, layout.num_blocks), max_size=5).map(sorted))
    before = native.instruction_set()
    try:
        for name in native.supported_instruction_sets():
            native.use_instruction_set(name)
            for threads in (1, 2, 3):
                native.set_num_threads(threads)
                x = prepare(x_MK, layout)
                assert torch.equal(run(x, matrix), expected)
                out = torch.full_like(expected, torch.nan)
                for first, last in zip([0, *cuts], [*cuts, layout.num_blocks], strict=True):
                    linear(
                        x, matrix.weights, layout, out, first_block=first, num_blocks=last - first
                    )
                assert torch.equal(out, expected)
    finally:
        native.use_instruction_set(before)


def test_activations_are_the_same_for_every_instruction_set():
    generator = torch.Generator().manual_seed(4)
    gate, up = torch.randn(2, 9, 555, generator=generator) * 5
    layout = MatrixLayout(1, 555, WeightFormat.INT4, 64)
    floats = MatrixLayout(1, 555, WeightFormat.BFLOAT16)
    before = native.instruction_set()
    results = []
    try:
        for name in native.supported_instruction_sets():
            native.use_instruction_set(name)
            made = [prepare(gate, layout), swiglu_rows(gate, up, layout, torch.float32)]
            rounded = swiglu_rows(gate, up, floats, torch.float32).values
            results.append([t for one in made for t in (one.codes, one.scales, one.sums)])
            results[-1].append(rounded)
    finally:
        native.use_instruction_set(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_blocks_outside_the_range_are_neither_read_nor_written(instruction_set):
    for weight_format in FORMATS:
        matrix, x_MK = make(weight_format, 80, 64, 3, 32)
        layout = matrix.layout
        x = prepare(x_MK, layout)
        expected = run(x, matrix)
        rows_per_block = layout.block_rows
        first, last = layout.num_blocks // 3, layout.num_blocks // 2 + 1
        rubbish = torch.full_like(matrix.weights, 0xFF).view(layout.num_blocks, -1)
        rubbish[first:last] = matrix.weights.view(layout.num_blocks, -1)[first:last]
        # A slice of a wider tensor: the rows of the output need not be contiguous.
        wide = torch.full((3, 200), 7.0)
        out = wide[:, 60:140]
        linear(x, rubbish.flatten(), layout, out, first_block=first, num_blocks=last - first)
        inside = slice(first * rows_per_block, last * rows_per_block)
        assert torch.equal(out[:, inside], expected[:, inside])
        wide[:, 60 + inside.start : 60 + inside.stop] = 7.0
        assert (wide == 7.0).all()


# Threads


def test_calls_from_several_threads_at_once_do_not_disturb_each_other():
    from concurrent.futures import ThreadPoolExecutor

    native.set_num_threads(3)
    cases = [make(weight_format, 400, 512, 9) for weight_format in FORMATS]
    expected = [run(prepare(x, matrix.layout), matrix) for matrix, x in cases]

    def repeat(number: int) -> bool:
        matrix, x = cases[number % 3]
        return all(
            torch.equal(run(prepare(x, matrix.layout), matrix), expected[number % 3])
            for _ in range(40)
        )

    with ThreadPoolExecutor(6) as executor:
        assert all(executor.map(repeat, range(12)))


def test_a_forked_child_computes_too():
    native.set_num_threads(2)
    matrix, x = make(WeightFormat.INT4, 2000, 512, 2)
    expected = run(prepare(x, matrix.layout), matrix)
    child = os.fork()
    if child == 0:
        same = torch.equal(run(prepare(x, matrix.layout), matrix), expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_no_thread_and_no_instruction_set_of_that_name_are_refused():
    with pytest.raises(ValueError, match="0 threads"):
        native.set_num_threads(0)
    with pytest.raises(ValueError, match="avx1024"):
        native.use_instruction_set("avx1024")


# Which library


def ask(environment: dict[str, str], code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"from moe_server.kernels import native; {code}"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", native.INSTRUCTION_SETS)
def test_the_environment_chooses(name):
    done = ask({"MOE_SERVER_KERNELS": name}, "print(native.instruction_set())")
    if name in native.supported_instruction_sets():
        assert done.stdout.strip() == name
    else:
        assert f"MOE_SERVER_KERNELS={name}" in done.stderr


def test_the_environment_can_ask_for_torch():
    code = "print(native.is_available(), native.instruction_set(), native.unavailable_reason())"
    done = ask({"MOE_SERVER_KERNELS": "torch"}, code)
    assert done.stdout.strip() == "False torch MOE_SERVER_KERNELS=torch asks for none"


def test_an_unknown_name_in_the_environment_is_refused():
    done = ask({"MOE_SERVER_KERNELS": "sse9"}, "native.is_available()")
    assert "'sse9': expected one of scalar, avx2, avx512, torch" in done.stderr


def test_a_library_of_another_version_is_not_used(monkeypatch):
    code = "native._ABI_VERSION = -1; print(native.is_available(), native.unavailable_reason())"
    done = ask({}, code)
    assert done.stdout.startswith("False")
    assert "install moe-server again" in done.stdout
