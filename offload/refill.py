"""Brings a live cache back to its hot set: what is not in memory is read behind all other reads.

`advance` it between steps. An expert takes a free place, or that of one that is outside the hot set
and colder; what the traffic wants meanwhile goes first, in reading and in places.

Knows the cache and how often experts were wanted; nothing of requests. The engine's one thread.
"""

from collections import deque
from collections.abc import Sequence

from moe_server.offload.cache import ExpertCache
from moe_server.offload.fetches import Fetch
from moe_server.offload.layout import ExpertId
from moe_server.offload.uses import Uses

_MOST_UNDER_WAY = 8
_MOST_BYTES = 2**26
"""Under way at once, but two records whatever their size: each takes a place before it is there."""


class Refill:
    """One refilling, until nothing is to be done any more.

    Args:
        cache: It is told to expect what the hot set says.
        uses: How often experts were wanted.
        hot: What is to be in memory, the hottest first.
        stride_bytes: Of a record.
    """

    def __init__(
        self, cache: ExpertCache, uses: Uses, hot: Sequence[ExpertId], stride_bytes: int
    ) -> None:
        cache.expect(uses)
        self._cache = cache
        self._uses = uses
        self._hot = frozenset(hot)
        self._missing = deque(expert for expert in hot if not cache.is_near(expert))
        self._under_way: list[Fetch] = []
        self._most = max(2, min(_MOST_UNDER_WAY, _MOST_BYTES // stride_bytes))
        self.num_total = len(self._missing)
        self.num_done = 0
        """Experts that are in memory now."""
        self.num_left_out = 0
        """Experts that no colder one could make room for, that had to give way, or that could not
        be read."""

    @property
    def is_done(self) -> bool:
        return not self._missing and not self._under_way

    def advance(self) -> None:
        """Takes in what has come and begins what is next; never waits for the disk."""
        self._cache.take_in()
        for fetch in self._under_way:
            if self._cache.is_held(fetch.expert):
                self.num_done += 1
            elif not self._cache.is_near(fetch.expert):
                self.num_left_out += 1
        self._under_way = [one for one in self._under_way if self._cache.is_coming(one.expert)]
        while self._missing and len(self._under_way) < self._most:
            self._begin(self._missing.popleft())

    def stop(self) -> None:
        """Gives up what is under way, unless a request wants it by now."""
        for fetch in self._under_way:
            if self._cache.is_coming(fetch.expert):
                self._cache.give_up(fetch.expert)
        self.num_left_out += len(self._under_way) + len(self._missing)
        self._under_way.clear()
        self._missing.clear()

    def _begin(self, expert: ExpertId) -> None:
        if self._cache.is_near(expert):
            self.num_done += 1
            return
        fetch = self._cache.fetch_behind(expert, keep=self._hot, share=self._uses.share)
        if fetch is None:
            self.num_left_out += 1
        else:
            self._under_way.append(fetch)
