"""The expert cache: which expert is in which device slot or host record, and how misses get there.

Three exclusive tiers: device slots, host records, disk. `acquire` is the whole interface of a
layer: it yields what is at hand first and misses while they arrive, so that they can be computed
from the front. An expert in host memory is computed where it is or changes places with one on the
device, whichever `cost` expects to take less time; one that is on disk is read straight into its
slot where the device is RAM. What a full device evicts moves to the host tier if that pays and is
forgotten otherwise: weights are read-only, disk always has them. `predict` names what the next
layer will probably want: it is read when the disk has nothing better to do.

Used by the engine's one thread; only the reader's threads work beside it. Knows slots and bytes,
not what is computed with them. (The form of the caller's loop, hits first and then misses as they
arrive, is that of dvmazur/mixtral-offloading.)
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_server.errors import MoeServerError
from moe_server.offload.arena import Arena
from moe_server.offload.cost import CostModel
from moe_server.offload.counters import CacheCounters
from moe_server.offload.fetches import Fetch, Fetches
from moe_server.offload.lasting import LastingMemory
from moe_server.offload.layout import ExpertId, Segment
from moe_server.offload.policy import DEFAULT_POLICY
from moe_server.offload.reader import Priority, Reader
from moe_server.offload.tiers import Tiers
from moe_server.offload.uses import Uses

if TYPE_CHECKING:
    import torch

_DISK_SAMPLE_BYTES = 2**24
"""Reads that tell something about the disk's speed."""

MOST_UNDER_WAY = 2
"""Demand reads at once. One keeps the disk busy with its blocks, the next begins when the disk
would run out of them (`_runs_dry`): a read that begins earlier brings nothing sooner, and its place
is taken from an expert. Replayed with 4 layers in batches of 8, starting all at once reads 22 %
more."""

_LOOK_MEMORY = 0.9
"""How much of the longest time between two looks at the disk is left at the next look."""

_POLL_S = 0.01
"""How often a wait for the disk looks whether anybody still wants what it waits for."""


@dataclass(slots=True)
class Held:
    """An expert that is the caller's until it asks `acquire` for the next one."""

    expert: int
    memory: "torch.Tensor"
    """Its record, uint8 (stride_bytes,): compute where this is."""
    arrivals: Iterator[int]
    """How many of the record's first bytes are there, growing; ends when all are, or with
    `dropped`."""
    slot: int | None = None
    """The device slot that it is in; None: it is computed in host memory."""
    dropped: bool = False
    """True once it is known that not all of it will come: nobody wants it any more, or `error`."""
    error: MoeServerError | None = None
    """Why it could not be read."""

    @property
    def in_host(self) -> bool:
        """True where it is computed in host memory."""
        return self.slot is None


def _always(_expert: int) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class _Still:
    """What one `acquire` has still to yield, and who wants it."""

    num_rows: Mapping[ExpertId, int]
    wanted: Callable[[int], bool]
    host_hits: deque[ExpertId]
    missing: deque[ExpertId]
    under_way: list[Fetch]

    def to_come(self) -> bool:
        return bool(self.host_hits or self.missing or self.under_way)


