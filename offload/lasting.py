"""Expert memory that outlives the engine process: the next one finds its experts where they were.

A file in memory, whose descriptor the supervisor holds and every engine inherits: a table, then the
arenas. The table says which expert lies in which place. A place is taken off it before anything is
written there and entered after the last byte, each by one store of one word: wherever the process
is killed, what the table says is true. (The process that writes is gone, its reads with it, before
the next begins.) The table is bound to the files that the bytes came from and to the plan; of
another table's arenas nothing is kept.

Knows places and identities, not what they are used for: `tiers` keeps the table, `weights` says
what it is bound to.
"""

import ctypes
import hashlib
import mmap
import os
import sys
from collections.abc import Mapping

from moe_server.kernels.formats import round_up
from moe_server.offload.layout import ExpertId
from moe_server.offload.pages import HUGE_BYTES
from moe_server.offload.shared_pages import SharedPages

_MAGIC = 0x31_45_4F_4D  # "MOE1", the form of the table
_WORD = ctypes.sizeof(ctypes.c_uint64)
_IDENTITY_WORDS = 4
_PROVEN = 1 + _IDENTITY_WORDS
_BLOCK_BYTES, _DEPTH = _PROVEN + 1, _PROVEN + 2
_FIRST_PLACE = 8
_LAYER_SHIFT = 32


class Ledger:
    """Which expert lies in which place of one tier, in words that may be shared.

    Args:
        words: One for each place; 0 says that nothing there is to be trusted.
    """

    def __init__(self, words: "ctypes.Array[ctypes.c_uint64]") -> None:
        self._words = words

    @classmethod
    def private(cls, count: int) -> "Ledger":
        """A ledger of `count` places that goes with the process."""
        return cls((ctypes.c_uint64 * count)())

    def enter(self, place: int, expert: ExpertId) -> None:
        """All of the expert's bytes are in the place."""
        self._words[place] = (expert.layer << _LAYER_SHIFT | expert.expert) + 1

    def strike(self, place: int) -> None:
        """Nothing in the place is to be trusted from now on."""
        self._words[place] = 0

    def entries(self) -> Mapping[int, ExpertId]:
        """The trusted experts by place."""
        return {
            place: ExpertId(word - 1 >> _LAYER_SHIFT, (word - 1) % 2**_LAYER_SHIFT)
            for place, word in enumerate(self._words)
            if word
        }


class LastingMemory:
    """The file's table and arenas. One process at a time.

    Args:
        descriptor: The file; stays the caller's. It is emptied where it is bound to something else.
        bound_to: Describes everything that the bytes depend on.
        num_slots: Places on the device, where that is RAM, else 0.
        num_records: Places in host memory.
        stride_bytes: Of a place.

    Raises:
        OSError: The kernel refused the memory.
    """

    def __init__(
        self, descriptor: int, bound_to: str, *, num_slots: int, num_records: int, stride_bytes: int
    ) -> None:
        places = num_slots + num_records
        plan = f"{num_slots} {num_records} {stride_bytes} {bound_to}"
        identity = hashlib.sha256(plan.encode()).digest()
        table_size = round_up((_FIRST_PLACE + places) * _WORD, HUGE_BYTES)
        slots_size, records_size = (
            round_up(count * stride_bytes, HUGE_BYTES) for count in (num_slots, num_records)
        )
        size = table_size + slots_size + records_size
        if not _is_bound(descriptor, identity, size):
            os.ftruncate(descriptor, 0)
        os.ftruncate(descriptor, size)
        self._table = mmap.mmap(descriptor, table_size)
        self._words = (ctypes.c_uint64 * _FIRST_PLACE).from_buffer(self._table)
        if not self._words[0]:
            self._table[_WORD : _WORD + len(identity)] = identity
            self._words[0] = _MAGIC  # last: it makes the rest valid
        self.slots_ledger, self.records_ledger = (
            Ledger((ctypes.c_uint64 * count).from_buffer(self._table, first * _WORD))
            for count, first in (
                (num_slots, _FIRST_PLACE),
                (num_records, _FIRST_PLACE + num_slots),
            )
        )
        self.slots, self.records = (
            SharedPages(descriptor, offset, size) if size else None
            for offset, size in (
                (table_size, slots_size),
                (table_size + slots_size, records_size),
            )
        )

    @property
    def is_proven(self) -> bool:
        """Whether a process has read and computed every expert, also those that are not here."""
        return bool(self._words[_PROVEN])

    @property
    def read_settings(self) -> tuple[int, int]:
        """Block bytes and depth that suited the disk; once it is proven."""
        return self._words[_BLOCK_BYTES], self._words[_DEPTH]

    def note_proven(self, block_bytes: int, depth: int) -> None:
        """Every expert was read and computed, and reading settled on these."""
        self._words[_BLOCK_BYTES], self._words[_DEPTH] = block_bytes, depth
        self._words[_PROVEN] = 1


def _is_bound(descriptor: int, identity: bytes, size: int) -> bool:
    """Whether the file is whole and its table bound to `identity`."""
    head = os.pread(descriptor, _WORD + len(identity), 0)
    return (
        os.fstat(descriptor).st_size == size
        and head == _MAGIC.to_bytes(_WORD, sys.byteorder) + identity
    )
