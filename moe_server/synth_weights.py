"""Random weights: what the tensors of a synthetic checkpoint hold, and their way to the disk.

A tensor's stream of 16-bit draws (PCG64) starts from the seed and its name alone, so its bytes are
the same whatever the shards, the threads or the order of writing. Each draw picks two neighbouring
weights. Files are written in blocks that bypass the page cache: 90 GB pass through a small memory
limit and push nothing out. Knows nothing of models or directories; `synth` calls it.
"""

import errno
import hashlib
import json
import mmap
import os
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from math import prod
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

ALIGNMENT_BYTES = 4096
"""Of the data section and of every write: what O_DIRECT asks for."""
BLOCK_BYTES = 8 * 2**20
"""What one thread fills and writes at a time."""
CHUNK_STEPS = 2**13
"""64-bit generator steps per draw and look-up: everything they touch stays in the core's cache."""
WEIGHTS_PER_STEP = 8
"""A step is four 16-bit draws of two weights each."""

Words = npt.NDArray[Any]


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


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """One tensor to be made."""

    name: str
    shape: tuple[int, ...]
    std: float | None
    """Standard deviation of its normal weights; None: all ones."""

    @property
    def elements(self) -> int:
        """How many weights."""
        return prod(self.shape)


class Shard:
    """One safetensors file: which bytes of its data section come from which tensor."""

    __slots__ = ("_dtype", "_ends", "_seed", "data_bytes", "header", "tensors")

    def __init__(self, tensors: Sequence[RandomTensor], dtype: Dtype, seed: int) -> None:
        self.tensors = tuple(tensors)
        self._dtype = dtype
        self._seed = seed
        self._ends: list[int] = []
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.data_bytes = 0
        for tensor in self.tensors:
            start, self.data_bytes = (
                self.data_bytes,
                self.data_bytes + tensor.elements * dtype.itemsize,
            )
            self._ends.append(self.data_bytes)
            entries[tensor.name] = {
                "dtype": dtype.safetensors_name,
                "shape": tensor.shape,
                "data_offsets": (start, self.data_bytes),
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        # Spaces after the JSON are the format's own way to align the data section.
        text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
        self.header = len(text).to_bytes(8, "little") + text

    @property
    def file_bytes(self) -> int:
        """Header and data."""
        return len(self.header) + self.data_bytes

    def fill(self, block: Words, start: int) -> None:
        """Makes bytes [start, start + len(block)) of the data section; both fall on elements."""
        stop = start + len(block)
        position = start
        while position < stop:
            index = bisect_right(self._ends, position)
            tensor, tensor_end = self.tensors[index], self._ends[index]
            segment_end = min(tensor_end, stop)
            first = tensor.elements - (tensor_end - position) // self._dtype.itemsize
            segment = block[position - start : segment_end - start]
            self._fill_segment(tensor, first, segment.view(f"u{self._dtype.itemsize}"))
            position = segment_end

    def _fill_segment(self, tensor: RandomTensor, first: int, segment: Words) -> None:
        """Makes elements [first, first + len(segment)) of one tensor."""
        if tensor.std is None:
            segment[:] = self._dtype.bits(np.ones(1))
            return
        pairs = _pair_table(self._dtype, tensor.std)
        key = hashlib.blake2b(f"{self._seed}:{tensor.name}".encode(), digest_size=16).digest()
        generator = np.random.PCG64(int.from_bytes(key, "little"))
        step, skip = divmod(first, WEIGHTS_PER_STEP)
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


def write_shard(path: Path, shard: Shard, threads: int, written: Callable[[int], None]) -> None:
    """Writes one safetensors file to stable storage.

    Args:
        path: The file; overwritten.
        shard: What goes into it.
        threads: Threads that fill and write blocks of `BLOCK_BYTES`, each with one block of memory.
        written: Called in the calling thread with the bytes of each block that is on its way.

    Raises:
        OSError: The disk is full or failed; the file is left incomplete.
    """
    scratch = _Scratch()
    file = _open_direct(path)
    executor = ThreadPoolExecutor(threads, "synth")

    def write_block(start: int) -> int:
        stop = min(start + BLOCK_BYTES, shard.data_bytes)
        shard.fill(scratch.words[: stop - start], start)
        _write(file, scratch.memory, stop - start, len(shard.header) + start)
        return stop - start

    try:
        header = mmap.mmap(-1, len(shard.header))
        header[:] = shard.header
        _write(file, header, len(header), 0)
        for size_bytes in _in_order(
            executor, write_block, range(0, shard.data_bytes, BLOCK_BYTES), 2 * threads
        ):
            written(size_bytes)
        os.ftruncate(file, shard.file_bytes)  # the last block was written up to its alignment
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        executor.shutdown(cancel_futures=True)
        os.close(file)


class _Scratch(threading.local):
    """One page-aligned block for each thread."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, BLOCK_BYTES)
        self.words: Words = np.frombuffer(self.memory, np.uint8)


def _open_direct(path: Path) -> int:
    flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)  # tmpfs and some others have no O_DIRECT


def _write(file: int, memory: mmap.mmap, size_bytes: int, offset: int) -> None:
    """Writes the first `size_bytes` of `memory`, and what follows them up to the alignment."""
    stop = -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    with memoryview(memory) as view:
        position = 0
        while position < stop:
            position += os.pwrite(file, view[position:stop], offset + position)
    # Without O_DIRECT: start writing the pages out now, so that they can be dropped soon.
    os.posix_fadvise(file, offset, stop, os.POSIX_FADV_DONTNEED)


def _in_order(
    executor: ThreadPoolExecutor, task: Callable[[int], int], inputs: Iterable[int], ahead: int
) -> Iterator[int]:
    """`executor.map` that has no more than `ahead` tasks under way or waiting."""
    futures: deque[Future[int]] = deque()
    for item in inputs:
        if len(futures) == ahead:
            yield futures.popleft().result()
        futures.append(executor.submit(task, item))
    while futures:
        yield futures.popleft().result()
