"""Which requests take part in the next step, and with how many tokens. Pure Python.

waiting -> running -> gone. Continuous batching: every running request that decodes gets its one
token first, then prompts are prefilled in chunks with what is left of the step's token budget,
first come first served; a level of priority counts like an earlier arrival.

A request starts when the step has tokens left for it and the KV blocks of the tokens it has are
free, and takes further ones as it grows. When there are none left, the last that came goes back to
waiting; its tokens are computed again when it returns. The first that came never waits for blocks,
so something always ends. What a prompt has in common with an earlier one is not computed again as
long as its blocks are there.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

from moe_server.block_pool import BlockPool
from moe_server.budget import QUERY_TILE_TOKENS
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


@dataclass(slots=True)
class SchedulerCounters:
    """Since the start."""

    preemptions: int = 0
    """Requests that went back to waiting."""
    prompt_tokens: int = 0
    """Of all requests that have started."""
    cached_tokens: int = 0
    """Those of them that did not have to be computed."""
    started_tokens: int = 0
    """That requests had when they started, each time that they did."""


class Scheduler:
    """Owns the queue, the running requests and their KV blocks.

    Args:
        max_batch_tokens: Tokens of one step.
        max_running: Requests running side by side.
        num_blocks: KV blocks.
        block_tokens: Tokens in a block.
        reuse_prefixes: Keep the blocks of prompts for others that begin the same way.
        priority_s: Seconds by which a level of priority lets a request come before others.
    """

    def __init__(
        self,
        *,
        max_batch_tokens: int,
        max_running: int,
        num_blocks: int,
        block_tokens: int,
        reuse_prefixes: bool,
        priority_s: float,
    ) -> None:
        # Neighbours decide how much of a step is left for a prompt. Were they to decide where
        # attention's tiles begin, they would decide how it is rounded: prompts are cut between
        # tiles only. (A step below two tiles has no choice.)
        self.tile = QUERY_TILE_TOKENS if max_batch_tokens >= 2 * QUERY_TILE_TOKENS else 1
        # Each running request gets its one token in every step, and one prompt at least a tile.
        self._max_running = max(1, min(max_running, max_batch_tokens - self.tile))
        self.max_batch_tokens = max_batch_tokens
        self.block_tokens = block_tokens
        self._reuse_prefixes = reuse_prefixes
        self._priority_s = priority_s
        self.blocks = BlockPool(num_blocks, block_tokens)
        self.counters = SchedulerCounters()
        self.waiting: list[Sequence] = []
        """By rank; so are the running ones."""
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queues a request; its longest form must fit the whole pool."""
        assert self._longest_blocks(sequence) <= self.blocks.num_blocks
        if self._reuse_prefixes:
            # What attention computes in a tile that is not whole, it rounds differently.
            whole_tiles = sequence.num_prompt_tokens // self.tile * self.tile
            sequence.block_keys = self.blocks.keys(sequence.token_ids[:whole_tiles])
        insort(self.waiting, sequence, key=self.rank)

    def schedule(self, now: float) -> list[Scheduled]:
        """The next step, empty when there is nothing to do.

        Args:
            now: `time.monotonic()`.
        """
        self._grow(now)
        self._admit(now)
        budget = self.max_batch_tokens
        step: list[Scheduled] = []
        # Decoding
        for sequence in self.running:
            if sequence.num_uncomputed == 1 and not self._lacks_block(sequence):
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
            sequence = scheduled.sequence
            before = sequence.num_computed // self.block_tokens
            sequence.num_computed += scheduled.num_tokens
            if sequence.is_running:  # else it left during the step, and what was stored is rubbish
                written = slice(before, sequence.num_computed // self.block_tokens)
                keys = sequence.block_keys[written]
                for block, key in zip(sequence.block_table[written], keys, strict=False):
                    self.blocks.publish(block, key)

    def remove(self, request_id: int) -> bool:
        """Forgets a request wherever it is and frees its blocks; False if it is not here."""
        for sequences in (self.running, self.waiting):
            for sequence in sequences:
                if sequence.request.request_id == request_id:
                    sequences.remove(sequence)
                    self._release(sequence)
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
        self.blocks.check_integrity([sequence.block_table for sequence in self.running])
        for sequence in self.waiting:
            assert not sequence.block_table
            assert sequence.num_computed == 0
        for sequence in self.running:
            assert self._blocks_for(sequence.num_computed) <= len(sequence.block_table), "no place"
            assert len(sequence.block_table) <= self._longest_blocks(sequence)
        assert len(self.running) <= self._max_running
        for sequences in (self.running, self.waiting):
            assert sequences == sorted(sequences, key=self.rank)

    def _grow(self, now: float) -> None:
        """Gives decoding requests the blocks of their next tokens, taken from the last ones.

        The last one cannot take any: it keeps what it has, and misses steps until others end.
        """
        for sequence in list(self.running):
            while sequence.is_running and self._lacks_block(sequence):
                if self.blocks.num_free:
                    sequence.block_table += self.blocks.take(1)
                elif (last := self.running[-1]) is not sequence:
                    self._preempt(last, now)
                else:
                    return

    def _preempt(self, sequence: Sequence, now: float) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_computed = 0
        sequence.waiting_since = now
        insort(self.waiting, sequence, key=self.rank)
        self.counters.preemptions += 1

    def _admit(self, now: float) -> None:
        if not self.waiting or len(self.running) == self._max_running:
            return
        coming = self._coming()
        # Who started without a part in the step would keep blocks from those who may come before.
        budget = self.max_batch_tokens - sum(one.num_uncomputed for one in self.running)
        for sequence in list(self.waiting):
            if len(self.running) == self._max_running or budget < self.tile:
                return
            shared, next_key = self._shared(sequence)
            if next_key in coming:
                continue  # Another request is computing it: a few steps later it is there.
            needed = self._blocks_for(len(sequence.token_ids)) - len(shared)
            # Who starts only to be preempted at once has computed in vain.
            growing = sum(
                len(other.block_table) < self._longest_blocks(other) for other in self.running
            )
            if needed + growing + self.blocks.num_kept_of(shared) > self.blocks.num_free:
                return
            self.blocks.hold(shared)
            sequence.block_table = shared + self.blocks.take(needed)
            sequence.num_computed = len(shared) * self.block_tokens
            self._start(sequence, now)
            coming.update(sequence.block_keys[len(shared) :])
            budget -= sequence.num_uncomputed

    def _start(self, sequence: Sequence, now: float) -> None:
        sequence.timings.queue_s += now - sequence.waiting_since
        self.counters.started_tokens += len(sequence.token_ids)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.num_computed
            self.counters.prompt_tokens += sequence.num_prompt_tokens
            self.counters.cached_tokens += sequence.num_computed
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=self.rank)

    def _coming(self) -> set[bytes]:
        """The keys of the blocks that running requests are about to publish."""
        return {
            key
            for sequence in self.running
            for key in sequence.block_keys[sequence.num_computed // self.block_tokens :]
        }

    def _shared(self, sequence: Sequence) -> tuple[list[int], bytes | None]:
        """The published blocks that a waiting request can begin with, and the next one's key."""
        keys = sequence.block_keys[: sequence.num_reusable // self.block_tokens]
        found = self.blocks.find(keys)
        next_key = keys[len(found)] if len(found) < len(keys) else None
        # Attention goes on where a tile would have begun.
        while len(found) * self.block_tokens % self.tile:
            found.pop()
        return found, next_key

    def _release(self, sequence: Sequence) -> None:
        self.blocks.give_back(sequence.block_table)
        sequence.block_table = []

    def _lacks_block(self, sequence: Sequence) -> bool:
        """True where the next token has no place."""
        return self._blocks_for(sequence.num_computed + 1) > len(sequence.block_table)

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """How much of a prompt comes next: all that is left, or up to the last tile that fits."""
        end = sequence.num_computed + min(budget, sequence.num_uncomputed)
        # What was generated is computed one by one, also when it is computed again.
        if end < sequence.num_prompt_tokens:
            end -= end % self.tile
        return end - sequence.num_computed

    def _longest_blocks(self, sequence: Sequence) -> int:
        # The last token of the longest form is sampled but never run through the model.
        return self._blocks_for(max(1, sequence.max_tokens - 1))

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def rank(self, sequence: Sequence) -> tuple[float, int]:
        """Lower goes first.

        All ranks rise alike while requests wait, so nothing has to be sorted again; and whoever
        waits is passed by those only that come within a bounded time.
        """
        request = sequence.request
        return sequence.arrived - request.priority * self._priority_s, request.request_id
