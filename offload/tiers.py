"""The two tiers in memory: who is in which slot or host record, and how experts move between them.

Exclusive: an expert is on the device, in host memory, or neither. What the device evicts moves to
the host tier if that pays and is forgotten otherwise; what is wanted from host memory is computed
there or changes places with one on the device, whichever `cost` expects to take less time. Knows no
disk and no layers' wishes: `cache` reads into places that it gets here.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moe_server.offload.arena import Arena
from moe_server.offload.cost import CostModel
from moe_server.offload.lasting import LastingMemory, Ledger
from moe_server.offload.layout import ExpertId
from moe_server.offload.policy import TierPolicy, make_policy

if TYPE_CHECKING:
    import torch

_EXCHANGE_BYTES = 4 * 2**20
"""What an exchange of two experts sets aside at a time: near the caches, long enough for a link."""


@dataclass(slots=True)
class Tier:
    """One tier's bookkeeping: who is where, and which places are free."""

    policy: TierPolicy
    ledger: Ledger
    """The same as `places`, for the process that comes after this one."""
    places: dict[ExpertId, int] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)

    def put(self, expert: ExpertId, place: int, *, used: bool = True) -> None:
        """Enters an expert; not `used`: nobody has wanted it here yet."""
        self.places[expert] = place
        self.ledger.enter(place, expert)
        self.policy.add(expert, used=used)

    def drop(self, expert: ExpertId) -> int:
        """Forgets `expert`; the place it had is the caller's."""
        self.policy.remove(expert)
        place = self.places.pop(expert)
        self.ledger.strike(place)  # first: whoever gets the place may write to it
        return place


@dataclass(slots=True)
class MoveCounters:
    """What moving cost since the start."""

    transfer_bytes: int = 0
    """Host to device."""
    transfer_s: float = 0.0
    """Spent moving experts between host memory and the device, either way."""


