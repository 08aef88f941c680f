"""The compiled kernels: which there are, and their C functions behind checks.

Loads the library that `setup.py` builds from `cpu/` beside this file, where a compiler was found;
without one, `is_available` is false and callers compute with torch. Knows bytes and strides, no
activations and no experts: `products.py` calls it. It imports nothing of ours but the layouts.

Results are the same bit for bit for every instruction set and every number of threads. Shape
legend: M rows of activations, K columns, N rows of the matrix, G groups; in routing T tokens, H
hidden size, E experts, K experts per token.
"""

import ctypes
import functools
import os
import sysconfig
from pathlib import Path

import torch

from moe_server.kernels.formats import GROUP_CHOICES, MatrixLayout, WeightFormat

INSTRUCTION_SETS = ("scalar", "avx2", "avx512")
"""From the plainest to the widest, as the library numbers them."""
ENVIRONMENT_VARIABLE = "MOE_SERVER_KERNELS"
"""Set to an instruction set, or to `torch` for none of ours, it overrides what the CPU offers."""

MOST_EXPERTS = 256
"""Of a layer, for the routing functions."""

_ABI_VERSION = 3
_FILE = Path(__file__).with_name(f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}")
_FLOATS = (torch.float32, torch.bfloat16)


def is_available() -> bool:
    """Whether products in bfloat16, int8 and int4 run in compiled kernels."""
    return _load()[0] is not None


def unavailable_reason() -> str:
    """Why `is_available` is false, for people; empty when it is true."""
    return _load()[1]


def instruction_set() -> str:
    """What the kernels use: one of INSTRUCTION_SETS, or `torch` without a library."""
    library, _ = _load()
    return "torch" if library is None else INSTRUCTION_SETS[library.moe_instruction_set()]


def supported_instruction_sets() -> tuple[str, ...]:
    """Those this machine can run, the widest last; none without a library."""
    library, _ = _load()
    return () if library is None else INSTRUCTION_SETS[: library.moe_best_instruction_set() + 1]


def use_instruction_set(name: str) -> None:
    """Changes the instruction set, for tests and measurements; not while a product runs.

    Raises:
        ValueError: This machine or this library does not have it.
    """
    supported = supported_instruction_sets()
    if name not in supported:
        raise ValueError(f"instruction set {name!r}: this machine has {', '.join(supported)}")
    _library().moe_set_instruction_set(INSTRUCTION_SETS.index(name))


def set_num_threads(num_threads: int) -> None:
    """Threads that share a product, the caller included; torch's own number until it is set."""
    if num_threads < 1:
        raise ValueError(f"{num_threads} threads: at least 1 has to compute")
    library, _ = _load()
    if library is not None:
        library.moe_set_num_threads(num_threads)


def num_threads() -> int:
    """Threads that share a product."""
    return int(_library().moe_num_threads())


def read(data: torch.Tensor) -> None:
    """Reads a contiguous tensor with all threads: the memory's ceiling, for benchmarks."""
    assert data.is_contiguous()
    _library().moe_read(data.data_ptr(), data.nbytes)


