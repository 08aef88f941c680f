"""Random weights: what the tensors of a synthetic checkpoint hold, and their way to the disk.

A tensor's stream of 16-bit draws (PCG64) starts from the seed and its name alone, so its bytes are
the same whatever the shards, the threads or the order of writing. Each draw picks two neighbouring
weights. Files are written in blocks that bypass the page cache: 90 GB pass through a small memory
limit and push nothing out. Knows nothing of models or directories; `synth` calls it.
"""

import hashlib
import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from math import prod
from pathlib import Path
from statistics import NormalDist
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from moe_server.large_file import LargeFile
from moe_server.offload.checksum import checksums
from moe_server.safetensors_file import TensorEntry, build_header

BLOCK_BYTES = 8 * 2**20
"""What one thread fills and writes at a time: whole pieces of `offload.checksum`."""
CHUNK_STEPS = 2**13
"""64-bit generator steps per draw and look-up: everything they touch stays in the core's cache."""
WEIGHTS_PER_STEP = 8
"""A step is four 16-bit draws of two weights each."""

Words = npt.NDArray[Any]
Result = TypeVar("Result")


class Dtype(Enum):
    """How weights are stored. The value is what the user types."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return 4 if self is Dtype.FP32 else 2

    @property
    def safetensors_name(self) -> str:
        """What a safetensors header calls it."""
        return {Dtype.BF16: "BF16", Dtype.FP16: "F16", Dtype.FP32: "F32"}[self]

    @property
    def torch_name(self) -> str:
        """What a config.json calls it."""
        return {Dtype.BF16: "bfloat16", Dtype.FP16: "float16", Dtype.FP32: "float32"}[self]

    def bits(self, values: npt.NDArray[np.float64]) -> Words:
        """The values rounded to nearest even, as unsigned words; numpy has no bfloat16."""
        if self is Dtype.FP16:
            return values.astype(np.float16).view(np.uint16)
        words = values.astype(np.float32).view(np.uint32)
        if self is Dtype.FP32:
            return words
        return ((words + 0x7FFF + (words >> 16 & 1)) >> 16).astype(np.uint16)


class Fillable(Protocol):
    """A tensor whose bytes can be made from any position on."""

    @property
    def entry(self) -> TensorEntry:
        """What the header says of it."""

    def fill(self, block: Words, start: int, seed: int) -> None:
        """Makes bytes [start, start + len(block)) of it."""


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """One tensor of floats to be made."""

    name: str
    shape: tuple[int, ...]
    std: float | None
    """Standard deviation of its normal weights; None: all ones."""
    dtype: Dtype

    @property
    def elements(self) -> int:
        """How many weights."""
        return prod(self.shape)

    @property
    def entry(self) -> TensorEntry:
        nbytes = self.elements * self.dtype.itemsize
        return TensorEntry(self.name, self.dtype.safetensors_name, self.shape, nbytes)

    def fill(self, block: Words, start: int, seed: int) -> None:
        """Makes bytes [start, start + len(block)); both ends fall on elements."""
        segment = block.view(f"u{self.dtype.itemsize}")
        if self.std is None:
            segment[:] = self.dtype.bits(np.ones(1))
            return
        pairs = _pair_table(self.dtype, self.std)
        generator = tensor_generator(seed, self.name)
        step, skip = divmod(start // self.dtype.itemsize, WEIGHTS_PER_STEP)
        generator.advance(step)
        indices = np.empty(CHUNK_STEPS * WEIGHTS_PER_STEP // 2, np.intp)
        chosen = np.empty(len(indices), pairs.dtype)
        position = 0
        while position < len(segment):
            steps = min(CHUNK_STEPS, -(-(skip + len(segment) - position) // WEIGHTS_PER_STEP))
            draws = generator.random_raw(steps).view(np.uint16)
            np.copyto(indices[: len(draws)], draws)
            # "clip" spares the range check, and the copy of the output that it entails.
            np.take(pairs, indices[: len(draws)], out=chosen[: len(draws)], mode="clip")
            weights = chosen[: len(draws)].view(segment.dtype)[skip:][: len(segment) - position]
            segment[position : position + len(weights)] = weights
            position += len(weights)
            skip = 0


def tensor_generator(seed: int, name: str) -> np.random.PCG64:
    """The stream of a tensor, which depends on nothing else."""
    key = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
    return np.random.PCG64(int.from_bytes(key, "little"))


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a tensor that one thread makes and writes."""

    tensor: Fillable
    start: int
    """Where in the tensor it begins."""
    offset: int
    """Where in the file."""
    nbytes: int


