"""What is read from disk: the dense weights, the experts, and the reader that both share.

Built from headers and a memory plan alone, without torch: the engine process begins to read here
while it still imports its libraries, and both take seconds on a cold machine. `model` makes tensors
of the bytes later.
"""

import ctypes
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moe_server.budget import READ_BLOCK_BYTES, MemoryPlan, embedding_places
from moe_server.checkpoint import Checkpoint, DenseTensor
from moe_server.config import ModelConfig
from moe_server.errors import MoeServerError, Reason
from moe_server.messages import NO_HOT_SET, HotSet
from moe_server.offload.cache import ExpertCache
from moe_server.offload.checksum import ChecksumBook
from moe_server.offload.cost import CostModel
from moe_server.offload.lasting import LastingMemory
from moe_server.offload.layout import ExpertId, Segment
from moe_server.offload.pages import address_of, map_pages
from moe_server.offload.reader import Reader, ReadTicket
from moe_server.offload.rows import StoredRows
from moe_server.offload.shared_pages import is_as_fast_as_private
from moe_server.offload.uses import Uses

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _DenseRead:
    memory: mmap.mmap
    nbytes: int
    ticket: ReadTicket


class Weights:
    """The memory that weights are read into. One thread only, beside the reader's.

    Args:
        config: The model's.
        checkpoint: What is served.
        plan: How memory is divided.
        lasting: Memory for experts that outlives this process, from `lasting_memory`.
        hot_set: How often experts were wanted before this process, if that is known.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        plan: MemoryPlan,
        lasting: LastingMemory | None = None,
        hot_set: HotSet = NO_HOT_SET,
    ) -> None:
        self.checkpoint = checkpoint
        self.uses = Uses(checkpoint.num_layers, checkpoint.num_experts)
        """How often experts are wanted."""
        self._has_hot_set = any(hot_set.visits)
        self.num_kept = 0
        """Experts that an earlier process had left in memory."""
        self.reader = Reader(
            config.read_threads,
            READ_BLOCK_BYTES,
            ChecksumBook(checkpoint.checksums, learn=config.verify),
        )
        self.cache = ExpertCache(
            {expert: checkpoint.record_segments(expert) for expert in checkpoint.experts},
            num_layers=checkpoint.num_layers,
            num_slots=plan.num_slots,
            num_records=plan.num_records,
            num_staging=plan.num_staging,
            stride_bytes=plan.slot_bytes,
            device=config.device,
            reader=self.reader,
            policy=config.expert_policy,
            cost=CostModel(
                shared_memory=config.device == "cpu",
                computes_in_place=config.device == "cpu" or config.host_compute,
            ),
            allow_pageable=config.allow_pageable,
            lasting=lasting,
        )
        self.embedding: StoredRows | None = None
        """The token embedding's rows, where they stay on disk."""
        if plan.embedding_on_disk_bytes:
            stored = checkpoint.embedding
            self.embedding = StoredRows(
                self.reader,
                stored.file,
                stored.offset,
                checkpoint.embedding_layout,
                embedding_places(config, checkpoint),
            )
        if self._has_hot_set:
            self.uses.restore(hot_set.visits, hot_set.shares)
            self.cache.expect(self.uses)
        self._ranked = self.uses.ranked()
        """As they were wanted before this process."""
        self._plan = plan
        self._lasting = lasting
        self._dense: dict[str, _DenseRead] = {}

    def begin(self) -> None:
        """Begins to read the dense weights and, behind them, as many experts as have a place.

        Those that an earlier process left are not read again. Where others have no place, one slot
        stays free for them to pass through.
        """
        for name, location in self._kept().items():
            # A mapping each: a tensor that is handed on by copying frees its own.
            memory = map_pages(location.nbytes)
            address = address_of(memory)
            part = Segment(location.file, location.offset, location.nbytes, 0)
            ticket = self.reader.submit([part], address, owner=memory)
            self._dense[name] = _DenseRead(memory, location.nbytes, ticket)
        # A book of its own: what is in memory teaches nothing of what is on disk.
        book = ChecksumBook(self.checkpoint.checksums)
        self.num_kept = self.cache.tiers.adopt(partial(self._is_intact, book))
        self.fill(spare_slots=1 if self._plan.num_absent else 0)

    def fill(self, spare_slots: int = 0) -> None:
        """Begins to read the experts that stay in memory into the places that are free."""
        staying = self.staying()
        # The hottest first; where none is known to be hot, as they lie on disk.
        order = staying if self._has_hot_set else sorted(staying, key=self._place_on_disk)
        self.cache.fill(order, spare_slots=spare_slots)

    def staying(self) -> list[ExpertId]:
        """As many experts as have a place, an equal share of every layer; the hottest first."""
        return self._ranked[: self._plan.num_places]

    def passing(self) -> list[ExpertId]:
        """The others."""
        return self._ranked[self._plan.num_places :]

    def take_dense(self, progress: Callable[[int], None]) -> "dict[str, torch.Tensor]":
        """Waits for the dense weights and hands them over.

        Args:
            progress: Called with the bytes read so far.

        Returns:
            uint8 (nbytes,) by parameter name, each the only owner of its memory.

        Raises:
            MoeServerError: A read failed.
        """
        import torch  # noqa: PLC0415  see above

        tensors: dict[str, torch.Tensor] = {}
        done = 0
        for name, read in self._dense.items():
            read.ticket.wait()
            tensors[name] = torch.frombuffer(read.memory, dtype=torch.uint8, count=read.nbytes)
            done += read.nbytes
            progress(done)
        self._dense.clear()
        return tensors

    def read_embedding(self, progress: Callable[[int], None]) -> None:
        """Reads an embedding that stays on disk through once, so that every byte was seen.

        Args:
            progress: Called with the bytes read so far.

        Raises:
            MoeServerError: A read failed.
        """
        if self.embedding is not None:
            self.embedding.read_through(progress)

    def note_proven(self) -> None:
        """Every expert was read and computed, here or by an earlier process."""
        if self._lasting is not None:
            self._lasting.note_proven(self.reader.block_bytes, self.reader.depth)

    def reuse_read_settings(self) -> bool:
        """Reads as the process did that has proven the experts; False: there was none."""
        if self._lasting is None or not self._lasting.is_proven:
            return False
        self.reader.block_bytes, self.reader.depth = self._lasting.read_settings
        return True

    def close(self) -> None:
        """Ends the reader's threads, after the blocks that they are reading."""
        self.cache.close()
        self.reader.close()

    def _kept(self) -> dict[str, DenseTensor]:
        """The dense tensors that are held in memory."""
        dense = self.checkpoint.dense
        on_disk = self.checkpoint.embedding if self.embedding is not None else None
        return {name: tensor for name, tensor in dense.items() if tensor is not on_disk}

    def _is_intact(self, book: ChecksumBook, expert: ExpertId, address: int) -> bool:
        """Whether an expert of this model has its bytes at `address`, as far as checksums say."""
        if expert not in self.checkpoint.experts:
            return False
        return book.is_empty or all(
            book.mismatch(part.file, part.file_offset, _memory(address + part.record_offset, part))
            is None
            for part in self.checkpoint.record_segments(expert)
        )

    def _place_on_disk(self, expert: ExpertId) -> tuple[str, int]:
        first = self.checkpoint.record_segments(expert)[0]
        return str(first.file), first.file_offset


