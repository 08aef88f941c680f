"""What the machine itself can do: the disk's and the memory's bandwidth, measured beside the work.

Both drift over minutes on shared machines: a figure of ours counts as a share of them.
"""

import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from moe_server.budget import READ_BLOCK_BYTES, usable_cores
from moe_server.kernels import native
from moe_server.offload.arena import Arena
from moe_server.offload.layout import PAGE_BYTES, Segment
from moe_server.offload.reader import Reader

NUM_READS = 4
MEMORY_RUNS = 10


def disk_bytes_per_s(files: Sequence[Path], read_bytes: int, num_threads: int = 4) -> float:
    """Reads `NUM_READS` random ranges through our own reader, past the page cache.

    Args:
        files: Where the ranges are drawn from; large ones.
        read_bytes: Of one range, about an expert's size; cut to the smallest file.
        num_threads: The reader's.
    """
    sizes = {file: file.stat().st_size for file in files}
    read_bytes = min(read_bytes, *sizes.values()) // PAGE_BYTES * PAGE_BYTES
    arena, reader = Arena(1, read_bytes), Reader(num_threads, READ_BLOCK_BYTES)
    address = arena[0].data_ptr()
    arena[0].zero_()  # faults the pages
    seconds = 0.0
    for _ in range(NUM_READS):
        file = random.choice(list(sizes))  # noqa: S311
        page = random.randint(0, (sizes[file] - read_bytes) // PAGE_BYTES)  # noqa: S311
        started = time.perf_counter()
        reader.submit([Segment(file, page * PAGE_BYTES, read_bytes, 0)], address).wait()
        seconds += time.perf_counter() - started
    reader.close()
    return NUM_READS * read_bytes / seconds


def memory_bytes_per_s() -> float:
    """Reads 1 GiB a few times; the best run, as a ceiling is meant.

    With the kernels' own plain read; without a compiled one by a product, where a sum, which one
    would think of first, comes to half.
    """
    matrix, vector = torch.ones(2**16, 2**12), torch.ones(2**12)
    native.set_num_threads(usable_cores())
    runs = []
    for _ in range(MEMORY_RUNS):
        started = time.perf_counter()
        if native.is_available():
            native.read(matrix)
        else:
            torch.mv(matrix, vector)
        runs.append(2**30 / (time.perf_counter() - started))
    return max(runs)