class Tiers:
    """Device slots and host records.

    Args:
        num_layers: Layers of the model.
        num_slots: Device slots, at least 1.
        num_records: Host records; 0 for no host tier.
        stride_bytes: Bytes of a slot and of a record.
        device: Where slots are: "cpu" or "cuda".
        policy: Who is evicted, in both tiers: a name of `offload.policy`.
        cost: Prices.
        allow_pageable: Go on where host memory cannot be pinned.
        lasting: Memory that outlives this process, for what is in RAM.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_records: int,
        stride_bytes: int,
        device: str,
        policy: str,
        cost: CostModel,
        allow_pageable: bool,
        lasting: LastingMemory | None,
    ) -> None:
        self.cost = cost
        self.counters = MoveCounters()
        self.on_gpu = device != "cpu"
        self.slots: Arena | torch.Tensor = (
            _gpu_slots(num_slots, stride_bytes, device)
            if self.on_gpu
            else Arena(num_slots, stride_bytes, shared=lasting.slots if lasting else None)
        )
        self.host = Arena(
            num_records,
            stride_bytes,
            pinned=self.on_gpu,
            allow_pageable=allow_pageable,
            shared=lasting.records if lasting else None,
        )
        self.on_device = Tier(
            make_policy(policy, num_slots, num_layers),
            lasting.slots_ledger if lasting and not self.on_gpu else Ledger.private(num_slots),
            free=list(range(num_slots))[::-1],
        )
        self.in_host = Tier(
            make_policy(policy, num_records, num_layers),
            lasting.records_ledger if lasting else Ledger.private(num_records),
            free=list(range(num_records))[::-1],
        )
        self.in_use: set[ExpertId] = set()
        """Not to be evicted. The cache's."""
        self._num_slots = num_slots
        self._stride_bytes = stride_bytes
        self._demoted_unused: set[ExpertId] = set()
        self._forgotten: dict[ExpertId, None] = {}
        """As many as the host tier holds, the longest forgotten first: what became of them tells
        whether demoting would have paid, while nothing is demoted."""

    def adopt(self, is_intact: Callable[[ExpertId, int], bool]) -> int:
        """Takes over what the ledgers say an earlier process left; before anything else is here.

        Args:
            is_intact: Whether an expert of this model has its bytes at this address.

        Returns:
            How many experts were taken over.
        """
        for tier, arena in ((self.on_device, self.slots), (self.in_host, self.host)):
            for place, expert in tier.ledger.entries().items():
                is_known = expert in self.on_device.places or expert in self.in_host.places
                assert isinstance(arena, Arena), "memory of a GPU outlives no process"
                if is_known or not is_intact(expert, arena.address(place)):
                    tier.ledger.strike(place)
                else:
                    tier.free.remove(place)
                    tier.put(expert, place, used=False)
        return len(self.on_device.places) + len(self.in_host.places)

    def memory(self, tier: Tier, place: int) -> "torch.Tensor":
        """A place's record: uint8, shape (stride_bytes,), a view."""
        arena = self.slots if tier is self.on_device else self.host
        return arena[place]

    def slots_of(self, layer: int, experts: Iterable[int]) -> dict[int, int]:
        """The slots of those of a layer's experts that are on the device."""
        places = self.on_device.places
        slots = {expert: places.get(ExpertId(layer, expert)) for expert in experts}
        return {expert: slot for expert, slot in slots.items() if slot is not None}

    def bring_from_host(self, expert: ExpertId, rows: int) -> int | None:
        """Where to compute an expert of the host tier over `rows` rows.

        Returns:
            The slot that it is in now; None: it stays in host memory, as that takes less time or
            as there is no slot to be had now.
        """
        if expert in self._demoted_unused:
            self._demoted_unused.discard(expert)
            self.cost.observe_fate(used=True)
        if self.cost.copy_pays(rows, self._stride_bytes):
            slot = self._promote(expert)
            if slot is not None:
                self.cost.copied += 1
                return slot
        if self.cost.computes_in_place:
            self.cost.computed_in_place += 1
            self.in_host.policy.touch(expert)
        return None

    def evict(self, expert: ExpertId) -> int:
        """Takes an expert off the device: to the host tier if that pays, else it is forgotten.

        Returns:
            The slot, which is the caller's.
        """
        slot = self.on_device.drop(expert)
        if self.host.count and self.cost.demotion_pays(self._stride_bytes):
            self._demote(expert, slot)
        else:
            self._forget(expert)
        return slot

    def forget(self, expert: ExpertId) -> tuple[Tier, int]:
        """Takes an expert out of memory, whatever demoting it would have paid.

        Returns:
            The tier it was in, and its place there, which is the caller's.
        """
        tier = self.on_device if expert in self.on_device.places else self.in_host
        self._demoted_unused.discard(expert)
        return tier, tier.drop(expert)

    def regret(self, missing: Iterable[ExpertId]) -> None:
        """What is wanted again so soon would have been in the host tier still."""
        for expert in missing:
            if expert in self._forgotten:
                del self._forgotten[expert]
                self.cost.observe_fate(used=True)

    def copy(self, source: "torch.Tensor", target: "torch.Tensor", *, counted: bool = True) -> None:
        """Moves a record; `counted` where it goes to the device."""
        started = time.perf_counter()
        target.copy_(source)  # blocks on CUDA too: both sides may be reused as soon as it returns
        elapsed = time.perf_counter() - started
        self.counters.transfer_s += elapsed
        self.counters.transfer_bytes += self._stride_bytes if counted else 0
        self.cost.copy.observe(self._stride_bytes, elapsed)

    def check_integrity(self, coming: Iterator[tuple[Tier, int]]) -> None:
        """Asserts what must hold between steps.

        Args:
            coming: Places that reads under way have, with their tiers.
        """
        taken = list(coming)
        for tier, count in ((self.on_device, self._num_slots), (self.in_host, self.host.count)):
            on_their_way = [place for its_tier, place in taken if its_tier is tier]
            places = [*tier.places.values(), *tier.free, *on_their_way]
            assert sorted(places) == list(range(count)), f"places of {count}: {sorted(places)}"
            assert len(tier.policy) == len(tier.places), "policy and places disagree"
            assert tier.ledger.entries() == {
                place: expert for expert, place in tier.places.items()
            }, "ledger and places disagree"
            assert all(expert in tier.policy for expert in tier.places), (
                "policy and places disagree"
            )
        twice = self.on_device.places.keys() & self.in_host.places.keys()
        assert not twice, f"in two tiers: {twice}"
        assert not self.in_use, f"still in use: {self.in_use}"
        assert self._demoted_unused <= self.in_host.places.keys()
        assert len(self._forgotten) <= self.host.count

    def _promote(self, expert: ExpertId) -> int | None:
        """Host record -> slot; what was in the slot takes the record, as tiers are exclusive."""
        if self.on_device.free:
            slot = self.on_device.free.pop()
            record = self.in_host.drop(expert)
            self.copy(self.host[record], self.slots[slot])
            self.in_host.free.append(record)
        else:
            victim = self.on_device.policy.victim(expert, keep=self.in_use)
            if victim is None:
                return None
            slot = self.on_device.drop(victim)
            record = self.in_host.drop(expert)
            self._exchange(self.host[record], self.slots[slot])
            self.in_host.put(victim, record, used=False)
            self._demoted_unused.add(victim)
        self.on_device.put(expert, slot)
        return slot

    def _demote(self, expert: ExpertId, slot: int) -> None:
        if not self.in_host.free:
            evicted = self.in_host.policy.victim(expert, keep=self.in_use)
            if evicted is None:
                self.cost.forgotten += 1
                return
            if evicted in self._demoted_unused:
                self._demoted_unused.discard(evicted)
                self.cost.observe_fate(used=False)
            self.in_host.free.append(self.in_host.drop(evicted))
        record = self.in_host.free.pop()
        self.copy(self.slots[slot], self.host[record], counted=False)
        self.in_host.put(expert, record, used=False)
        self._demoted_unused.add(expert)
        self.cost.demoted += 1

    def _forget(self, expert: ExpertId) -> None:
        self.cost.forgotten += 1
        if self.host.count:
            self._forgotten.pop(expert, None)  # a prefetch may have brought it back unregretted
            self._forgotten[expert] = None
            if len(self._forgotten) > self.host.count:
                del self._forgotten[next(iter(self._forgotten))]
                self.cost.observe_fate(used=False)

    def _exchange(self, record: "torch.Tensor", slot: "torch.Tensor") -> None:
        """Swaps two experts, piece by piece: a full host tier has no record to set one aside."""
        started = time.perf_counter()
        for start in range(0, self._stride_bytes, _EXCHANGE_BYTES):
            piece = slice(start, start + _EXCHANGE_BYTES)
            aside = slot[piece].clone()
            slot[piece].copy_(record[piece])
            record[piece].copy_(aside)
        elapsed = time.perf_counter() - started
        self.counters.transfer_s += elapsed
        self.counters.transfer_bytes += self._stride_bytes
        self.cost.copy.observe(2 * self._stride_bytes, elapsed)


def _gpu_slots(count: int, stride_bytes: int, device: str) -> "torch.Tensor":
    import torch  # noqa: PLC0415  the CPU's arenas are being filled before torch is there

    return torch.empty(count, stride_bytes, dtype=torch.uint8, device=device)
