"""What the bytes of a file should be: checksums of its pieces, compared as they are read.

XXH3 (xxhash.com), 64 bits: it runs far faster than any disk, where CRC-32 of zlib would take half a
core. A piece is small, so that a damaged one is found before anything was computed with it and only
its neighbourhood is read again. Knows no threads; `reader` calls it on each block.
"""

from array import array
from collections.abc import Mapping
from pathlib import Path

import xxhash

PIECE_BYTES = 2 * 2**20
"""Bytes under one checksum; the last piece of a range is shorter. Blocks of reads are multiples."""


def checksums(content: memoryview, piece_bytes: int = PIECE_BYTES) -> list[int]:
    """The checksum of each piece of a range, in order."""
    return [
        xxhash.xxh3_64_intdigest(content[start : start + piece_bytes])
        for start in range(0, len(content), piece_bytes)
    ]


class ChecksumBook:
    """Known checksums, by file and the offset at which a piece begins.

    Args:
        known: From a packed store's manifest.
        learn: Take down the checksums of pieces that are not known when they are first read, so
            that later reads are held to them. It finds what changes under a running server in files
            that come without checksums.
        piece_bytes: Bytes of a piece.
    """

    def __init__(
        self,
        known: Mapping[tuple[Path, int], int] | None = None,
        *,
        learn: bool = False,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self.piece_bytes = piece_bytes
        self._known = dict(known or {})
        self._learn = learn

    @property
    def is_empty(self) -> bool:
        """True where there is nothing to compare with, ever."""
        return not self._known and not self._learn

    def mismatch(self, file: Path, offset: int, content: memoryview) -> int | None:
        """The offset of the first piece of `content` that is not as it should be.

        Args:
            file: Where it was read.
            offset: Where it begins in the file, which is where a piece begins.
            content: Whole pieces; the last one may be the range's shorter last.
        """
        for index, found in enumerate(checksums(content, self.piece_bytes)):
            start = offset + index * self.piece_bytes
            if self._learn:
                self._known.setdefault((file, start), found)
            if self._known.get((file, start), found) != found:
                return start
        return None


class RowChecksums:
    """Those of a matrix's blocks of rows, which are far smaller than a piece.

    Nobody wrote them down: they are taken from all of the matrix once, in order, while that is held
    to the checksums of its pieces.

    Args:
        offset: Where the matrix begins in its file.
        block_bytes: Of a block.
    """

    def __init__(self, offset: int, block_bytes: int) -> None:
        self._offset = offset
        self._block_bytes = block_bytes
        self._sums = array("Q")
        self._begun = xxhash.xxh3_64()
        self._begun_bytes = 0

    @property
    def is_empty(self) -> bool:
        """True where there is nothing to compare with, yet or ever."""
        return not self._sums

    def take(self, content: memoryview) -> None:
        """Goes on with the next bytes of the matrix."""
        while content:
            part = content[: self._block_bytes - self._begun_bytes]
            self._begun.update(part)
            self._begun_bytes += len(part)
            if self._begun_bytes == self._block_bytes:
                self._sums.append(self._begun.intdigest())
                self._begun.reset()
                self._begun_bytes = 0
            content = content[len(part) :]

    def mismatch(self, _file: Path, offset: int, content: memoryview) -> int | None:
        """`offset` where `content`, the block that begins there, is not as it was."""
        known = self._sums[(offset - self._offset) // self._block_bytes]
        return None if xxhash.xxh3_64_intdigest(content) == known else offset
