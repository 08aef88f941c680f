"""What the GPU and its link reach: copies, synchronisations, and experts against its own memory.

    python -m benchmarks.gpu_rates [--rehearse]

The physics: an expert's weights are read once a step, so few rows take at least the weights' bytes
at the memory's bandwidth; an expert of the host tier takes its bytes at the link's. Both are
measured here, with plain copies, in the same run. `--rehearse` runs all of it on a CPU with tiny
sizes: the figures then mean nothing, that it runs is the point. Prints one JSON line.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.gpu_arms import GpuArms, Sizes
from moe_server.kernels.formats import WeightFormat
from moe_server.offload.arena import Arena

COPY_BYTES = 2**30
REHEARSED_BYTES = 2**20
REHEARSED_SIZES = Sizes(hidden=64, intermediate=32, num_experts=4)
FORMATS = (WeightFormat.BFLOAT16, WeightFormat.INT8, WeightFormat.INT4)
NUM_TOKENS = (1, 8, 32)
NUM_LAYERS = 4
RUNS = 20


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
    rehearse = parser.parse_args().rehearse
    device = torch.device("cpu" if rehearse else "cuda")
    sizes, nbytes = (REHEARSED_SIZES, REHEARSED_BYTES) if rehearse else (Sizes(), COPY_BYTES)
    found = {**copies(device, nbytes), **synchronisations(device)}
    for weight_format in FORMATS[:1] if rehearse else FORMATS:
        for num_tokens in NUM_TOKENS[:1] if rehearse else NUM_TOKENS:
            rate = expert_bytes_per_s(device, weight_format, num_tokens, sizes)
            name = f"experts/{weight_format.value}/t{num_tokens}"
            found[f"{name}/gb_per_s"] = rate / 1e9
            found[f"{name}/of_memory"] = rate / 1e9 / found["memory_gb_per_s"]
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))
    return 0


def copies(device: torch.device, nbytes: int) -> dict[str, float]:
    """Bandwidths in GB/s: the device's memory (bytes read), and the link from a pinned arena."""
    source, target = (torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    source.random_()
    pinned = Arena(1, nbytes, pinned=device.type == "cuda", allow_pageable=True)
    host = pinned[0]
    host.random_()
    # A copy reads and writes every byte; products only read.
    inside = median_seconds(device, lambda: target.copy_(source))
    return {
        "memory_gb_per_s": 2 * nbytes / inside / 1e9,
        "host_to_device_gb_per_s": nbytes
        / median_seconds(device, lambda: source.copy_(host))
        / 1e9,
        "device_to_host_gb_per_s": nbytes
        / median_seconds(device, lambda: host.copy_(source))
        / 1e9,
        "is_pinned": float(pinned.is_pinned),
    }


def synchronisations(device: torch.device) -> dict[str, float]:
    """What the host pays to read nine numbers, in microseconds, with nothing else under way."""
    offsets = torch.zeros(9, dtype=torch.int32, device=device)
    return {"read_offsets_us": median_seconds(device, offsets.tolist, 200) * 1e6}


def expert_bytes_per_s(
    device: torch.device, weight_format: WeightFormat, num_tokens: int, sizes: Sizes
) -> float:
    """Bytes of weights per second of a layer's experts, replayed over a few layers in turn."""
    arms = GpuArms(num_tokens, weight_format, sizes, NUM_LAYERS, device)
    seconds = statistics.median(arms.experts_seconds() for _ in range(RUNS))
    return arms.expert_bytes / seconds


def median_seconds(device: torch.device, work: Callable[[], object], runs: int = RUNS) -> float:
    """Of calls that end when the work has."""
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    sys.exit(main())
