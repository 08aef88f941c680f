"""Which block size and how many reads at once suit this disk: found out on reads that are needed.

Buffer memory decides most (see `pages`); what is left depends on the disk and its driver, and small
blocks are better to cancel. Knows the reader; the preload calls it between experts.
"""

import statistics
from collections import deque

from moe_server.offload.reader import Reader

_SAMPLE_BYTES = 2**26
"""Shorter reads tell more of their first and last block than of the disk."""
_BLOCKS_BYTES = (2 * 2**20, 4 * 2**20, 8 * 2**20)
_DEPTHS = (2, 4, 8)
_AS_GOOD = 0.97
"""Of the best speed: among settings that reach it, the one with the fewest bytes in flight wins."""


class Calibration:
    """Tries settings in turn on whatever is read, and settles on one.

    Args:
        reader: Its block size and depth are changed; those it was made with bound the choice.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._default = (reader.block_bytes, reader.depth)
        depths = {min(depth, reader.depth) for depth in _DEPTHS}
        self._settings = deque(
            (block, depth)
            for block in _BLOCKS_BYTES
            for depth in sorted(depths)
            if block <= reader.block_bytes
        )
        self.samples: dict[tuple[int, int], list[float]] = {one: [] for one in self._settings}
        """Bytes per second by (block bytes, depth)."""
        self._start = reader.speed()
        self._current: tuple[int, int] | None = None

    def next(self) -> None:
        """Between two reads: takes in what the last brought and sets up the next."""
        if not self._settings:
            return
        nbytes, busy_s = self._reader.speed()
        read, seconds = nbytes - self._start[0], busy_s - self._start[1]
        if self._current is not None:
            if read < _SAMPLE_BYTES or seconds <= 0:
                return
            self.samples[self._current].append(read / seconds)
            self._settings.rotate(-1)
        self._start = nbytes, busy_s
        self._current = self._settings[0]
        self._set(self._current)

    def conclude(self) -> None:
        """Settles on the best setting; on the reader's own where there was too little to read."""
        self.next()
        speeds = {one: statistics.median(seen) for one, seen in self.samples.items() if seen}
        best = max(speeds.values(), default=0.0)
        good = [one for one, speed in speeds.items() if speed >= _AS_GOOD * best]
        enough = bool(speeds) and len(speeds) == len(self.samples)
        self._set(min(good, key=lambda one: (one[0] * one[1], one)) if enough else self._default)

    def _set(self, setting: tuple[int, int]) -> None:
        self._reader.block_bytes, self._reader.depth = setting
