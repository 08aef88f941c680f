"""Which KV blocks are whose: free, held by requests, or kept for prompts that begin the same way.

Pure bookkeeping for the scheduler; `kv_cache` is the memory. A full block of a prompt can be
published under a key that stands for all tokens up to its end. Requests whose prompts begin with
these tokens hold the block together and nobody writes to it again. Once nobody holds it, it is kept
until its memory is needed: the block that was given back first goes first.
"""

import secrets
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

_KEY_BYTES = 16


class BlockPool:
    """Hands out block numbers.

    Args:
        num_blocks: Blocks in all.
        block_tokens: Tokens in a block.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self._block_tokens = block_tokens
        # Without it, nobody can look for prompts whose keys are equal.
        self._salt = secrets.token_bytes(32)
        self._empty = list(range(num_blocks))[::-1]
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Free, but with contents; in the order in which they were given back."""
        self._holders = [0] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be taken, the kept ones included."""
        return len(self._empty) + len(self._kept)

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def keys(self, token_ids: Sequence[int]) -> list[bytes]:
        """The keys of the full blocks of `token_ids`, each of all tokens up to its block's end.

        128 bits under a secret salt: two prompts with equal keys cannot be made, and by chance
        they do not come up.
        """
        keys: list[bytes] = []
        key = b""
        for end in range(self._block_tokens, len(token_ids) + 1, self._block_tokens):
            tokens = array("I", token_ids[end - self._block_tokens : end]).tobytes()
            key = blake2b(key + tokens, key=self._salt, digest_size=_KEY_BYTES).digest()
            keys.append(key)
        return keys

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The published blocks that a prompt begins with, up to the first that is not there."""
        found = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_kept_of(self, blocks: Iterable[int]) -> int:
        """How many of these blocks stop being free when they are held."""
        return sum(block in self._kept for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Holds published blocks, for reading only."""
        for block in blocks:
            self._kept.pop(block, None)
            self._holders[block] += 1

    def take(self, count: int) -> list[int]:
        """Takes `count` free blocks for writing; there must be as many."""
        assert 0 < count <= self.num_free
        taken = []
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _none = self._kept.popitem(last=False)
                del self._by_key[self._keys.pop(block)]
            self._holders[block] = 1
            taken.append(block)
        return taken

    def publish(self, block: int, key: bytes) -> None:
        """A held block is written in full. It has no effect where another has the same contents."""
        assert self._holders[block]
        if key not in self._by_key and block not in self._keys:
            self._by_key[key] = block
            self._keys[block] = key

    def give_back(self, blocks: Sequence[int]) -> None:
        """Ends one request's hold of its blocks, which are in order of position."""
        # The last first: a block is of use only together with those before it.
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._keys:
                self._kept[block] = None
            else:
                self._empty.append(block)

    def check_integrity(self, held: Sequence[Sequence[int]]) -> None:
        """Asserts what must hold between steps.

        Args:
            held: Every request's blocks.
        """
        holders = [0] * self.num_blocks
        for table in held:
            assert len(table) == len(set(table)), "a block is twice in a request"
            for block in table:
                holders[block] += 1
        assert holders == self._holders, "holders are counted wrongly"
        free = [*self._empty, *self._kept]
        assert len(free) == len(set(free)), "a block is free twice"
        assert set(free) == {block for block in range(self.num_blocks) if not holders[block]}
        assert self._by_key == {key: block for block, key in self._keys.items()}
        assert set(self._kept) <= self._keys.keys()
        assert not self._keys.keys() & set(self._empty)
        shared = {block for block, count in enumerate(holders) if count > 1}
        assert shared <= self._keys.keys(), "shared while it can be written"
