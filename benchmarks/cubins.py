"""Compiles every program that a GPU is sent, for sm_80 and sm_90, and says what came out.

Needs Triton and no GPU: `python -m benchmarks.cubins`. A program passes if it spills nothing, its
shared memory fits, its weights and activations are fetched 128 bits at a time, nothing of weight in
less than 32, and the address of a slot is computed in 64 bits. sm_80 is the one that refuses: it
has fewer registers to spare. `tests/kernels/gpu/test_cubins.py` holds the verdicts.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_server.kernels.formats import GROUP_CHOICES, GROUP_COLUMNS, MatrixLayout, WeightFormat
from moe_server.kernels.gpu.experts import down_constants, gate_up_constants
from moe_server.kernels.gpu.tiles import (
    COMBINE_COLUMNS,
    COMBINE_WARPS,
    FORMATS,
    MAX_EXPERTS,
    PLACE_TILES_AT_ONCE,
    PLACE_WARPS,
    ExpertTile,
    down_tiles,
    gate_up_tiles,
    router_tile,
)
from moe_server.offload.layout import RecordLayout
from moe_server.slot_run import slot_layout

SHARED_LIMITS = {80: 166912, 90: 232448}
"""Bytes of shared memory of one program."""
HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 4096, 14336, 8, 2
"""Mixtral 8x7B."""
WARP_BYTES = 32 * 16
"""What a warp fetches with one instruction of 128 bits a thread."""
NUM_COMPILERS = 2
_GROUP_LOADS = 4
"""Zeros and scales of a group of int4 are too few for every thread to fetch 32 bits."""


@dataclass(frozen=True, slots=True)
class Program:
    """One launch, as it is compiled."""

    name: str
    module: str
    """Below kernels/gpu/programs."""
    function: str
    tensors: dict[str, str]
    """Element types of the pointers."""
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    wide_loads: int
    """Instructions of 128 bits a thread that its tiles take, all stages together."""
    narrow_loads: int = 0
    """Instructions below 32 bits that it may have."""


@dataclass(frozen=True, slots=True)
class Cubin:
    """What the compiler made of a program."""

    name: str
    arch: int
    registers: int
    stack_bytes: int
    spills: int
    """Instructions that use local memory."""
    shared_bytes: int
    wide_loads: int
    narrow_loads: int
    """From global memory, below 32 bits a thread."""
    problems: list[str] = field(default_factory=list)


def programs() -> Iterator[Program]:
    """Every tile of the tables, at Mixtral's sizes; routers also for the most experts."""
    for weight_format in FORMATS:
        groups = GROUP_CHOICES if weight_format is WeightFormat.INT4 else (GROUP_COLUMNS,)
        for group_columns in groups:
            record = RecordLayout(HIDDEN, INTERMEDIATE, weight_format, group_columns)
            layout = slot_layout(record)
            for tile in gate_up_tiles(layout.w13):
                constants = gate_up_constants(layout, NUM_EXPERTS, TOP_K, tile)
                yield _of_expert("gate_up", layout.w13, tile, constants)
            for tile in down_tiles(layout.w2):
                constants = down_constants(layout, NUM_EXPERTS, tile)
                yield _of_expert("down", layout.w2, tile, constants)
    for num_experts, top_k in ((NUM_EXPERTS, TOP_K), (MAX_EXPERTS, 8)):
        yield from _of_router(num_experts, top_k)
    yield Program(
        "combine",
        "combine",
        "combine_tokens",
        {"outputs": "*bf16", "ids": "*i64", "weights": "*fp32", "total": "*bf16"},
        {"TOP_K": TOP_K, "HIDDEN": HIDDEN, "BLOCK_H": COMBINE_COLUMNS},
        COMBINE_WARPS,
        1,
        TOP_K * COMBINE_COLUMNS * 2 // (COMBINE_WARPS * WARP_BYTES),
    )


def _of_expert(
    function: str, matrix: MatrixLayout, tile: ExpertTile, constants: dict[str, Any]
) -> Program:
    columns = constants["BLOCK_K"]
    group = f" of {matrix.group_columns}" if matrix.format is WeightFormat.INT4 else ""
    weight_bits = {WeightFormat.BFLOAT16: 16, WeightFormat.INT8: 8, WeightFormat.INT4: 4}
    step_bytes = (
        tile.rows * columns * 2,
        tile.outputs * columns * weight_bits[matrix.format] // 8,
    )
    return Program(
        f"{function} {matrix.format.value}{group} {tile.rows}x{tile.outputs}x{columns}",
        "experts",
        function,
        {
            "x": "*bf16",
            "hidden": "*bf16",
            "outputs": "*bf16",
            "order": "*i64",
            "offsets": "*i32",
            "slots": "*i32",
            "arena": "*u8",
        },
        constants,
        tile.num_warps,
        tile.num_stages,
        tile.num_stages * sum(_wide_loads(nbytes, tile.num_warps) for nbytes in step_bytes),
        narrow_loads=_GROUP_LOADS if matrix.format is WeightFormat.INT4 else 0,
    )