def quantise(
    x_MK: torch.Tensor, group_columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Symmetric int8 codes of rows, by group of columns.

    Args:
        x_MK: float32 or bfloat16, rows of any stride.
        group_columns: One of GROUP_CHOICES.

    Returns:
        codes int8 (G, M, group_columns), zero behind the last column; scales float32 (G, M); sums
        of codes float32 (G, M). x is about codes * scale. A group that holds an infinity or a NaN
        has the scale NaN.
    """
    assert x_MK.is_cpu
    assert x_MK.dtype in _FLOATS
    assert x_MK.stride(1) == 1
    num_rows, columns = x_MK.shape
    codes, scales, sums = _allocate_codes(num_rows, columns, group_columns)
    _library().moe_quantise(
        x_MK.data_ptr(),
        x_MK.dtype is torch.bfloat16,
        num_rows,
        columns,
        x_MK.stride(0),
        group_columns,
        codes.data_ptr(),
        scales.data_ptr(),
        sums.data_ptr(),
    )
    return codes, scales, sums


def swiglu_quantise(
    gate_MI: torch.Tensor, up_MI: torch.Tensor, group_columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`quantise` of silu(gate) * up in float32; both contiguous float32."""
    _check_gate_and_up(gate_MI, up_MI)
    num_rows, columns = gate_MI.shape
    codes, scales, sums = _allocate_codes(num_rows, columns, group_columns)
    _library().moe_swiglu_quantise(
        gate_MI.data_ptr(),
        up_MI.data_ptr(),
        num_rows,
        columns,
        group_columns,
        codes.data_ptr(),
        scales.data_ptr(),
        sums.data_ptr(),
    )
    return codes, scales, sums


def swiglu_bfloat16(gate_MI: torch.Tensor, up_MI: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up in float32, rounded once to bfloat16; both contiguous float32."""
    _check_gate_and_up(gate_MI, up_MI)
    rounded = torch.empty(gate_MI.shape, dtype=torch.bfloat16)
    _library().moe_swiglu_bfloat16(
        gate_MI.data_ptr(), up_MI.data_ptr(), *gate_MI.shape, rounded.data_ptr()
    )
    return rounded


def integer_linear(
    codes: torch.Tensor,
    scales: torch.Tensor,
    sums: torch.Tensor,
    weights: torch.Tensor,
    layout: MatrixLayout,
    out_MN: torch.Tensor,
    first_block: int,
    last_block: int,
) -> None:
    """Writes the columns of `out_MN` that belong to blocks [first_block, last_block).

    Args:
        codes: As `quantise` gives them.
        scales: As `quantise` gives them.
        sums: As `quantise` gives them.
        weights: uint8 (layout.nbytes,), int8 or int4.
        layout: The matrix.
        out_MN: float32 or bfloat16.
        first_block: The first block of 16 rows.
        last_block: One behind the last.
    """
    _check_linear(weights, layout, out_MN, first_block, last_block)
    num_rows = out_MN.shape[0]
    assert layout.format.is_integer
    assert codes.shape == (layout.num_groups, num_rows, layout.group_columns)
    assert codes.dtype is torch.int8
    assert scales.shape == sums.shape == (layout.num_groups, num_rows)
    assert scales.dtype is sums.dtype is torch.float32
    assert codes.is_contiguous()
    assert scales.is_contiguous()
    assert sums.is_contiguous()
    is_int4 = layout.format is WeightFormat.INT4
    _library().moe_integer_linear(
        weights.data_ptr(),
        is_int4,
        layout.rows,
        layout.num_groups,
        layout.group_columns,
        layout.block_bytes,
        layout.scales_offset,
        layout.zeros_offset if is_int4 else 0,
        codes.data_ptr(),
        scales.data_ptr(),
        sums.data_ptr(),
        num_rows,
        out_MN.data_ptr(),
        out_MN.stride(0),
        out_MN.dtype is torch.bfloat16,
        first_block,
        last_block,
    )


def bfloat16_linear(
    x_MK: torch.Tensor,
    weights: torch.Tensor,
    layout: MatrixLayout,
    out_MN: torch.Tensor,
    first_row: int,
    last_row: int,
) -> None:
    """Writes columns [first_row, last_row) of `out_MN`; x contiguous bfloat16, W row-major."""
    _check_linear(weights, layout, out_MN, first_row, last_row)
    assert layout.format is WeightFormat.BFLOAT16
    assert x_MK.shape == (out_MN.shape[0], layout.columns)
    assert x_MK.dtype is torch.bfloat16
    assert x_MK.is_contiguous()
    _library().moe_bfloat16_linear(
        weights.data_ptr(),
        layout.columns,
        x_MK.data_ptr(),
        x_MK.shape[0],
        out_MN.data_ptr(),
        out_MN.stride(0),
        out_MN.dtype is torch.bfloat16,
        first_row,
        last_row,
    )


def route(
    x_TH: torch.Tensor, gate_EH: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """Router logits, the experts of each token and the order of rows, in one call.

    Args:
        x_TH: bfloat16, contiguous.
        gate_EH: bfloat16, contiguous; at most MOST_EXPERTS.
        top_k: K, at most E.

    Returns:
        logits bfloat16 (T, E); expert ids int64 (T, K), ascending in a token; weights float32
        (T, K); and what `plan` gives.
    """
    num_tokens, columns = x_TH.shape
    num_experts = gate_EH.shape[0]
    assert x_TH.is_cpu
    assert gate_EH.is_cpu
    assert x_TH.dtype is gate_EH.dtype is torch.bfloat16
    assert gate_EH.shape[1] == columns
    assert x_TH.is_contiguous()
    assert gate_EH.is_contiguous()
    assert 1 <= top_k <= num_experts <= MOST_EXPERTS
    logits = torch.empty(num_tokens, num_experts, dtype=torch.bfloat16)
    expert_ids = torch.empty(num_tokens, top_k, dtype=torch.int64)
    weights = torch.empty(num_tokens, top_k)
    rows, places, offsets = _allocate_plan(num_tokens, top_k, num_experts)
    _library().moe_route(
        x_TH.data_ptr(),
        num_tokens,
        columns,
        gate_EH.data_ptr(),
        num_experts,
        top_k,
        logits.data_ptr(),
        expert_ids.data_ptr(),
        weights.data_ptr(),
        rows.data_ptr(),
        places.data_ptr(),
        offsets,
    )
    return logits, expert_ids, weights, rows, places, tuple(offsets)


def plan(
    expert_ids_TK: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """The order of rows, for experts chosen by somebody else.

    Args:
        expert_ids_TK: int64, contiguous, distinct and ascending in a token, below `num_experts`.
        num_experts: At most MOST_EXPERTS.

    Returns:
        As in `routing.RoutingPlan`: rows int64 (T * K,), places int64 (T, K), E + 1 offsets.
    """
    assert expert_ids_TK.is_cpu
    assert expert_ids_TK.dtype is torch.int64
    assert expert_ids_TK.is_contiguous()
    assert num_experts <= MOST_EXPERTS
    num_tokens, top_k = expert_ids_TK.shape
    if num_tokens:
        least, most = expert_ids_TK.aminmax()
        assert least >= 0
        assert most < num_experts
    rows, places, offsets = _allocate_plan(num_tokens, top_k, num_experts)
    _library().moe_plan(
        expert_ids_TK.data_ptr(),
        num_tokens,
        num_experts,
        top_k,
        rows.data_ptr(),
        places.data_ptr(),
        offsets,
    )
    return rows, places, tuple(offsets)


def combine(
    outputs_PH: torch.Tensor, places_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Sums weighted rows, bfloat16 (T, H); see `routing.combine`.

    Args:
        outputs_PH: bfloat16 (T * K, H), contiguous.
        places_TK: int64, contiguous, each in [0, T * K).
        weights_TK: float32, contiguous.
    """
    num_tokens, top_k = places_TK.shape
    assert outputs_PH.is_cpu
    assert outputs_PH.dtype is torch.bfloat16
    assert outputs_PH.shape[0] == places_TK.numel()
    assert places_TK.dtype is torch.int64
    assert weights_TK.shape == places_TK.shape
    assert weights_TK.dtype is torch.float32
    assert outputs_PH.is_contiguous()
    assert places_TK.is_contiguous()
    assert weights_TK.is_contiguous()
    columns = outputs_PH.shape[1]
    combined = torch.empty(num_tokens, columns, dtype=torch.bfloat16)
    _library().moe_combine(
        outputs_PH.data_ptr(),
        num_tokens,
        columns,
        top_k,
        places_TK.data_ptr(),
        weights_TK.data_ptr(),
        combined.data_ptr(),
    )
    return combined


def _allocate_plan(
    num_tokens: int, top_k: int, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, "ctypes.Array[ctypes.c_int64]"]:
    rows = torch.empty(num_tokens * top_k, dtype=torch.int64)
    places = torch.empty(num_tokens, top_k, dtype=torch.int64)
    return rows, places, (ctypes.c_int64 * (num_experts + 1))()


def _check_gate_and_up(gate_MI: torch.Tensor, up_MI: torch.Tensor) -> None:
    assert gate_MI.shape == up_MI.shape
    assert gate_MI.dtype is up_MI.dtype is torch.float32
    assert gate_MI.is_contiguous()
    assert up_MI.is_contiguous()


def _check_linear(
    weights: torch.Tensor,
    layout: MatrixLayout,
    out_MN: torch.Tensor,
    first_block: int,
    last_block: int,
) -> None:
    assert weights.is_cpu
    assert out_MN.is_cpu
    assert weights.dtype is torch.uint8
    assert weights.shape == (layout.nbytes,)
    assert weights.is_contiguous()
    assert out_MN.shape[1] == layout.rows
    assert out_MN.dtype in _FLOATS
    assert out_MN.stride(1) == 1
    assert 0 <= first_block <= last_block <= layout.num_blocks


def _allocate_codes(
    num_rows: int, columns: int, group_columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert group_columns in GROUP_CHOICES
    num_groups = -(-columns // group_columns)
    codes = torch.empty(num_groups, num_rows, group_columns, dtype=torch.int8)
    scales = torch.empty(num_groups, num_rows)
    return codes, scales, torch.empty_like(scales)


def _library() -> ctypes.CDLL:
    library, reason = _load()
    assert library is not None, reason
    return library


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library with its signatures, or None and the reason."""
    wanted = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if wanted not in ("", "torch", *INSTRUCTION_SETS):
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}={wanted!r}: expected one of "
            f"{', '.join((*INSTRUCTION_SETS, 'torch'))}"
        )
    if wanted == "torch":
        return None, f"{ENVIRONMENT_VARIABLE}=torch asks for none"
    if not _FILE.is_file():
        return None, f"{_FILE.name} was not built: the installation found no C++17 compiler"
    try:
        library = ctypes.CDLL(str(_FILE))
    except OSError as error:
        return None, f"{_FILE} does not load: {error}"
    if library.moe_abi_version() != _ABI_VERSION:
        return None, f"{_FILE} is from another version: install moe-server again"
    _declare(library)
    best = library.moe_best_instruction_set()
    if wanted:
        level = INSTRUCTION_SETS.index(wanted)
        if level > best:
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE}={wanted}: this CPU offers "
                f"{', '.join(INSTRUCTION_SETS[: best + 1])}"
            )
        library.moe_set_instruction_set(level)
    library.moe_set_num_threads(torch.get_num_threads())
    return library, ""


def _declare(library: ctypes.CDLL) -> None:
    """Argument types, as in cpu/library.cpp: p for a pointer, l for int64, i for int."""
    types = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int}
    for name, arguments in {
        "moe_set_instruction_set": "i",
        "moe_set_num_threads": "i",
        "moe_read": "pl",
        "moe_quantise": "pi llll ppp",
        "moe_swiglu_quantise": "pp lll ppp",
        "moe_swiglu_bfloat16": "pp ll p",
        "moe_integer_linear": "pi llllll ppp l pli ll",
        "moe_bfloat16_linear": "pl pl pli ll",
        "moe_route": "pll p ll p pp ppp",
        "moe_plan": "p lll ppp",
        "moe_combine": "p lll pp p",
    }.items():
        function = getattr(library, name)
        function.argtypes = [types[letter] for letter in arguments.replace(" ", "")]
        function.restype = None
