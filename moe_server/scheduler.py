"""Which requests take part in the next step, and with how many tokens. Pure Python.

waiting -> running -> gone. Continuous batching: every running request that decodes gets its one
token first, then prompts are prefilled in chunks with what is left of the step's token budget,
first come first served. A request starts only when the KV blocks of its longest possible form are
free, so a running request never runs out of them.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from moe_server.budget import QUERY_TILE_TOKENS
from moe_server.kv_cache import BlockPool
from moe_server.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A request's part in a step: its next `num_tokens` uncomputed tokens."""

    sequence: Sequence
    num_tokens: int

    @property
    def completes_input(self) -> bool:
        """True where a token is to be sampled after this step."""
        return self.num_tokens == self.sequence.num_uncomputed


class Scheduler:
    """Owns the queue, the running requests and their KV blocks.

    Args:
        max_batch_tokens: Tokens of one step.
        max_running: Requests running side by side.
        num_blocks: KV blocks.
        block_tokens: Tokens in a block.
    """

    def __init__(
        self, *, max_batch_tokens: int, max_running: int, num_blocks: int, block_tokens: int
    ) -> None:
        # Neighbours decide how much of a step is left for a prompt. Were they to decide where
        # attention's tiles begin, they would decide how it is rounded: prompts are cut between
        # tiles only. (A step below two tiles has no choice.)
        self._tile = QUERY_TILE_TOKENS if max_batch_tokens >= 2 * QUERY_TILE_TOKENS else 1
        # Each running request gets its one token in every step, and one prompt at least a tile.
        self._max_running = max(1, min(max_running, max_batch_tokens - self._tile))
        self._max_batch_tokens = max_batch_tokens
        self._block_tokens = block_tokens
        self.blocks = BlockPool(num_blocks)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queues a request; its longest form must fit the whole pool."""
        assert self._blocks_for(sequence) <= self.blocks.num_blocks
        self.waiting.append(sequence)

    def schedule(self) -> list[Scheduled]:
        """The next step, empty when there is nothing to do."""
        self._admit()
        budget = self._max_batch_tokens
        step: list[Scheduled] = []
        # Decoding
        for sequence in self.running:
            if sequence.num_uncomputed == 1:
                step.append(Scheduled(sequence, 1))
                budget -= 1
        # Prefilling
        for sequence in self.running:
            if sequence.num_uncomputed > 1 and (chunk := self._chunk(sequence, budget)) > 0:
                step.append(Scheduled(sequence, chunk))
                budget -= chunk
        return step

    def advance(self, step: Iterable[Scheduled]) -> None:
        """The step was run: its tokens are stored."""
        for scheduled in step:
            scheduled.sequence.num_computed += scheduled.num_tokens

    def remove(self, request_id: int) -> bool:
        """Forgets a request wherever it is and frees its blocks; False if it is not here."""
        for sequence in self.running:
            if sequence.request.request_id == request_id:
                self.running.remove(sequence)
                self.blocks.give_back(sequence.block_table)
                sequence.block_table = []
                return True
        for sequence in self.waiting:
            if sequence.request.request_id == request_id:
                self.waiting.remove(sequence)
                return True
        return False

    def expired(self, now: float) -> list[Sequence]:
        """Requests whose deadline has passed, waiting or running."""
        return [
            sequence
            for sequence in (*self.waiting, *self.running)
            if sequence.request.deadline is not None and sequence.request.deadline <= now
        ]

    def check_integrity(self) -> None:
        """Asserts what must hold between steps; for tests and idle moments."""
        held = [block for sequence in self.running for block in sequence.block_table]
        assert len(held) == len(set(held)), "a block is held twice"
        assert len(held) + self.blocks.num_free == self.blocks.num_blocks, "blocks are lost"
        assert not any(sequence.block_table for sequence in self.waiting)
        assert len(self.running) <= self._max_running

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_running:
            needed = self._blocks_for(self.waiting[0])
            if needed > self.blocks.num_free:
                return
            sequence = self.waiting.popleft()
            sequence.block_table = self.blocks.take(needed)
            self.running.append(sequence)

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """How much of a prompt comes next: all that is left, or up to the last tile that fits."""
        if sequence.num_uncomputed <= budget:
            return sequence.num_uncomputed
        return budget - (sequence.num_computed + budget) % self._tile

    def _blocks_for(self, sequence: Sequence) -> int:
        # The last token of the longest form is sampled but never run through the model.
        return max(1, -(-(sequence.max_tokens - 1) // self._block_tokens))