def lasting_memory(
    descriptor: int, config: ModelConfig, checkpoint: Checkpoint, plan: MemoryPlan
) -> LastingMemory | None:
    """Memory for experts that outlives this process, bound to where their bytes come from.

    Args:
        descriptor: The file that the supervisor holds.
        config: The model's.
        checkpoint: What is served.
        plan: How memory is divided.

    Returns:
        None where such memory would have small pages only: steps would be slower for the sake of a
        restart.

    Raises:
        MoeServerError: The kernel refused the memory.
    """
    if not is_as_fast_as_private():
        # What an earlier engine left there would be held twice.
        os.ftruncate(descriptor, 0)
        return None
    files = {part.file for parts in checkpoint.experts.values() for part in parts}
    try:
        found = {str(file): _identity(file) for file in files}
        return LastingMemory(
            descriptor,
            f"{sorted(found.items())} {sorted(checkpoint.experts.items())}",
            num_slots=plan.num_slots if config.device == "cpu" else 0,
            num_records=plan.num_records,
            stride_bytes=plan.slot_bytes,
        )
    except OSError as error:
        raise MoeServerError(
            f"Cannot map memory for experts: {error.strerror}.",
            "Lower device_memory or host_memory.",
            reason=Reason.EXHAUSTED,
        ) from None


def _identity(file: Path) -> tuple[int, ...]:
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _memory(address: int, part: Segment) -> memoryview:
    return memoryview((ctypes.c_char * part.nbytes).from_address(address)).cast("B")
