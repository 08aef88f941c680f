"""Random weights: what the tensors of a synthetic checkpoint hold, and their way to the disk.

A tensor's stream of 16-bit draws (PCG64) starts from the seed and its name alone, so its bytes are
the same whatever the shards, the threads or the order of writing. Each draw picks two neighbouring
weights. Files are written in blocks that bypass the page cache: 90 GB pass through a small memory
limit and push nothing out. Knows nothing of models or directories; `synth` calls it.
"""

import hashlib
import mmap
import os
import threading
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import accumulate
from math import prod
from pathlib import Path
from statistics import NormalDist
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from moe_server.direct_file import open_direct, write_aligned
from moe_server.offload.checksum import combine
from moe_server.safetensors_file import TensorEntry, build_header

BLOCK_BYTES = 8 * 2**20
"""What one thread fills and writes at a time."""
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
class _Piece:
    """A part of a tensor that lies in one block."""

    tensor: Fillable
    tensor_start: int
    block_start: int
    nbytes: int


class Shard:
    """One safetensors file: which bytes of its data section come from which tensor."""

    __slots__ = ("_ends", "_seed", "data_bytes", "header", "tensors")

    def __init__(self, tensors: Sequence[Fillable], seed: int) -> None:
        self.tensors = tuple(tensors)
        self._seed = seed
        entries = [tensor.entry for tensor in tensors]
        self._ends = list(accumulate(entry.nbytes for entry in entries))
        self.data_bytes = self._ends[-1]
        self.header = build_header(entries)

    @property
    def file_bytes(self) -> int:
        """Header and data."""
        return len(self.header) + self.data_bytes

    def fill(self, block: Words, start: int) -> list[tuple[str, int, int]]:
        """Makes bytes [start, start + len(block)) of the data section; both fall on elements.

        Returns:
            (name, CRC-32, bytes) of each tensor's part in the block, in order.
        """
        checksums = []
        for piece in self._pieces(start, start + len(block)):
            part = block[piece.block_start :][: piece.nbytes]
            piece.tensor.fill(part, piece.tensor_start, self._seed)
            checksums.append((piece.tensor.entry.name, zlib.crc32(part.data), piece.nbytes))
        return checksums

    def _pieces(self, start: int, stop: int) -> Iterator[_Piece]:
        position = start
        while position < stop:
            index = bisect_right(self._ends, position)
            tensor_start = self._ends[index - 1] if index else 0
            end = min(self._ends[index], stop)
            yield _Piece(
                self.tensors[index], position - tensor_start, position - start, end - position
            )
            position = end


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
) -> dict[str, int]:
    """Writes one safetensors file to stable storage.

    Args:
        path: The file; overwritten.
        shard: What goes into it.
        threads: Threads that fill and write blocks of `BLOCK_BYTES`, each with one block of memory.
        written: Called in the calling thread with the bytes of each block that is on its way.

    Returns:
        Each tensor's CRC-32.

    Raises:
        OSError: The disk is full or failed; the file is left incomplete.
    """
    scratch = _Scratch()
    file = open_direct(path)
    executor = ThreadPoolExecutor(threads, "synth")
    crc32 = {tensor.entry.name: 0 for tensor in shard.tensors}

    def write_block(start: int) -> list[tuple[str, int, int]]:
        stop = min(start + BLOCK_BYTES, shard.data_bytes)
        checksums = shard.fill(scratch.words[: stop - start], start)
        write_aligned(file, scratch.memory, stop - start, len(shard.header) + start)
        return checksums

    try:
        header = mmap.mmap(-1, len(shard.header))
        header[:] = shard.header
        write_aligned(file, header, len(header), 0)
        starts = range(0, shard.data_bytes, BLOCK_BYTES)
        for checksums in _in_order(executor, write_block, starts, 2 * threads):
            for name, checksum, nbytes in checksums:
                crc32[name] = combine(crc32[name], checksum, nbytes)
                written(nbytes)
        os.ftruncate(file, shard.file_bytes)  # the last block was written up to its alignment
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        executor.shutdown(cancel_futures=True)
        os.close(file)
    return crc32


class _Scratch(threading.local):
    """One page-aligned block for each thread."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, BLOCK_BYTES)
        self.words: Words = np.frombuffer(self.memory, np.uint8)


def _in_order(
    executor: ThreadPoolExecutor, task: Callable[[int], Result], inputs: Iterable[int], ahead: int
) -> Iterator[Result]:
    """`executor.map` that has no more than `ahead` tasks under way or waiting."""
    futures: deque[Future[Result]] = deque()
    for item in inputs:
        if len(futures) == ahead:
            yield futures.popleft().result()
        futures.append(executor.submit(task, item))
    while futures:
        yield futures.popleft().result()