class Shard:
    """One safetensors file."""

    __slots__ = ("data_bytes", "header", "seed", "tensors")

    def __init__(self, tensors: Sequence[Fillable], seed: int) -> None:
        self.tensors = tuple(tensors)
        self.seed = seed
        self.header = build_header(tensor.entry for tensor in tensors)
        self.data_bytes = sum(tensor.entry.nbytes for tensor in tensors)

    @property
    def file_bytes(self) -> int:
        """Header and data."""
        return len(self.header) + self.data_bytes

    def blocks(self, block_bytes: int) -> Iterator[Block]:
        """All of its data, in order."""
        offset = len(self.header)
        for tensor in self.tensors:
            nbytes = tensor.entry.nbytes
            for start in range(0, nbytes, block_bytes):
                yield Block(tensor, start, offset + start, min(block_bytes, nbytes - start))
            offset += nbytes


@lru_cache
def _pair_table(dtype: Dtype, std: float) -> Words:
    """The two weights each 16-bit draw stands for, in one word.

    Both are the 65,536 equally likely values of a normal distribution, the second ones shuffled:
    normal and uncorrelated like two draws, at little more than half the cost.
    """
    first = dtype.bits(_standard_quantiles() * std)
    second = first[np.argsort(np.random.PCG64(0).random_raw(len(first)), kind="stable")]
    return np.stack([first, second], axis=1).view(f"u{2 * dtype.itemsize}")[:, 0]


@lru_cache
def _standard_quantiles() -> npt.NDArray[np.float64]:
    quantile = NormalDist().inv_cdf
    return np.array([quantile((index + 0.5) / 2**16) for index in range(2**16)])


def write_shard(
    path: Path, shard: Shard, threads: int, written: Callable[[int], None]
) -> dict[str, list[int]]:
    """Writes one safetensors file to stable storage.

    Args:
        path: The file; overwritten.
        shard: What goes into it.
        threads: Threads that fill and write blocks of `BLOCK_BYTES`, each with one block of memory.
        written: Called in the calling thread with the bytes of each block that is on its way.

    Returns:
        Checksums of each tensor's pieces, by its name.

    Raises:
        OSError: The disk is full or failed; the file is left incomplete.
    """
    scratch = _Scratch()
    sums: dict[str, list[int]] = {tensor.entry.name: [] for tensor in shard.tensors}

    def write_block(block: Block) -> tuple[Block, list[int]]:
        block.tensor.fill(scratch.words[: block.nbytes], block.start, shard.seed)
        file.write(scratch.memory, block.nbytes, block.offset)
        return block, checksums(memoryview(scratch.memory)[: block.nbytes])

    with closing(LargeFile(path)) as file, ThreadPoolExecutor(threads, "synth") as executor:
        header = mmap.mmap(-1, len(shard.header))
        header[:] = shard.header
        file.write(header, len(header), 0)
        try:
            for block, pieces in _in_order(
                executor, write_block, shard.blocks(BLOCK_BYTES), 2 * threads
            ):
                sums[block.tensor.entry.name] += pieces
                written(block.nbytes)
        finally:
            executor.shutdown(cancel_futures=True)
        file.sync()
    return sums


class _Scratch(threading.local):
    """One page-aligned block for each thread."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, BLOCK_BYTES)
        self.words: Words = np.frombuffer(self.memory, np.uint8)


def _in_order(
    executor: ThreadPoolExecutor,
    task: Callable[[Block], Result],
    inputs: Iterable[Block],
    ahead: int,
) -> Iterator[Result]:
    """`executor.map` that has no more than `ahead` tasks under way or waiting."""
    futures: deque[Future[Result]] = deque()
    for item in inputs:
        if len(futures) == ahead:
            yield futures.popleft().result()
        futures.append(executor.submit(task, item))
    while futures:
        yield futures.popleft().result()