class ExpertCache:
    """Expert weights across the tiers.

    Args:
        records: Where each expert's record is on disk.
        num_layers: Layers of the model.
        num_slots: Device slots, at least 1.
        num_records: Host records; 0 for no host tier.
        num_staging: Pinned records that reads pass through to a GPU; 0 on a CPU.
        stride_bytes: Bytes of a slot and of a record.
        device: Where slots are: "cpu" or "cuda".
        reader: Reads records; stays the caller's.
        policy: Who is evicted, in both tiers: a name of `offload.policy`.
        cost: Prices; by default those of a machine nothing is known of.
        allow_pageable: Go on where host memory cannot be pinned.
        lasting: Memory that outlives this process, for what is in RAM.
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
        device: str,
        reader: Reader,
        policy: str = DEFAULT_POLICY,
        cost: CostModel | None = None,
        allow_pageable: bool = False,
        lasting: LastingMemory | None = None,
    ) -> None:
        self.counters = CacheCounters()
        self.tiers = Tiers(
            num_layers=num_layers,
            num_slots=num_slots,
            num_records=num_records,
            stride_bytes=stride_bytes,
            device=device,
            policy=policy,
            cost=cost or CostModel(shared_memory=device == "cpu"),
            allow_pageable=allow_pageable,
            lasting=lasting,
        )
        self._reader = reader
        self._stride_bytes = stride_bytes
        on_gpu = device != "cpu"
        assert not records or bool(num_staging) == on_gpu
        staging = Arena(num_staging, stride_bytes, pinned=on_gpu, allow_pageable=allow_pageable)
        self._fetches = Fetches(records, self.tiers, reader, self.counters, staging)
        self._coming = self._fetches.coming
        self._on_device, self._in_host = self.tiers.on_device, self.tiers.in_host
        self._in_use = self.tiers.in_use
        """Wanted by the layer that is being computed, and not computed yet."""
        self._predicted: deque[ExpertId] = deque()
        """What is still to be prefetched, the likeliest first."""
        self._soon: frozenset[ExpertId] = frozenset()
        """All that was predicted: not to be evicted for something that is wanted later."""
        self._between_s = 0.0
        self._layer_ended = 0.0
        self._looked = 0.0
        self._look_s = 0.0
        """The longest time between two looks at the disk, older ones counting less."""
        self._disk_seen = (0, 0.0)

    def acquire(
        self,
        layer: int,
        experts: Sequence[int],
        rows: Sequence[int] | None = None,
        still_wanted: Callable[[int], bool] = _always,
    ) -> Generator[Held, None, None]:
        """Yields every expert of `experts` once, those at hand first.

        Misses are being read from disk meanwhile and are yielded as they arrive. One that cannot be
        read says so in its `Held`; the others come all the same. Close the generator to give up:
        reads that were only for it are cancelled.

        Args:
            layer: The layer they belong to.
            experts: Distinct expert numbers.
            rows: How many rows each of them will compute; one each if None.
            still_wanted: Asked, while the disk is being waited for, whether an expert's result is
                still of use; the read of one that is not is cancelled. A no is for good.

        Raises:
            MoeServerError: An expert whose arrivals the caller did not see to their end could not
                be read. The cache stays consistent and usable.
        """
        wanted = [ExpertId(layer, expert) for expert in experts]
        num_rows = dict(zip(wanted, rows or [1] * len(wanted), strict=True))
        self._layer_begins()
        self._settle(layer, num_rows)
        hits = [expert for expert in wanted if expert in self._on_device.places]
        host_hits = [expert for expert in wanted if expert in self._in_host.places]
        under_way = [self._claim(expert) for expert in wanted if expert in self._coming]
        known = {*hits, *host_hits, *(fetch.expert for fetch in under_way)}
        missing = [expert for expert in wanted if expert not in known]
        still = _Still(num_rows, still_wanted, deque(host_hits), deque(missing), under_way)
        self._in_use.update(wanted)
        self.counters.device_hits += len(hits)
        self.counters.host_hits += len(host_hits)
        self.counters.disk_reads += len(missing) + len(under_way)
        for expert in hits:
            self._on_device.policy.touch(expert)
        self.tiers.regret(missing)
        try:
            self._looked = time.perf_counter()
            self._keep_reading(still)
            for expert in hits:
                yield self._held(expert, self._on_device.places[expert])
                self._done_with(expert, still)
            while still.to_come():
                yield from self._bring_from_host(still)
                yield from self._drop_unwanted(still)
                self._keep_reading(still)
                if still.under_way:
                    yield from self._take_arriving(still)
                elif still.to_come():
                    self._await_a_place(still)
        finally:
            self._in_use.clear()
            self._fetches.abandon(under_way)
            self._layer_ended = time.perf_counter()

    def predict(self, layer: int, experts: Iterable[int]) -> None:
        """Names what a later layer will probably want, the likeliest first.

        They are read behind all demand reads, within a budget of what the disk brings between two
        layers, and only into places of experts that are neither in use nor named here.
        """
        self._predicted = deque(ExpertId(layer, expert) for expert in experts)
        self._soon = frozenset(self._predicted)

    def fill(self, experts: Iterable[ExpertId], *, spare_slots: int = 0) -> None:
        """Begins to read experts into free places that reads can reach; does not wait.

        Args:
            experts: In order of preference; those that find no place are left out.
            spare_slots: Device slots to be left free.
        """
        device = () if self._fetches.need_staging else ((self._on_device, spare_slots),)
        tiers = (*device, (self._in_host, 0))
        for expert in experts:
            if self.is_near(expert):
                continue
            tier = next((tier for tier, spare in tiers if len(tier.free) > spare), None)
            if tier is None:
                return
            self._coming[expert] = self._fetches.start(
                expert, tier, tier.free.pop(), Priority.PRELOAD
            )

    def is_near(self, expert: ExpertId) -> bool:
        """True where an expert is in memory or on its way there."""
        return self.is_held(expert) or self.is_coming(expert)

    def is_held(self, expert: ExpertId) -> bool:
        """True where all of an expert is in memory."""
        return expert in self._on_device.places or expert in self._in_host.places

    def is_coming(self, expert: ExpertId) -> bool:
        """True where an expert is on its way and nobody has waited for it yet."""
        return expert in self._coming

    def fetch_behind(
        self,
        expert: ExpertId,
        keep: AbstractSet[ExpertId],
        share: Callable[[ExpertId], float],
    ) -> Fetch | None:
        """Begins to read an expert behind all other reads, in a place that reads can reach.

        Args:
            expert: It is not near.
            keep: Not to be evicted for it.
            share: Of its layer's visits, those that wanted an expert. Of the same layer the least
                wanted gives way, if less than this one; without any, that of all layers. (Policies
                follow the last visits, and would keep what those wanted.)

        Returns:
            None where there is no place for it.
        """
        self._fetches.collect_left()
        only_host = self._fetches.need_staging and self.tiers.host.count
        if self._fetches.lack_staging and not only_host:
            return None
        tiers = (self._in_host,) if only_host else (self._on_device, self._in_host)
        tier = next((tier for tier in tiers if tier.free), None)
        if tier is None:
            keep = keep | self._in_use | self._soon
            others = [one for tier in tiers for one in tier.places if one not in keep]
            of_layer = [one for one in others if one.layer == expert.layer]
            victim = min(of_layer or others, key=share, default=expert)
            if victim.layer == expert.layer and share(victim) >= share(expert):
                return None
            tier, place = self.tiers.forget(victim)
        else:
            place = tier.free.pop()
        fetch = self._fetches.start(expert, tier, place, Priority.BACKGROUND)
        self._coming[expert] = fetch
        return fetch

    def take_in(self) -> None:
        """Enters what has come without a prediction; gives up what could not be read."""
        self._fetches.collect_left()
        for fetch in list(self._coming.values()):
            if fetch.ticket.error:
                self.give_up(fetch.expert)
            elif fetch.ticket.complete and not fetch.predicted:
                self._fetches.finish(self._coming.pop(fetch.expert), used=False)

    def give_up(self, expert: ExpertId) -> None:
        """Cancels the read of an expert that is coming."""
        self._fetches.give_up(self._coming.pop(expert))

    def forget(self, expert: ExpertId) -> None:
        """Frees the place of an expert that is in memory and not in use."""
        tier, place = self.tiers.forget(expert)
        tier.free.append(place)

    def expect(self, uses: Uses) -> None:
        """Tells the policies what was seen before."""
        for layer, shares in enumerate(uses.shares()):
            for tier in (self._on_device, self._in_host):
                tier.policy.expect(layer, shares)

    @property
    def coming_bytes(self) -> int:
        """Bytes of the places that reads were begun for and nobody has waited for yet."""
        return len(self._coming) * self._stride_bytes

    def wait_filled(
        self,
        progress: Callable[[int], None],
        arrived: Callable[[ExpertId], None] = lambda _expert: None,
    ) -> None:
        """Blocks until everything that `fill` began has arrived.

        Args:
            progress: Called with the bytes that arrived so far, now and then.
            arrived: Called with each expert when it is there; may acquire it.

        Raises:
            MoeServerError: A read failed.
        """
        begun = list(self._coming.values())
        for number, fetch in enumerate(begun):
            fetch.ticket.wait()
            if self._coming.pop(fetch.expert, None) is not None:  # else acquiring took it in
                self._fetches.finish(fetch, used=False)
            arrived(fetch.expert)
            progress((number + 1) * self._stride_bytes)

    def close(self) -> None:
        """Gives up what is under way; nothing is asked of the cache afterwards."""
        for fetch in self._coming.values():
            fetch.ticket.cancel()

    def check_integrity(self) -> None:
        """Asserts what must hold between steps; for tests and idle moments."""
        self._fetches.check_integrity()
        near = self._on_device.places.keys() | self._in_host.places.keys()
        assert not self._coming.keys() & near, "in memory and on its way"

    # Yielding

    def _held(self, expert: ExpertId, slot: int | None) -> Held:
        tier = self._in_host if slot is None else self._on_device
        memory = self.tiers.memory(tier, tier.places[expert])
        return Held(expert.expert, memory, iter((self._stride_bytes,)), slot)

    def _bring_from_host(self, still: _Still) -> Iterator[Held]:
        """Yields the experts in host memory for which there is a place to be computed in."""
        for _ in range(len(still.host_hits)):
            expert = still.host_hits.popleft()
            self._fetches.collect_left()
            slot = self.tiers.bring_from_host(expert, still.num_rows[expert])
            if slot is None and not self.tiers.cost.computes_in_place:
                still.host_hits.append(expert)  # all slots are being read into
                continue
            yield self._held(expert, slot)
            self._done_with(expert, still)

    def _drop_unwanted(self, still: _Still) -> Iterator[Held]:
        """Yields the missing experts that nobody wants any more."""
        for expert in [one for one in still.missing if not still.wanted(one.expert)]:
            still.missing.remove(expert)
            self._in_use.discard(expert)
            memory = self.tiers.memory(self._on_device, 0)
            yield Held(expert.expert, memory, iter(()), dropped=True)

    def _take_arriving(self, still: _Still) -> Iterator[Held]:
        """Yields the next expert that is on its way, while it arrives or when it is there."""
        fetch = _first_done(still.under_way)
        held = self._held_while_arriving(fetch, still)
        if fetch.tier is self._in_host and not self.tiers.cost.computes_in_place:
            for _ in held.arrivals:
                pass
            if not held.dropped:
                still.under_way.remove(fetch)
                self._fetches.finish(fetch)
                still.host_hits.append(fetch.expert)
                return
        yield held
        still.under_way.remove(fetch)
        if held.dropped:
            # No prefetch either: those who would want it may be gone.
            self._fetches.abandon([fetch])
            self._in_use.discard(fetch.expert)
        else:
            self._fetches.finish(fetch)
            self._done_with(fetch.expert, still)

    def _await_a_place(self, still: _Still) -> None:
        """Nothing can be read or brought: predictions and reads that were given up hold places."""
        if still.host_hits:
            self._displace()
        if self._fetches.leaving:
            self._fetches.await_one_that_leaves()

    def _held_while_arriving(self, fetch: Fetch, still: _Still) -> Held:
        is_in_host = fetch.staging is not None or fetch.tier is self._in_host
        slot = None if is_in_host else fetch.place
        held = Held(fetch.expert.expert, self._fetches.memory(fetch), iter(()), slot)
        held.arrivals = self._arrivals(fetch, held, still)
        if fetch.staging is not None:
            self._take_from_staging(fetch, held, still.num_rows[fetch.expert])
        return held

    def _take_from_staging(self, fetch: Fetch, held: Held, rows: int) -> None:
        """On a GPU the record is copied from its staging memory, or computed there."""
        for _ in held.arrivals:
            pass
        if not held.dropped:
            held.arrivals = iter((self._stride_bytes,))
            # It goes to its slot in any case; whether the rows wait for that is a matter of cost.
            if self.tiers.cost.copy_pays(rows, self._stride_bytes):
                self._fetches.copy_to_place(fetch)
                held.memory = self._fetches.memory(fetch)
                held.slot = fetch.place

    def _arrivals(self, fetch: Fetch, held: Held, still: _Still) -> Iterator[int]:
        arrived = now = 0
        ticket = fetch.ticket
        while not ticket.complete or arrived < ticket.arrived_bytes:
            started = time.perf_counter()
            try:
                now = ticket.wait_beyond(arrived, _POLL_S)
            except MoeServerError as error:
                held.error = error
            self.counters.read_s += time.perf_counter() - started
            for other in still.under_way:
                if other is not fetch and not still.wanted(other.expert.expert):
                    other.ticket.cancel()
            if not still.wanted(held.expert):
                held.error = None  # if there is one, it is nobody's
                held.dropped = True
            held.dropped = held.dropped or held.error is not None
            if held.dropped:
                return
            self._keep_reading(still)
            if now > arrived:
                arrived = now
                yield arrived

    def _done_with(self, expert: ExpertId, still: _Still) -> None:
        """The caller has computed `expert`: its place may be given to another."""
        self._in_use.discard(expert)
        self._keep_reading(still)

    # From disk

    def _keep_reading(self, still: _Still) -> None:
        """A look at the disk: gives it something to read if it would run out of that."""
        now = time.perf_counter()
        self._look_s = max(now - self._looked, self._look_s * _LOOK_MEMORY)
        self._looked = now
        self._start_fetches(still.missing, still.under_way)
        if not still.missing and self._runs_dry(still.under_way):
            self._prefetch()

    def _runs_dry(self, under_way: Sequence[Fetch]) -> bool:
        """True where the disk will have begun all of these reads before the next look at it."""
        queued_bytes = sum(fetch.ticket.queued_bytes for fetch in under_way)
        return queued_bytes <= (self.tiers.cost.disk.bytes_per_s or 0.0) * self._look_s

    def _start_fetches(self, missing: deque[ExpertId], under_way: list[Fetch]) -> None:
        """Starts fetching `missing`, in order, as the disk needs work and there are places."""
        while missing and len(under_way) < MOST_UNDER_WAY and self._runs_dry(under_way):
            self._fetches.collect_left()
            if self._fetches.lack_staging:
                if under_way:
                    return
                self._displace()
                if self._fetches.lack_staging:
                    return
            place = self._make_room(missing[0])
            if place is None:
                return
            expert = missing.popleft()
            under_way.append(self._fetches.start(expert, self._on_device, place, Priority.DEMAND))

    def _make_room(self, incoming: ExpertId) -> int | None:
        """A slot for an expert that is wanted now, by eviction if need be; None: all are in use."""
        place = self._slot_for(incoming, keep=self._in_use | self._soon)
        if place is None:
            place = self._slot_for(incoming, keep=self._in_use)
        if place is None:
            self._displace()
            place = self._on_device.free.pop() if self._on_device.free else None
        return place

    def _slot_for(self, incoming: ExpertId, keep: AbstractSet[ExpertId]) -> int | None:
        """A free slot, or that of the expert that the policy gives up; None: all are in `keep`."""
        if self._on_device.free:
            return self._on_device.free.pop()
        victim = self._on_device.policy.victim(incoming, keep=keep)
        return None if victim is None else self.tiers.evict(victim)

    def _displace(self) -> None:
        """What comes without being wanted yet gives way: the last first, predictions before all.

        One at a time: it may be a block's time before its place is free.
        """
        coming = [fetch for fetch in self._coming.values() if fetch.tier is self._on_device]
        if coming and not any(fetch.tier is self._on_device for fetch in self._fetches.leaving):
            last = max(reversed(coming), key=lambda fetch: fetch.predicted)
            self._fetches.give_up(self._coming.pop(last.expert))
            self._fetches.collect_left()

    # Ahead of the need

    def _settle(self, layer: int, wanted: Mapping[ExpertId, int]) -> None:
        """Takes in what has come; gives up what was predicted for this layer and is not wanted."""
        self._fetches.collect_left()
        self._predicted = deque(expert for expert in self._predicted if expert.layer != layer)
        self._soon = frozenset(expert for expert in self._soon if expert.layer != layer)
        for fetch in list(self._coming.values()):
            if fetch.ticket.error or (fetch.ticket.done and not fetch.ticket.complete):
                # It failed. Who wants it now is owed a read of its own.
                self._fetches.give_up(self._coming.pop(fetch.expert))
            elif fetch.expert in wanted:
                continue
            elif fetch.ticket.complete:
                self._fetches.finish(self._coming.pop(fetch.expert), used=False)
            elif fetch.predicted and fetch.expert.layer == layer:
                self._fetches.give_up(self._coming.pop(fetch.expert))

    def _claim(self, expert: ExpertId) -> Fetch:
        """A prefetch that turns out to be wanted."""
        fetch = self._coming.pop(expert)
        self.counters.prefetch_hits += fetch.predicted
        fetch.ticket.promote()
        return fetch

    def _prefetch(self) -> None:
        """Begins reading what is predicted, within the budget."""
        while self._predicted and self._may_prefetch():
            expert = self._predicted[0]
            if not self.is_near(expert):
                self._fetches.collect_left()
                place = self._slot_for(expert, keep=self._in_use | self._soon)
                if place is None:
                    return
                fetch = self._fetches.start(expert, self._on_device, place, Priority.PREFETCH)
                fetch.predicted = True
                self._coming[expert] = fetch
                self.counters.prefetches += 1
            self._predicted.popleft()

    def _may_prefetch(self) -> bool:
        """Byte budget: what the disk brings between two layers, and one record at least.

        More would bring no byte sooner, and takes places of experts that are wanted again: with 8
        of 32 experts held, batches of 8 read 22 % more where a whole layer's time was filled.
        """
        if self._fetches.lack_staging:
            return False
        under_way = sum(fetch.predicted for fetch in self._coming.values())
        disk = self.tiers.cost.disk.bytes_per_s or 0.0
        return under_way < max(1, round(disk * self._between_s / self._stride_bytes))

    def _layer_begins(self) -> None:
        """Takes the time since the last layer ended, and the disk's speed."""
        if self._layer_ended:
            # Idle time between steps is none of a layer's.
            between_s = min(time.perf_counter() - self._layer_ended, 1.0)
            self._between_s += 0.1 * (between_s - self._between_s)
        nbytes, busy_s = self._reader.speed()
        if nbytes - self._disk_seen[0] >= _DISK_SAMPLE_BYTES:
            self.tiers.cost.disk.observe(nbytes - self._disk_seen[0], busy_s - self._disk_seen[1])
            self._disk_seen = (nbytes, busy_s)


def _first_done(under_way: Sequence[Fetch]) -> Fetch:
    """The first fetch that has arrived, else the oldest: reads are served in order."""
    return next((fetch for fetch in under_way if fetch.ticket.complete), under_way[0])
