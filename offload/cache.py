"""The expert cache: which expert is in which device slot or host record, and how misses get there.

Three exclusive tiers: device slots, host records, disk. `acquire` is the whole interface of a
layer: it yields resident experts first and misses as they arrive, in waves when there are more of
them than slots. A miss that is in host memory changes places with the expert whose slot it gets;
any other is read from disk, straight into its slot where the device is RAM, and the expert whose
slot it gets moves to the host tier if there is one. What the last tier evicts is forgotten: weights
are read-only, disk always has them.

Used by the engine's one thread; only the reader's threads work beside it. Knows slots and bytes,
not what is computed with them. (The form of the caller's loop, hits first and then misses as they
arrive, is that of dvmazur/mixtral-offloading.)
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import torch

from moe_server.errors import MoeServerError
from moe_server.offload.arena import Arena
from moe_server.offload.layout import ExpertId, Segment
from moe_server.offload.policy import LayerLru
from moe_server.offload.reader import Reader, ReadTicket

_EXCHANGE_BYTES = 4 * 2**20
"""What an exchange of two experts sets aside at a time: near the caches, long enough for a link."""


@dataclass(slots=True)
class CacheCounters:
    """What `acquire` found and what it cost, since the start. Times are waits, in seconds."""

    device_hits: int = 0
    host_hits: int = 0
    disk_reads: int = 0
    transfer_bytes: int = 0
    """Host to device."""
    read_bytes: int = 0
    transfer_s: float = 0.0
    """Spent moving experts between host memory and the device."""
    read_s: float = 0.0
    """Spent waiting for the disk."""


@dataclass(slots=True)
class _Fetch:
    """An expert on its way to its slot."""

    expert: ExpertId
    slot: int
    ticket: ReadTicket | None = None
    """The read from disk; None: it came from host memory and is there."""
    staging: int | None = None
    """The pinned record that the read goes through, where slots are out of its reach."""


@dataclass(slots=True)
class _Tier:
    """One tier's bookkeeping: who is where, and which places are free."""

    policy: LayerLru
    places: dict[ExpertId, int] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)

    def put(self, expert: ExpertId, place: int) -> None:
        self.places[expert] = place
        self.policy.add(expert)

    def drop(self, expert: ExpertId) -> int:
        """Forgets `expert`; the place it had is the caller's."""
        self.policy.remove(expert)
        return self.places.pop(expert)


