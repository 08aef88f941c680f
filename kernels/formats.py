"""How a weight matrix lies in bytes: the contract between `pack`, the records and the kernels.

Pure arithmetic, imports nothing of ours and no torch. A matrix W (N rows, K columns) multiplies as
y = x @ W.T. It is a sequence of *row blocks*, each contiguous and complete in itself (weights and
scales), so that rows can be computed as soon as their bytes have arrived.

Float formats: a block is one row of K elements, as in a Hugging Face shard.

Integer formats: a block is 16 rows, interleaved so that one 64-byte vector holds four consecutive
columns of all 16 rows, which is what a `vpdpbusd` of a broadcast quadruple of activations wants: no
horizontal sums, and the same layout serves one token and many. Columns are padded to whole groups
and rows to whole blocks, with weights of zero.

int8, per row: W[r, k] = (q - 128) * scale[r]
    q       uint8 (K_padded / 4, 16 rows, 4 columns)
    scale   float32 (16,)
int4, by group of G columns: W[r, k] = (q - zero[r, k // G]) * scale[r, k // G], q and zero in 0..15
    q       uint8 (K_padded / 8, 16 rows, 4): byte j of a row holds column 8 * step + j in its low
            half and column 8 * step + 4 + j in its high half
    scale   bfloat16 (K_padded / G, 16 rows)
    zero    uint8 (K_padded / G, 16 rows)
Every block is padded to a multiple of 64 bytes.
"""

from dataclasses import dataclass
from enum import Enum

BLOCK_ROWS = 16
"""Rows of a block of an integer format."""
GROUP_COLUMNS = 128
"""Columns that share a scale, unless a store says otherwise; also the groups in which activations
are quantised."""
GROUP_CHOICES = (32, 64, 128)

_ALIGN_BYTES = 64


class WeightFormat(Enum):
    """How weights are stored; the value is the name that users and files see."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def is_integer(self) -> bool:
        return self in (WeightFormat.INT8, WeightFormat.INT4)

    @property
    def itemsize(self) -> int:
        """Bytes of one weight of a float format."""
        return {"float32": 4, "float16": 2, "bfloat16": 2}[self.value]


@dataclass(frozen=True, slots=True)
class MatrixLayout:
    """Bytes of one matrix W (rows, columns) in a format."""

    rows: int
    columns: int
    format: WeightFormat
    group_columns: int = GROUP_COLUMNS

    @property
    def block_rows(self) -> int:
        return BLOCK_ROWS if self.format.is_integer else 1

    @property
    def padded_columns(self) -> int:
        """Columns as stored: whole groups in the integer formats."""
        if not self.format.is_integer:
            return self.columns
        return round_up(self.columns, self.group_columns)

    @property
    def num_groups(self) -> int:
        return -(-self.columns // self.group_columns)

    @property
    def num_blocks(self) -> int:
        return -(-self.rows // self.block_rows)

    @property
    def scales_offset(self) -> int:
        """Where in a block its scales begin (integer formats)."""
        bits = 8 if self.format is WeightFormat.INT8 else 4
        return BLOCK_ROWS * self.padded_columns * bits // 8

    @property
    def zeros_offset(self) -> int:
        """Where in a block its zero points begin (int4)."""
        return self.scales_offset + self.num_groups * BLOCK_ROWS * 2

    @property
    def block_bytes(self) -> int:
        if self.format is WeightFormat.INT8:
            return self.scales_offset + BLOCK_ROWS * 4
        if self.format is WeightFormat.INT4:
            return round_up(self.zeros_offset + self.num_groups * BLOCK_ROWS, _ALIGN_BYTES)
        return self.columns * self.format.itemsize

    @property
    def nbytes(self) -> int:
        return self.num_blocks * self.block_bytes


def round_up(value: int, multiple: int) -> int:
    """The next multiple, from `value` on."""
    return -(-value // multiple) * multiple
