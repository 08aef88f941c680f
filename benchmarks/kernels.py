"""What the CPU kernels reach: of the memory's bandwidth at few rows, of torch's product at many.

The physics: a product reads every weight once, so M rows take at least the weights' bytes at the
memory's bandwidth, and M * 2 operations a weight at the CPU's rate. Few rows are bound by the
first, many by the second. The bandwidth is measured beside every product, over other bytes; torch's
`F.linear` in bfloat16 likewise. Buffers are larger than any cache and used in turn.

    python -m benchmarks.kernels [--threads 2]          QUICK=1: fewer repetitions, below a minute

Prints a table and one JSON line.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

# torch's threads would otherwise spin on after their product, in the time of what is measured next.
os.environ["OMP_WAIT_POLICY"] = "passive"

import torch
import torch.nn.functional as F

from benchmarks import checkout
from moe_server.kernels import native
from moe_server.kernels.experts import ExpertRun
from moe_server.kernels.formats import MatrixLayout, WeightFormat
from moe_server.kernels.products import linear, prepare
from moe_server.offload.layout import RecordLayout
from moe_server.offload.pages import map_pages

HIDDEN, INTERMEDIATE = 4096, 14336
FORMATS = (WeightFormat.BFLOAT16, WeightFormat.INT8, WeightFormat.INT4)
NUM_ROWS = (1, 8, 32, 128, 512)
BUFFER_BYTES = 1 << 30
QUICK = os.environ.get("QUICK", "") not in ("", "0")
SECONDS_PER_CELL = 1.0 if QUICK else 6.0
MIN_ROUNDS = 3


def main() -> None:
    """Measures the products, then whole experts at one row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    threads = parser.parse_args().threads
    if not native.is_available():
        raise SystemExit(f"nothing to measure: {native.unavailable_reason()}")
    native.set_num_threads(threads)
    torch.set_num_threads(threads)
    buffer = make_buffer(BUFFER_BYTES)
    results: dict[str, dict[str, float]] = {}
    ratios: dict[str, float] = {}
    bandwidths = []
    print(f"{native.instruction_set()}, {threads} threads, {INTERMEDIATE} x {HIDDEN}")
    print(f"{'':>20} {'GB/s':>7} {'of memory':>10} {'GFLOP/s':>9} {'of torch bf16':>14}")
    for name, cell in cells(buffer):
        measured = cell()
        results[name] = measured
        bandwidths.append(measured["memory_gb_per_s"])
        ratios[f"{name}/memory"] = measured.pop("of_memory")
        line = f"{name:>20} {measured['gb_per_s']:7.1f} {ratios[f'{name}/memory']:10.0%}"
        line += f" {measured['gflop_per_s']:9.0f}"
        if "of_torch" in measured:
            ratios[f"{name}/torch"] = measured.pop("of_torch")
            line += f" {ratios[f'{name}/torch']:14.2f}"
        print(line, flush=True)
    print(
        json.dumps(
            {
                "bench": "kernels",
                "commit": checkout.commit(),
                "hardware": hardware(threads),
                "ceilings": {"memory_gb_per_s": statistics.median(bandwidths)},
                "results": results,
                "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
            }
        )
    )


def make_buffer(nbytes: int) -> torch.Tensor:
    """Weights for every format, on huge pages."""
    buffer = torch.frombuffer(map_pages(nbytes), dtype=torch.uint8)
    fill_with_weights(buffer)
    return buffer


def fill_with_weights(buffer: torch.Tensor) -> None:
    """Normal bfloat16 numbers, whose bytes do as codes and scales of the integer formats too."""
    generator = torch.Generator(buffer.device).manual_seed(0)
    numbers = torch.randn(1 << 20, generator=generator, device=buffer.device).bfloat16()
    pattern = numbers.view(torch.uint8)
    for start in range(0, len(buffer), len(pattern)):
        part = buffer[start : start + len(pattern)]
        part.copy_(pattern[: len(part)])


