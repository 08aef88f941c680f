"""Random quantised weights: records of a packed store, made without the weights they stand for.

Codes are uniform random bytes, and scales are chosen so that the weights' standard deviation is
what it is told. As everywhere in `synth`, bytes depend on the seed, the tensor's name and their
position alone. Knows the layout of `kernels.formats`, no models and no files; `synth_spec` uses it.
"""

from dataclasses import dataclass

import numpy as np

from moe_server.kernels.formats import BLOCK_ROWS, MatrixLayout, WeightFormat
from moe_server.packed import BYTES_DTYPE
from moe_server.safetensors_file import TensorEntry
from moe_server.synth_weights import Dtype, Words, tensor_generator

STEP_BYTES = 8
"""Of the generator."""
INT8_STD = (65535 / 12 + 0.25) ** 0.5
"""Root mean square of q - 128 for uniform bytes q."""
INT4_STD = (255 / 12 + 0.25) ** 0.5
"""Root mean square of q - zero for uniform q in 0..15 and a zero of 7 or 8."""


@dataclass(frozen=True, slots=True)
class RandomMatrix:
    """One matrix of a record."""

    offset: int
    """Where in the record it begins."""
    layout: MatrixLayout
    std: float

    def blocks(self, first: int, count: int, generator: np.random.PCG64) -> Words:
        """Makes row blocks `first` to `first + count`: uint8 (count, block bytes).

        Rows and columns that only fill a block or a group weigh nothing.
        """
        layout = self.layout
        generator.advance(first * layout.block_bytes // STEP_BYTES)
        raw = generator.random_raw(count * layout.block_bytes // STEP_BYTES)
        blocks: Words = raw.view(np.uint8).reshape(count, layout.block_bytes)
        q = blocks[:, : layout.scales_offset].reshape(count, -1, BLOCK_ROWS, 4)
        rows = range(layout.rows - first * BLOCK_ROWS, count * BLOCK_ROWS)
        if layout.format is WeightFormat.INT8:
            scale = np.array([self.std / INT8_STD], np.float32)
            blocks[:, layout.scales_offset :].view(np.float32)[:] = scale
            for column in range(layout.columns, layout.padded_columns):
                q[:, column // 4, :, column % 4] = 128
            for row in rows:
                q[row // BLOCK_ROWS, :, row % BLOCK_ROWS] = 128
            return blocks
        scale = Dtype.BF16.bits(np.array([self.std / INT4_STD]))
        blocks[:, layout.scales_offset : layout.zeros_offset].view(np.uint16)[:] = scale
        zeros_end = layout.zeros_offset + layout.num_groups * BLOCK_ROWS
        blocks[:, zeros_end:] = 0
        zeros = blocks[:, layout.zeros_offset : zeros_end]
        zeros &= 1  # a random bit of each: 7 and 8 are equally far from the codes' mean
        zeros += 7
        zero = zeros.reshape(count, layout.num_groups, BLOCK_ROWS)
        for column in range(layout.columns, layout.padded_columns):
            step, place = divmod(column, 8)
            keep, shift = (0xF0, 0) if place < 4 else (0x0F, 4)
            q[:, step, :, place % 4] = q[:, step, :, place % 4] & keep | zero[:, -1] << shift
        for row in rows:
            block, lane = divmod(row, BLOCK_ROWS)
            both = np.repeat(zero[block, :, lane] * 17, layout.group_columns // 8)
            q[block, :, lane] = both[:, None]
        return blocks


@dataclass(frozen=True, slots=True)
class RandomRecord:
    """Matrices of an integer format in a row, as one tensor of bytes."""

    name: str
    matrices: tuple[RandomMatrix, ...]
    """In order of their offsets, all multiples of 64 bytes."""
    nbytes: int

    @property
    def entry(self) -> TensorEntry:
        return TensorEntry(self.name, BYTES_DTYPE, (self.nbytes,), self.nbytes)

    def fill(self, block: Words, start: int, seed: int) -> None:
        """Makes bytes [start, start + len(block)) of it."""
        block[:] = 0
        stop = start + len(block)
        for number, matrix in enumerate(self.matrices):
            block_bytes = matrix.layout.block_bytes
            begin = max(start, matrix.offset) - matrix.offset
            end = min(stop, matrix.offset + matrix.layout.nbytes) - matrix.offset
            if begin >= end:
                continue
            first = begin // block_bytes
            count = -(-end // block_bytes) - first
            generator = tensor_generator(seed, f"{self.name}.{number}")
            made = matrix.blocks(first, count, generator).reshape(-1)
            skip = begin - first * block_bytes
            block[begin + matrix.offset - start :][: end - begin] = made[skip:][: end - begin]