def _of_router(num_experts: int, top_k: int) -> Iterator[Program]:
    tile = router_tile(num_experts)
    outputs = {"logits": "*bf16", "weights": "*fp32", "ids": "*i64", "num_tokens": "i32"}
    counts = {"tile_counts": "*i32"}
    plan = {"order": "*i64", "offsets": "*i32"}
    sizes = {"NUM_EXPERTS": num_experts, "TOP_K": top_k, "BLOCK_T": tile.tokens}
    router = {"HIDDEN": HIDDEN, "BLOCK_H": tile.columns, "PARTS": tile.parts}
    step_bytes = tile.parts * tile.columns * 2
    wide_loads = tile.num_stages * (
        _wide_loads(step_bytes * tile.tokens, tile.num_warps)
        + _wide_loads(step_bytes * num_experts, tile.num_warps)
    )
    for function, more in (("route_one_tile", plan), ("choose_and_count", counts)):
        yield Program(
            f"{function} of {num_experts} experts",
            "routing",
            function,
            {"x": "*bf16", "gate": "*bf16"} | outputs | more,
            sizes | router,
            tile.num_warps,
            tile.num_stages,
            wide_loads,
        )
    yield Program(
        f"place_tiles of {num_experts} experts",
        "routing",
        "place_tiles",
        {"ids": "*i64", "num_tokens": "i32", "num_tiles": "i32"} | counts | plan,
        sizes | {"BLOCK_TILES": PLACE_TILES_AT_ONCE},
        PLACE_WARPS,
        1,
        0,
    )


def _wide_loads(nbytes: int, num_warps: int) -> int:
    return max(1, nbytes // (num_warps * WARP_BYTES))


def compiled(program: Program, arch: int) -> Cubin:
    """Compiles one program and reads what the machine code does."""
    # Triton is an extra, and has to be there only where something is compiled.
    import importlib  # noqa: PLC0415

    import triton  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415

    module = importlib.import_module(f"moe_server.kernels.gpu.programs.{program.module}")
    function = getattr(module, program.function)
    signature = {name: program.tensors.get(name, "constexpr") for name in function.arg_names}
    # What the launcher finds of tensors that torch has allocated; reports mean nothing without.
    is_aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(function.arg_names)
        if signature[name].startswith("*")
    }
    source = triton.compiler.ASTSource(function, signature, program.constants, is_aligned)
    options = {"num_warps": program.num_warps, "num_stages": program.num_stages}
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = _run(str(tools / "cuobjdump"), "--dump-resource-usage", file.name)
        code = _run(str(tools / "nvdisasm"), "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    loads = re.findall(r"\b(LDG(?:STS)?\.\S+)", code)
    cubin = Cubin(
        name=program.name,
        arch=arch,
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared_bytes=result.metadata.shared,
        wide_loads=sum(load.endswith(".128") for load in loads),
        narrow_loads=sum(bool(re.search(r"\.[US](8|16)\b", load)) for load in loads),
    )
    cubin.problems.extend(_problems(program, cubin, result.asm["ptx"]))
    return cubin


def _problems(program: Program, cubin: Cubin, ptx: str) -> Iterator[str]:
    if cubin.stack_bytes or cubin.spills:
        yield f"spills: {cubin.stack_bytes} bytes of stack, {cubin.spills} instructions"
    if cubin.shared_bytes > SHARED_LIMITS[cubin.arch]:
        yield f"{cubin.shared_bytes} bytes of shared memory"
    if cubin.wide_loads < program.wide_loads:
        yield f"{cubin.wide_loads} loads of 128 bits where tiles take {program.wide_loads}"
    if cubin.narrow_loads > program.narrow_loads:
        yield f"{cubin.narrow_loads} loads below 32 bits"
    stride = program.constants.get("STRIDE_BYTES")
    if stride and not re.search(rf"m(?:ul|ad)\.(?:wide\.[su]32|lo\.s64)[^;]*\b{stride}\b", ptx):
        yield "a slot's address is not computed in 64 bits"


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Prints a table (sm_80 / sm_90), then one JSON line; 1 if any program has a problem."""
    # Where it is set nothing would be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    wanted = [(program, arch) for program in programs() for arch in SHARED_LIMITS]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(NUM_COMPILERS, mp_context=context) as pool:
        cubins = list(pool.map(compiled, *zip(*wanted, strict=True)))
    print("| program | warps | stages | registers | shared KiB | verdict |")
    print("|---|---|---|---|---|---|")
    for program in programs():
        both = [cubin for cubin in cubins if cubin.name == program.name]
        registers = " / ".join(str(cubin.registers) for cubin in both)
        shared = " / ".join(f"{cubin.shared_bytes / 1024:.0f}" for cubin in both)
        problems = [f"sm_{cubin.arch}: {one}" for cubin in both for one in cubin.problems]
        print(
            f"| {program.name} | {program.num_warps} | {program.num_stages} "
            f"| {registers} | {shared} | {'; '.join(problems) or 'good'} |"
        )
    print(json.dumps([asdict(cubin) for cubin in cubins]))
    return int(any(cubin.problems for cubin in cubins))


if __name__ == "__main__":
    sys.exit(main())