def cells(buffer: torch.Tensor) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """Every measurement with its name."""
    for weight_format in FORMATS:
        for num_rows in NUM_ROWS:
            name = f"{weight_format.value}/m{num_rows}"
            yield name, partial(measure_product, buffer, weight_format, num_rows)
    for weight_format in FORMATS:
        name = f"expert/{weight_format.value}/m1"
        yield name, partial(measure_expert, buffer, weight_format)


def measure_product(
    buffer: torch.Tensor, weight_format: WeightFormat, num_rows: int
) -> dict[str, float]:
    """One matrix times prepared rows, torch's bfloat16 product and a plain read in turn."""
    layout = MatrixLayout(INTERMEDIATE, HIDDEN, weight_format)
    x_MK = torch.randn(num_rows, HIDDEN).bfloat16()
    x = prepare(x_MK, layout)
    out = torch.empty(num_rows, INTERMEDIATE)
    ours = pieces(buffer, layout.nbytes)
    theirs = pieces(buffer, INTERMEDIATE * HIDDEN * 2)

    def torch_product() -> None:
        F.linear(x_MK, next(theirs).view(torch.bfloat16).view(INTERMEDIATE, HIDDEN))

    seconds, ratio = measure(
        ours=lambda: linear(x, next(ours), layout, out),
        torch=torch_product,
        read=lambda: native.read(next(ours)),
    )
    operations = 2 * num_rows * INTERMEDIATE * HIDDEN
    return {
        "ms": seconds["ours"] * 1e3,
        "gb_per_s": layout.nbytes / seconds["ours"] / 1e9,
        "memory_gb_per_s": layout.nbytes / seconds["read"] / 1e9,
        "gflop_per_s": operations / seconds["ours"] / 1e9,
        "torch_gflop_per_s": operations / seconds["torch"] / 1e9,
        "of_memory": ratio["read"],
        "of_torch": ratio["torch"],
    }


def measure_expert(buffer: torch.Tensor, weight_format: WeightFormat) -> dict[str, float]:
    """A whole expert at one row: three products, quantisation and SwiGLU."""
    layout = RecordLayout(HIDDEN, INTERMEDIATE, weight_format)
    x_MK = torch.randn(1, HIDDEN).bfloat16()
    records = pieces(buffer, layout.stride_bytes)

    def run() -> None:
        w13, w2 = layout.w13, layout.w2
        x = prepare(x_MK, w13)
        expert = ExpertRun(x, next(records), w13, w2, layout.w3_offset, layout.w2_offset)
        expert.advance(layout.stride_bytes)
        expert.output()

    seconds, ratio = measure(ours=run, read=lambda: native.read(next(records)))
    return {
        "ms": seconds["ours"] * 1e3,
        "gb_per_s": layout.weight_bytes / seconds["ours"] / 1e9,
        "memory_gb_per_s": layout.stride_bytes / seconds["read"] / 1e9,
        "of_memory": ratio["read"],
        "gflop_per_s": 6 * INTERMEDIATE * HIDDEN / seconds["ours"] / 1e9,
    }


def pieces(buffer: torch.Tensor, nbytes: int) -> Iterator[torch.Tensor]:
    """Parts of the buffer, round and round."""
    count = len(buffer) // nbytes
    return cycle([buffer[i * nbytes : (i + 1) * nbytes] for i in range(count)])


def measure(**arms: Callable[[], None]) -> tuple[dict[str, float], dict[str, float]]:
    """Runs the arms in turn for a while, after one round that does not count.

    Returns:
        Each arm's median seconds, and the median over rounds of its seconds by those of `ours`:
        within a round, other programs disturb all arms alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm()
    end = time.perf_counter() + SECONDS_PER_CELL
    while time.perf_counter() < end or len(seconds["ours"]) < MIN_ROUNDS:
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            seconds[name].append(time.perf_counter() - start)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times, seconds["ours"], strict=True))
        for name, times in seconds.items()
    }
    return {name: statistics.median(times) for name, times in seconds.items()}, ratios


def hardware(threads: int) -> str:
    """The CPU as the system names it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {native.instruction_set()}, {threads} threads"


if __name__ == "__main__":
    main()
