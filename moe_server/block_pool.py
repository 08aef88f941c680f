"""Which KV blocks are free. Pure bookkeeping for the scheduler; `kv_cache` is the memory."""

from collections.abc import Sequence


class BlockPool:
    """Hands out block numbers.

    Args:
        num_blocks: Blocks in all.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))[::-1]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Takes `count` blocks, which must be free."""
        assert 0 < count <= self.num_free
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: Sequence[int]) -> None:
        """Frees blocks taken before."""
        self._free.extend(reversed(blocks))

    def check_integrity(self, held: Sequence[int]) -> None:
        """Asserts that every block is free or held once.

        Args:
            held: The blocks of all requests.
        """
        assert len(held) == len(set(held)), "a block is held twice"
        assert sorted([*held, *self._free]) == list(range(self.num_blocks)), "blocks are lost"
