"""The cache's order of calls without its bytes: drives a policy as `ExpertCache.acquire` does.

Experts are resident or not; a read arrives when it is waited for, and then the next one begins: as
on a disk that is slower than everything else. tests/offload/test_policy_replay.py holds simulator
and cache to the same hits and misses. What only a replay can have is here too: policies that know
the future.
"""

import sys
from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from benchmarks.traces import Trace
from moe_server.offload.layout import ExpertId
from moe_server.offload.policy import Policy
from moe_server.offload.policy_quotas import Quotas

WARM_UP = 0.2
"""Share of a trace that is replayed before counting starts: it fills the tier."""

_NEVER = sys.maxsize


class Simulator:
    """The device tier over the disk, without a host tier and without prefetching.

    Args:
        policy: Who stays.
        capacity: Slots.
        max_reads: Reads under way at most.
    """

    def __init__(self, policy: Policy, capacity: int, max_reads: int = 1) -> None:
        self.policy = policy
        self.hits = 0
        self.misses = 0
        self._max_reads = max_reads
        self._num_free = capacity

    def acquire(self, layer: int, experts: Sequence[int]) -> list[int]:
        """What happens to the tier in `ExpertCache.acquire`.

        Returns:
            The experts that were hits.
        """
        policy = self.policy
        hits: list[ExpertId] = []
        missing: deque[ExpertId] = deque()
        for number in experts:
            expert = ExpertId(layer, number)
            (hits if expert in policy else missing).append(expert)
        self.hits += len(hits)
        self.misses += len(missing)
        for expert in hits:
            policy.touch(expert)
        under_way: deque[ExpertId] = deque()
        in_use = {*hits, *missing}
        self._start_reads(missing, under_way, in_use)
        for expert in hits:
            in_use.remove(expert)
            self._start_reads(missing, under_way, in_use)
        while under_way:
            expert = under_way.popleft()
            policy.add(expert)
            in_use.remove(expert)
            self._start_reads(missing, under_way, in_use)
        assert not missing
        return [expert.expert for expert in hits]

    def _start_reads(
        self, missing: deque[ExpertId], under_way: deque[ExpertId], in_use: Container[ExpertId]
    ) -> None:
        while missing and len(under_way) < self._max_reads:
            if self._num_free:
                self._num_free -= 1
            else:
                victim = self.policy.victim(missing[0], in_use)
                if victim is None:
                    return
                self.policy.remove(victim)
            under_way.append(missing.popleft())


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay counted once the tier was warm."""

    hits: int
    misses: int
    num_tokens: float

    @property
    def hit_rate(self) -> float:
        return self.hits / (self.hits + self.misses)

    @property
    def reads_per_token(self) -> float:
        return self.misses / self.num_tokens


def replay(trace: Trace, policy: Policy, capacity: int, max_reads: int = 1) -> Replayed:
    """Replays a trace from an empty tier."""
    simulator = Simulator(policy, capacity, max_reads)
    warm = int(len(trace.calls) * WARM_UP)
    for layer, experts in trace.calls[:warm]:
        simulator.acquire(layer, experts)
    hits, misses = simulator.hits, simulator.misses
    for layer, experts in trace.calls[warm:]:
        simulator.acquire(layer, experts)
    return Replayed(
        simulator.hits - hits, simulator.misses - misses, trace.num_tokens * (1 - WARM_UP)
    )


class Future:
    """When each expert is used next, kept up to date while a trace is replayed. Times are calls."""

    def __init__(self, trace: Trace) -> None:
        self._uses: dict[ExpertId, deque[int]] = {}
        for time, (layer, experts) in enumerate(trace.calls):
            for expert in experts:
                self._uses.setdefault(ExpertId(layer, expert), deque()).append(time)

    def next_use(self, expert: ExpertId) -> int:
        uses = self._uses[expert]
        return uses[0] if uses else _NEVER

    def used(self, expert: ExpertId) -> None:
        self._uses[expert].popleft()


class Belady:
    """Evicts what is used latest (Belady 1966): no policy can hit more often.

    Takes no notice of `keep`: replay it with one read under way, where nothing needs to be kept.

    Args:
        trace: The future.
        capacity: Slots.
        per_layer: Within equal quotas of the layers: what the best order within layers can reach.
    """

    def __init__(self, trace: Trace, capacity: int, *, per_layer: bool) -> None:
        self._future = Future(trace)
        self._held: set[ExpertId] = set()
        self._quotas = Quotas(capacity, trace.num_layers) if per_layer else None
        self._latest: list[list[tuple[int, ExpertId]]] = [[] for _ in range(trace.num_layers)]
        """Heaps of (-next use, expert), one a layer or all in the first. May hold old entries."""

    def __contains__(self, expert: ExpertId) -> bool:
        return expert in self._held

    def __len__(self) -> int:
        return len(self._held)

    def add(self, expert: ExpertId, *, used: bool = True) -> None:
        assert used
        self._held.add(expert)
        if self._quotas:
            self._quotas.add(expert.layer)
        self.touch(expert)

    def remove(self, expert: ExpertId) -> None:
        self._held.remove(expert)
        if self._quotas:
            self._quotas.remove(expert.layer)

    def touch(self, expert: ExpertId) -> None:
        self._future.used(expert)
        heap = self._latest[expert.layer if self._quotas else 0]
        heappush(heap, (-self._future.next_use(expert), expert))

    def victim(self, incoming: ExpertId, keep: Container[ExpertId]) -> ExpertId | None:
        del keep
        layers = self._quotas.givers(incoming.layer) if self._quotas else [0]
        for heap in (self._latest[layer] for layer in layers):
            while heap:
                time, expert = heap[0]
                if expert in self._held and -time == self._future.next_use(expert):
                    return expert
                heappop(heap)
        return None


class LookAhead:
    """A policy that also knows what the next calls will want, and evicts none of that if it can.

    Args:
        policy: Decides among the others.
        trace: The future.
        num_calls: Calls that are known in advance.
    """

    def __init__(self, policy: Policy, trace: Trace, num_calls: int) -> None:
        self._policy = policy
        self._future = Future(trace)
        self._num_calls = num_calls

    def __contains__(self, expert: ExpertId) -> bool:
        return expert in self._policy

    def __len__(self) -> int:
        return len(self._policy)

    def add(self, expert: ExpertId, *, used: bool = True) -> None:
        self._future.used(expert)
        self._policy.add(expert, used=used)

    def remove(self, expert: ExpertId) -> None:
        self._policy.remove(expert)

    def touch(self, expert: ExpertId) -> None:
        self._future.used(expert)
        self._policy.touch(expert)

    def victim(self, incoming: ExpertId, keep: Container[ExpertId]) -> ExpertId | None:
        known = _Wanted(self._future, self._future.next_use(incoming) + self._num_calls, keep)
        return self._policy.victim(incoming, known) or self._policy.victim(incoming, keep)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Experts that are in use or wanted until a call."""

    future: Future
    until: int
    keep: Container[ExpertId]

    def __contains__(self, expert: object) -> bool:
        assert isinstance(expert, ExpertId)
        return expert in self.keep or self.future.next_use(expert) <= self.until
