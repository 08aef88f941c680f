"""Which expert, and how its bytes lie: the record.

An expert's weights are one contiguous byte range, the *record*: w1, w3, w2. It has the same form on
the device (a slot), in host memory and in flight, so that moving an expert is copying one range.
w1 and w3 are adjacent: seen together they are the fused gate-and-up matrix of one matrix product.

Knows no files, no torch and no model names; everything in `offload` builds on it.
"""

from dataclasses import dataclass
from pathlib import Path

from moe_server.kernels.formats import GROUP_COLUMNS, MatrixLayout, WeightFormat, round_up

PAGE_BYTES = 4096
"""Alignment of records, so that a slot can be the target of an O_DIRECT read."""

_MATRIX_ALIGN_BYTES = 64


@dataclass(frozen=True, slots=True, order=True)
class ExpertId:
    """One expert of one layer; orders by layer first, as a forward pass meets them."""

    layer: int
    expert: int


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """Where an expert's matrices are in its record, in bytes.

    w1 and w3 are (intermediate_size, hidden_size), w2 is (hidden_size, intermediate_size); how each
    lies in its bytes is `kernels.formats`' business.
    """

    hidden_size: int
    intermediate_size: int
    format: WeightFormat
    group_columns: int = GROUP_COLUMNS

    @property
    def w13(self) -> MatrixLayout:
        """w1's layout, and w3's."""
        return MatrixLayout(
            self.intermediate_size, self.hidden_size, self.format, self.group_columns
        )

    @property
    def w2(self) -> MatrixLayout:
        return MatrixLayout(
            self.hidden_size, self.intermediate_size, self.format, self.group_columns
        )

    @property
    def w1_offset(self) -> int:
        return 0

    @property
    def w3_offset(self) -> int:
        return self.w13.nbytes

    @property
    def w2_offset(self) -> int:
        return round_up(2 * self.w13.nbytes, _MATRIX_ALIGN_BYTES)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the three matrices."""
        return 2 * self.w13.nbytes + self.w2.nbytes

    @property
    def stride_bytes(self) -> int:
        """Bytes from one record to the next in an arena and in a packed store: whole pages."""
        return round_up(self.w2_offset + self.w2.nbytes, PAGE_BYTES)


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a record on disk: `nbytes` of `file` from `file_offset` on."""

    file: Path
    file_offset: int
    nbytes: int
    record_offset: int
    """Where in the record they belong."""
