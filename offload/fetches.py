"""Reads of experts: from disk to a place in a tier, to a GPU through staging memory.

A place belongs to the reader's threads until they are done with it, also when nobody wants what
they bring: what was given up keeps its place for that long. Knows places and bytes; which expert is
worth one is `cache`'s business. Used by the engine's one thread.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_server.errors import MoeServerError
from moe_server.offload.arena import Arena
from moe_server.offload.counters import CacheCounters
from moe_server.offload.layout import ExpertId, Segment
from moe_server.offload.reader import Priority, Reader, ReadTicket
from moe_server.offload.tiers import Tier, Tiers

if TYPE_CHECKING:
    import torch

_LEAVE_S = 0.01
"""About the time of a block: how long a read that was given up is waited for at once."""


@dataclass(slots=True)
class Fetch:
    """An expert on its way from disk to its place."""

    expert: ExpertId
    tier: Tier
    place: int
    ticket: ReadTicket
    predicted: bool = False
    """True while only a prediction wants it."""
    staging: int | None = None
    """The pinned record that the read goes through, where slots are out of its reach."""


class Fetches:
    """What is on its way, and what it takes to get it there.

    Args:
        records: Where each expert's record is on disk.
        tiers: Where experts go.
        reader: Reads records.
        counters: Of the cache: bytes and cancellations are counted here.
        staging: Pinned records that reads to a GPU pass through; an arena of none on a CPU.
    """

    def __init__(
        self,
        records: Mapping[ExpertId, Sequence[Segment]],
        tiers: Tiers,
        reader: Reader,
        counters: CacheCounters,
        staging: Arena,
    ) -> None:
        self.coming: dict[ExpertId, Fetch] = {}
        """Reads that no `acquire` under way waits for: prefetches and what `fill` began."""
        self.leaving: list[Fetch] = []
        """Cancelled reads whose place a thread may still be writing to."""
        self._records = records
        self._tiers = tiers
        self._reader = reader
        self._counters = counters
        self._staging = staging
        self._free_staging = list(range(staging.count))

    @property
    def need_staging(self) -> bool:
        """True where reads do not reach device slots."""
        return self._staging.count > 0

    @property
    def lack_staging(self) -> bool:
        """True where the next read to the device would find no staging memory."""
        return self.need_staging and not self._free_staging

    def start(self, expert: ExpertId, tier: Tier, place: int, priority: Priority) -> Fetch:
        """Begins to read an expert into a place that is free; to the device, staging must be."""
        staging = None
        if tier is self._tiers.in_host:
            arena, index = self._tiers.host, place
        elif isinstance(self._tiers.slots, Arena):
            arena, index = self._tiers.slots, place
        else:
            staging = self._free_staging.pop()
            arena, index = self._staging, staging
        ticket = self._reader.submit(
            self._records[expert], arena.address(index), priority, owner=arena, touch=arena.touch
        )
        return Fetch(expert, tier, place, ticket, staging=staging)

    def memory(self, fetch: Fetch) -> "torch.Tensor":
        """The record that the read fills."""
        if fetch.staging is not None:
            return self._staging[fetch.staging]
        return self._tiers.memory(fetch.tier, fetch.place)

    def copy_to_place(self, fetch: Fetch) -> None:
        """Takes what has arrived in staging memory to its slot."""
        if fetch.staging is not None:
            slot = self._tiers.memory(fetch.tier, fetch.place)
            self._tiers.copy(self._staging[fetch.staging], slot)
            self._free_staging.append(fetch.staging)
            fetch.staging = None

    def finish(self, fetch: Fetch, *, used: bool = True) -> None:
        """Enters an expert that has arrived; on failure its places are free again.

        Raises:
            MoeServerError: It could not be read.
        """
        try:
            fetch.ticket.wait()
        except MoeServerError:
            self._free(fetch)
            raise
        self._counters.read_bytes += fetch.ticket.read_bytes
        self.copy_to_place(fetch)
        fetch.tier.put(fetch.expert, fetch.place, used=used)

    def give_up(self, fetch: Fetch) -> None:
        """Cancels a read; its place is free once no thread writes to it any more."""
        fetch.ticket.cancel()
        self._counters.cancelled += fetch.ticket.error is None
        self.leaving.append(fetch)

    def abandon(self, fetches: Sequence[Fetch]) -> None:
        """Gives up fetches that nobody waits for; keeps what had arrived."""
        for fetch in fetches:
            if fetch.ticket.complete:
                self.finish(fetch)
            else:
                self.give_up(fetch)

    def collect_left(self) -> None:
        """Takes back the places that no thread writes to any more."""
        for fetch in [one for one in self.leaving if one.ticket.done]:
            self.leaving.remove(fetch)
            self._free(fetch)

    def await_one_that_leaves(self) -> None:
        """Waits, not for long, for a read that was given up to leave its place."""
        with contextlib.suppress(MoeServerError):
            self.leaving[0].ticket.wait(_LEAVE_S)

    def check_integrity(self) -> None:
        """Asserts what must hold between steps."""
        under_way = [*self.coming.values(), *self.leaving]
        self._tiers.check_integrity((fetch.tier, fetch.place) for fetch in under_way)
        staged = [fetch.staging for fetch in under_way if fetch.staging is not None]
        assert len(self._free_staging) + len(staged) == self._staging.count, "staging is lost"

    def _free(self, fetch: Fetch) -> None:
        self._counters.read_bytes += fetch.ticket.read_bytes
        fetch.tier.free.append(fetch.place)
        if fetch.staging is not None:
            self._free_staging.append(fetch.staging)
