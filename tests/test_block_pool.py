"""The block pool against a twin that remembers whole prompts instead of keys and counts."""

import random

import pytest

from moe_server.block_pool import BlockPool

BLOCK_TOKENS = 2


class Twin:
    """Contents are the tokens themselves; every question is answered by looking at everything."""

    def __init__(self, num_blocks: int) -> None:
        self.contents: list[tuple[int, ...] | None] = [None] * num_blocks
        self.requests: dict[int, list[int]] = {}
        self.given_back: list[int] = []
        """Blocks in the order in which their last holder went."""

    def holders(self, block: int) -> int:
        return sum(block in table for table in self.requests.values())

    def free(self) -> set[int]:
        return {block for block in range(len(self.contents)) if not self.holders(block)}

    def found(self, tokens: tuple[int, ...]) -> int:
        count = 0
        while (end := (count + 1) * BLOCK_TOKENS) <= len(tokens) and tokens[:end] in self.contents:
            count += 1
        return count

    def may_be_taken(self) -> set[int]:
        """An empty block if there is one, else the kept one that was given back first."""
        free = self.free()
        empty = {block for block in free if self.contents[block] is None}
        if empty:
            return empty
        return {min(free, key=self.given_back.index)}


class Pair:
    """The pool and its twin, asked and told the same."""

    def __init__(self, num_blocks: int) -> None:
        self.pool, self.twin = BlockPool(num_blocks, BLOCK_TOKENS), Twin(num_blocks)

    def find(self, tokens: tuple[int, ...]) -> list[int]:
        shared = self.pool.find(self.pool.keys(tokens))
        assert len(shared) == self.twin.found(tokens)
        for count, block in enumerate(shared, 1):
            assert self.twin.contents[block] == tokens[: count * BLOCK_TOKENS]
        return shared

    def start(self, number: int, shared: list[int], num_new: int) -> None:
        self.pool.hold(shared)
        self.twin.requests[number] = table = []
        for block in shared:
            self.use(table, block)
        for _ in range(num_new):
            allowed = self.twin.may_be_taken()
            [block] = self.pool.take(1)
            assert block in allowed
            self.twin.contents[block] = None
            self.use(table, block)

    def use(self, table: list[int], block: int) -> None:
        table.append(block)
        if block in self.twin.given_back:
            self.twin.given_back.remove(block)

    def publish(self, number: int, tokens: tuple[int, ...], first: int, end: int) -> None:
        for index in range(first, end):
            block = self.twin.requests[number][index]
            self.pool.publish(block, self.pool.keys(tokens)[index])
            contents = tokens[: (index + 1) * BLOCK_TOKENS]
            if contents not in self.twin.contents:
                self.twin.contents[block] = contents

    def leave(self, number: int) -> None:
        table = self.twin.requests.pop(number)
        self.pool.give_back(table)
        for block in reversed(table):
            if not self.twin.holders(block) and self.twin.contents[block] is not None:
                self.twin.given_back.append(block)

    def check(self) -> None:
        self.pool.check_integrity(list(self.twin.requests.values()))
        assert self.pool.num_free == len(self.twin.free())
        assert self.pool.num_kept == len(self.twin.given_back)


@pytest.mark.parametrize("seed", range(60))
def test_the_pool_equals_its_twin(seed):
    choose = random.Random(seed)
    pair = Pair(num_blocks=choose.randint(2, 12))
    for number in range(300):
        # Few tokens, so that prompts often begin alike.
        tokens = tuple(choose.choices(range(2), k=choose.randint(1, 9)))
        shared = pair.find(tokens)
        num_new = -(-len(tokens) // BLOCK_TOKENS) - len(shared)
        if num_new + pair.pool.num_kept_of(shared) <= pair.pool.num_free:
            pair.start(number, shared, num_new)
            # Some leave before all is written.
            num_full = len(tokens) // BLOCK_TOKENS
            pair.publish(number, tokens, len(shared), choose.randint(len(shared), num_full))
        while pair.twin.requests and choose.random() < 0.5:
            pair.leave(choose.choice(list(pair.twin.requests)))
        pair.check()


def test_keys_stand_for_everything_before_and_for_this_process():
    pool = BlockPool(1, 4)
    keys = pool.keys(range(12))
    assert len(set(keys)) == 3
    assert all(len(key) == 16 for key in keys)
    assert pool.keys(range(11)) == keys[:2]
    assert pool.keys([9, *range(1, 12)])[1:] != keys[1:]
    assert pool.keys([*range(4), 9, *range(5, 12)])[0] == keys[0]
    assert not set(BlockPool(1, 4).keys(range(12))) & set(keys)


def test_what_was_given_back_first_goes_first_and_a_prompt_s_end_before_its_beginning():
    pool = BlockPool(4, 1)
    for tokens in ([1, 2], [3, 4]):
        blocks = pool.take(2)
        for block, key in zip(blocks, pool.keys(tokens), strict=True):
            pool.publish(block, key)
        pool.give_back(blocks)
    assert pool.num_free == pool.num_kept == 4
    pool.take(1)
    assert [len(pool.find(pool.keys(tokens))) for tokens in ([1, 2], [3, 4])] == [1, 2]
    pool.take(2)
    assert [len(pool.find(pool.keys(tokens))) for tokens in ([1, 2], [3, 4])] == [0, 1]
