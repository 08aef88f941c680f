"""Paged attention against a dense one in float64 that never heard of pages or batches."""

import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from moe_server.attention import RaggedBatch, RequestSpan, paged_attention
from moe_server.budget import QUERY_TILE_TOKENS
from moe_server.kv_cache import PagedKv

LAYERS, LAYER = 3, 1


@dataclass
class Setting:
    """Shapes of one test."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    block_tokens: int = 4
    num_blocks: int = 40
    window: int | None = None
    dtype: torch.dtype = torch.float64
    seed: int = 0
    kv: PagedKv = field(init=False)

    def __post_init__(self) -> None:
        self.choose = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.free = self.choose.sample(range(self.num_blocks), self.num_blocks)
        self.kv = PagedKv(
            num_layers=LAYERS,
            num_blocks=self.num_blocks,
            block_tokens=self.block_tokens,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=torch.device("cpu"),
        )
        # Whoever reads what was never written gets NaN.
        self.kv._blocks.fill_(torch.nan)

    def request(self, tokens: int, spare_blocks: int = 0) -> "Request":
        blocks = -(-tokens // self.block_tokens) + spare_blocks
        table, self.free = self.free[:blocks], self.free[blocks:]
        assert len(table) == blocks
        return Request(
            *(
                torch.randn(tokens, heads, self.head_dim, generator=self.generator).to(self.dtype)
                for heads in (self.heads, self.kv_heads, self.kv_heads)
            ),
            table,
        )

    def step(self, parts: list[tuple["Request", int]]) -> list[torch.Tensor]:
        """Runs the next tokens of each request; the outputs of each."""
        spans, positions, rows = [], [], []
        for request, count in parts:
            first, end = request.done, request.done + count
            num_prompt = len(request.query) if request.num_prompt is None else request.num_prompt
            table = torch.tensor(request.table)
            spans.append(RequestSpan(len(positions), count, end, num_prompt, table))
            positions += [
                request.table[position // self.block_tokens] * self.block_tokens
                + position % self.block_tokens
                for position in range(first, end)
            ]
            rows.append(slice(first, end))
            request.done = end
        query, key, value = (
            torch.cat(
                [getattr(request, name)[row] for (request, _), row in zip(parts, rows, strict=True)]
            )
            for name in ("query", "key", "value")
        )
        output, weights = paged_attention(
            SimpleNamespace(layer_idx=LAYER),
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            None,
            scaling=0.3,
            ragged_batch=RaggedBatch(spans, self.kv, torch.tensor(positions)),
            sliding_window=self.window,
            is_causal=True,  # transformers hands over more than is needed
        )
        assert weights is None
        assert output.shape == (1, len(positions), self.heads, self.head_dim)
        return list(output[0].split([count for _, count in parts]))

    def expected(self, request: "Request", first: int, end: int) -> torch.Tensor:
        """One query, one head at a time."""
        query, key, value = (
            tensor.double() for tensor in (request.query, request.key, request.value)
        )
        output = torch.empty(end - first, self.heads, self.head_dim, dtype=torch.float64)
        for position in range(first, end):
            begin = max(0, position + 1 - self.window) if self.window else 0
            for head in range(self.heads):
                shared = head * self.kv_heads // self.heads
                scores = key[begin : position + 1, shared] @ query[position, head] * 0.3
                output[position - first, head] = (
                    scores.softmax(0) @ value[begin : position + 1, shared]
                )
        return output


@dataclass
class Request:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    table: list[int]
    done: int = 0
    num_prompt: int | None = None
    """None: all."""


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Both in float64; they sum in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


SETTINGS = {
    "grouped": dict(),
    "multi-query": dict(heads=6, kv_heads=1, seed=1),
    "multi-head": dict(heads=3, kv_heads=3, seed=2),
    "one token a block": dict(block_tokens=1, num_blocks=200, seed=3),
    "large blocks": dict(block_tokens=32, num_blocks=20, seed=4),
    "window 1": dict(window=1, seed=5),
    "window 5": dict(window=5, seed=6),
    "window wider than all": dict(window=1000, seed=7),
    "window, multi-query": dict(window=7, heads=4, kv_heads=1, seed=8),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_ragged_batches_equal_dense_attention(name):
    setting = Setting(**SETTINGS[name])
    choose = setting.choose
    requests = [setting.request(choose.randint(1, 35), spare_blocks=number) for number in range(4)]
    while pending := [request for request in requests if request.done < len(request.query)]:
        parts = [
            (request, choose.choice([1, choose.randint(1, len(request.query) - request.done)]))
            for request in choose.sample(pending, choose.randint(1, len(pending)))
        ]
        firsts = [request.done for request, _ in parts]
        outputs = setting.step(parts)
        for (request, _), first, output in zip(parts, firsts, outputs, strict=True):
            assert_close(output, setting.expected(request, first, request.done))


@pytest.mark.parametrize("window", [None, 1, 50, QUERY_TILE_TOKENS, QUERY_TILE_TOKENS + 1])
@pytest.mark.parametrize("before", [0, 1, 70])
def test_prompts_longer_than_a_tile(window, before):
    length = 2 * QUERY_TILE_TOKENS + 17 + before
    setting = Setting(heads=2, kv_heads=1, num_blocks=100, window=window, seed=before)
    request = setting.request(length)
    if before:
        setting.step([(request, before)])
    [output] = setting.step([(request, length - before)])
    assert_close(output, setting.expected(request, before, length))


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("chunk", [1, 2, 5, 16, 40])
def test_chunks_equal_the_whole(window, chunk):
    setting = Setting(window=window, seed=9)
    whole = setting.request(40)
    chunked = Request(whole.query, whole.key, whole.value, setting.request(40).table)
    [expected] = setting.step([(whole, 40)])
    outputs = []
    while chunked.done < 40:
        outputs += setting.step([(chunked, min(chunk, 40 - chunked.done))])
    assert_close(torch.cat(outputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_request_s_result_does_not_depend_on_its_neighbours(dtype):
    """Bit for bit."""
    setting = Setting(dtype=dtype, seed=10)
    alone = setting.request(30)
    beside = Request(alone.query, alone.key, alone.value, setting.request(30).table)
    for count in (13, 1, 1, 15):
        [expected] = setting.step([(alone, count)])
        neighbours = [(setting.request(3), 3), (setting.request(2), 1)]
        outputs = setting.step([neighbours[0], (beside, count), neighbours[1]])
        assert torch.equal(outputs[1], expected)
        setting.free += neighbours[0][0].table + neighbours[1][0].table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_prompt", [1, 13, 16, 37])
def test_generated_tokens_computed_again_together_give_the_same(dtype, num_prompt):
    """Bit for bit, as after a preemption: the prompt in tiles, the rest one by one."""
    setting = Setting(dtype=dtype, num_blocks=60, seed=num_prompt)
    first = setting.request(70)
    first.num_prompt = num_prompt
    outputs = setting.step([(first, num_prompt)])
    while first.done < 70:
        outputs += setting.step([(first, 1)])
    again = Request(first.query, first.key, first.value, setting.request(70).table)
    again.num_prompt = num_prompt
    repeated = setting.step([(again, 48)]) + setting.step([(again, 22)])
    assert torch.equal(torch.cat(repeated), torch.cat(outputs))


def test_other_layers_are_left_alone():
    setting = Setting()
    setting.step([(setting.request(9), 9)])
    written = ~setting.kv._blocks.isnan()
    assert not written[[0, 2]].any()
    assert written[LAYER].sum() == 2 * 9 * setting.kv_heads * setting.head_dim


def test_gathering_copies_only_the_blocks_of_the_context():
    """A request owns the blocks of its whole prompt from the start; most hold nothing yet."""
    setting = Setting(num_blocks=60)
    request = setting.request(6, spare_blocks=50)
    setting.step([(request, 6)])
    keys, values = setting.kv.gather(LAYER, torch.tensor(request.table), 6)
    assert torch.equal(keys, request.key)
    assert torch.equal(values, request.value)
    two_blocks_bytes = 2 * setting.block_tokens * setting.kv_heads * setting.head_dim * 8
    assert keys.untyped_storage().nbytes() == 2 * two_blocks_bytes