class ExpertCache:
    """Expert weights across the tiers.

    Args:
        records: Where each expert's record is on disk.
        num_layers: Layers of the model.
        num_slots: Device slots, at least 1.
        num_records: Host records; 0 for no host tier.
        num_staging: Pinned records that reads pass through to a GPU; 0 on a CPU.
        stride_bytes: Bytes of a slot and of a record.
        device: Where slots are.
        reader: Reads records; stays the caller's.
    """

    def __init__(
        self,
        records: Mapping[ExpertId, Sequence[Segment]],
        *,
        num_layers: int,
        num_slots: int,
        num_records: int,
        num_staging: int,
        stride_bytes: int,
        device: torch.device,
        reader: Reader,
    ) -> None:
        self.counters = CacheCounters()
        self._records = records
        self._reader = reader
        self._stride_bytes = stride_bytes
        self._num_slots = num_slots
        on_gpu = device.type != "cpu"
        assert bool(num_staging) == on_gpu
        self._host = Arena(num_records, stride_bytes, pinned=on_gpu)
        self._staging = Arena(num_staging, stride_bytes, pinned=True) if on_gpu else None
        self._free_staging = list(range(num_staging))
        self._slots: Arena | torch.Tensor = (
            torch.empty(num_slots, stride_bytes, dtype=torch.uint8, device=device)
            if on_gpu
            else Arena(num_slots, stride_bytes)
        )
        self._on_device = _Tier(LayerLru(num_slots, num_layers), free=list(range(num_slots))[::-1])
        self._in_host = _Tier(
            LayerLru(num_records, num_layers), free=list(range(num_records))[::-1]
        )
        self._in_use: set[ExpertId] = set()
        self._wanted: AbstractSet[ExpertId] = frozenset()

    def slot(self, index: int) -> torch.Tensor:
        """The record in slot `index`: uint8, shape (stride_bytes,), a view."""
        return self._slots[index]

    def acquire(self, layer: int, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """Yields groups of (expert, slot) until every expert of `experts` was in one group.

        Resident experts come first, in one group, while misses are already being read from disk
        (those in host memory are copied before: the copy is this thread's work). The slots of a
        group are the caller's until it asks for the next one. Close the generator to give up:
        reads that were only for it are cancelled.

        Args:
            layer: The layer they belong to.
            experts: Distinct expert numbers.

        Raises:
            MoeServerError: An expert could not be read. The cache stays consistent and usable.
        """
        wanted = [ExpertId(layer, expert) for expert in experts]
        self._wanted = frozenset(wanted)
        hits = [expert for expert in wanted if expert in self._on_device.places]
        missing = deque(expert for expert in wanted if expert not in self._on_device.places)
        self.counters.device_hits += len(hits)
        for expert in hits:
            self._on_device.policy.touch(expert)
        self._in_use.update(hits)
        under_way: list[_Fetch] = []
        try:
            if hits:
                self._start_fetches(missing, under_way)
                yield [(expert.expert, self._on_device.places[expert]) for expert in hits]
                self._in_use.difference_update(hits)
            while missing or under_way:
                self._start_fetches(missing, under_way)
                fetch = _first_done(under_way)
                under_way.remove(fetch)
                self._finish_fetch(fetch)
                self._in_use.add(fetch.expert)
                yield [(fetch.expert.expert, fetch.slot)]
                self._in_use.discard(fetch.expert)
        finally:
            self._in_use.clear()
            self._wanted = frozenset()
            self._abandon(under_way)

    def resident_bytes(self) -> tuple[int, int]:
        """Bytes of the records held on the device and in host memory."""
        return (
            len(self._on_device.places) * self._stride_bytes,
            len(self._in_host.places) * self._stride_bytes,
        )

    def check_integrity(self) -> None:
        """Asserts what must hold between steps; for tests and idle moments."""
        for tier, count in ((self._on_device, self._num_slots), (self._in_host, self._host.count)):
            places = [*tier.places.values(), *tier.free]
            assert sorted(places) == list(range(count)), f"places of {count}: {sorted(places)}"
            assert len(tier.policy) == len(tier.places), "policy and places disagree"
            assert all(expert in tier.policy for expert in tier.places), (
                "policy and places disagree"
            )
        twice = self._on_device.places.keys() & self._in_host.places.keys()
        assert not twice, f"in two tiers: {twice}"
        assert not self._in_use, f"still in use: {self._in_use}"
        staging = self._staging.count if self._staging else 0
        assert len(self._free_staging) == staging, "a staging record is lost"

    def _start_fetches(self, missing: deque[ExpertId], under_way: list[_Fetch]) -> None:
        """Starts fetching as many of `missing`, in order, as there are places for."""
        while missing and (self._staging is None or self._free_staging):
            fetch = self._start_fetch(missing[0])
            if fetch is None:
                return
            missing.popleft()
            under_way.append(fetch)

    def _start_fetch(self, expert: ExpertId) -> _Fetch | None:
        """Gives `expert` a slot, by eviction if need be; None while all slots are in use."""
        evicted = None
        if self._on_device.free:
            slot = self._on_device.free.pop()
        else:
            evicted = self._on_device.policy.victim(expert, keep=self._in_use)
            if evicted is None:
                return None
            slot = self._on_device.drop(evicted)
        if expert in self._in_host.places:
            self._promote(expert, slot, evicted)
            return _Fetch(expert, slot)
        if evicted is not None:
            self._demote(evicted, slot)
        staging = None if self._staging is None else self._free_staging.pop()
        target = self.slot(slot) if self._staging is None else self._staging[staging or 0]
        ticket = self._reader.submit(self._records[expert], target.data_ptr())
        self.counters.disk_reads += 1
        self.counters.read_bytes += sum(part.nbytes for part in self._records[expert])
        return _Fetch(expert, slot, ticket, staging)

    def _finish_fetch(self, fetch: _Fetch) -> None:
        """Waits for a fetch and enters the expert; on failure its places are free again."""
        if fetch.ticket is not None:
            started = time.perf_counter()
            try:
                fetch.ticket.wait()
            except MoeServerError:
                self._release(fetch)
                raise
            finally:
                self.counters.read_s += time.perf_counter() - started
        if fetch.staging is not None:
            assert self._staging is not None
            self._copy(self._staging[fetch.staging], self.slot(fetch.slot))
            self._free_staging.append(fetch.staging)
        self._on_device.put(fetch.expert, fetch.slot)

    def _abandon(self, under_way: Sequence[_Fetch]) -> None:
        """Gives up fetches that nobody waits for; keeps what had arrived."""
        for fetch in under_way:
            if fetch.ticket is not None:
                fetch.ticket.cancel()
        for fetch in under_way:
            with contextlib.suppress(MoeServerError):
                self._finish_fetch(fetch)

    def _release(self, fetch: _Fetch) -> None:
        self._on_device.free.append(fetch.slot)
        if fetch.staging is not None:
            self._free_staging.append(fetch.staging)

    def _promote(self, expert: ExpertId, slot: int, evicted: ExpertId | None) -> None:
        """Host record -> slot; what was in the slot takes the record, as tiers are exclusive."""
        record = self._in_host.drop(expert)
        if evicted is None:
            self._copy(self._host[record], self.slot(slot))
            self._in_host.free.append(record)
        else:
            self._exchange(self._host[record], self.slot(slot))
            self._in_host.put(evicted, record)
        self.counters.host_hits += 1

    def _demote(self, expert: ExpertId, slot: int) -> None:
        """Slot -> host record, if the host tier has one to spare; else the expert is forgotten."""
        if not self._in_host.free:
            evicted = self._in_host.policy.victim(expert, keep=self._wanted)
            if evicted is None:
                return
            self._in_host.free.append(self._in_host.drop(evicted))
        record = self._in_host.free.pop()
        self._copy(self.slot(slot), self._host[record], counted=False)
        self._in_host.put(expert, record)

    def _copy(self, source: torch.Tensor, target: torch.Tensor, *, counted: bool = True) -> None:
        started = time.perf_counter()
        target.copy_(source)  # blocks on CUDA too: both sides may be reused as soon as it returns
        self.counters.transfer_s += time.perf_counter() - started
        self.counters.transfer_bytes += self._stride_bytes if counted else 0

    def _exchange(self, record: torch.Tensor, slot: torch.Tensor) -> None:
        """Swaps two experts, piece by piece: a full host tier has no record to set one aside."""
        started = time.perf_counter()
        for start in range(0, self._stride_bytes, _EXCHANGE_BYTES):
            piece = slice(start, start + _EXCHANGE_BYTES)
            aside = slot[piece].clone()
            slot[piece].copy_(record[piece])
            record[piece].copy_(aside)
        self.counters.transfer_s += time.perf_counter() - started
        self.counters.transfer_bytes += self._stride_bytes


def _first_done(under_way: Sequence[_Fetch]) -> _Fetch:
    """The first fetch that has arrived, else the oldest: reads are served in order."""
    return next(
        (fetch for fetch in under_way if fetch.ticket is None or fetch.ticket.done), under_way[0]
    )
