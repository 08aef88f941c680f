"""Traces: which experts each layer acquires, call after call; synthetic ones and recorded ones.

A trace is what the cache is asked for, not what a router said: one call a layer and step, with the
union of the experts that the step's tokens chose. Knows no policy and no cache. Used by
`policy_replay` and by the tests; `traces_record` writes the recorded ones.

Synthetic routing is one Markov chain a sequence and layer. A token either keeps one of the
previous token's two experts or draws a fresh pair by the layer's popularity. How often it keeps
one, and how often the first stays first, is set so that consecutive tokens agree as often as in
table 5 of the Mixtral paper (arXiv:2401.04088). Which experts they share comes out within a point
(never below chance, which the paper's layer 31 is by 2 points in one domain). The share of equal
first choices falls 3 to 7 points short in layer 31; to a cache both choices are alike.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RECORDED = Path(__file__).parent / "traces"
NUM_LAYERS, NUM_EXPERTS, TOP_K = 32, 8, 2
PREFILL_TOKENS = 512

TABLE_5 = {
    "arxiv": ((0.140, 0.279, 0.227), (0.465, 0.623, 0.529)),
    "dm_mathematics": ((0.141, 0.284, 0.197), (0.449, 0.670, 0.445)),
    "github": ((0.149, 0.281, 0.197), (0.499, 0.669, 0.492)),
    "gutenberg": ((0.139, 0.261, 0.263), (0.495, 0.631, 0.522)),
    "philpapers": ((0.136, 0.253, 0.221), (0.469, 0.619, 0.513)),
    "pubmed": ((0.142, 0.246, 0.220), (0.486, 0.616, 0.518)),
    "stackexchange": ((0.136, 0.272, 0.236), (0.482, 0.646, 0.536)),
    "wikipedia": ((0.144, 0.236, 0.253), (0.498, 0.621, 0.518)),
}
"""Domain -> shares of consecutive tokens with the same first choice, and with a choice in common;
each for layers 0, 15 and 31. Layers between are interpolated."""

_CHANCE_FIRST = 1 / NUM_EXPERTS
_CHANCE_ANY = 1 - (6 / 8) * (5 / 7)

Experts = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """The cache's calls during one workload."""

    name: str
    num_layers: int
    num_experts: int
    num_tokens: int
    """Tokens computed: prompts' and generated ones."""
    calls: list[tuple[int, Experts]]
    """(layer, its experts in ascending order), as `ExpertCache.acquire` gets them."""

    @property
    def num_slots_total(self) -> int:
        """Slots that would hold all experts."""
        return self.num_layers * self.num_experts


class Routing:
    """Pairs of experts for every layer, token after token, for several independent sequences.

    Args:
        choose: Randomness.
        num_sequences: Sequences.
        agreement: (same first choice, a choice in common) per layer, as in TABLE_5; None: chance.
        popularity: (layers, experts), rows sum to 1; None: uniform.
    """

    def __init__(
        self,
        choose: np.random.Generator,
        num_sequences: int,
        agreement: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
        popularity: NDArray[np.float64] | None = None,
    ) -> None:
        self._choose = choose
        self._shape = (num_sequences, NUM_LAYERS)
        self._keep, self._stay = _chain(*agreement) if agreement else (0.0, 0.0)
        uniform = np.full((NUM_LAYERS, NUM_EXPERTS), 1 / NUM_EXPERTS)
        self._log_popularity = np.log(uniform if popularity is None else popularity)
        self._pairs = self._fresh()

    def next_token(self) -> NDArray[np.int64]:
        """(sequences, layers, 2): each sequence's next token's first and second choices."""
        first, second = np.moveaxis(self._pairs, -1, 0)
        fresh = self._fresh()
        draw = self._choose.random
        keep_first = draw(self._shape) < self._stay
        kept = np.where(keep_first, first, second)
        as_first = draw(self._shape) < np.where(keep_first, self._stay, 0.5)
        # The other one is fresh: the first of the fresh pair that is not the kept expert.
        other = np.where(fresh[..., 0] == kept, fresh[..., 1], fresh[..., 0])
        pair = np.stack([np.where(as_first, kept, other), np.where(as_first, other, kept)], -1)
        keep = draw(self._shape) < self._keep
        self._pairs = np.where(keep[..., None], pair, fresh)
        return self._pairs

    def _fresh(self) -> NDArray[np.int64]:
        """Pairs without replacement, by popularity (the Gumbel trick)."""
        keys = self._log_popularity + self._choose.gumbel(size=(*self._shape, NUM_EXPERTS))
        return np.argsort(-keys, axis=-1)[..., :TOP_K]


def _chain(
    same_first: NDArray[np.float64], in_common: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How often a token keeps an expert, and how often the first is kept and stays first.

    A kept pair agrees in the first choice with probability `stay`^2, or by the chance that the
    fresh expert fills the place: about (1 - stay) / 14 where the first was not the kept one.
    """
    keep = np.clip((in_common - _CHANCE_ANY) / (1 - _CHANCE_ANY), 0, 1)
    wanted = (same_first - (1 - keep) * _CHANCE_FIRST) / np.maximum(keep, 1e-9)
    stay = np.linspace(0, 1, 1001)
    gives = stay**2 + (1 - stay) * 0.5 / (NUM_EXPERTS - 1)
    return keep, np.interp(wanted, gives[40:], stay[40:])


def agreement(domains: Iterable[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The domains' mean of TABLE_5, for every layer."""
    means = np.mean([TABLE_5[domain] for domain in domains], axis=0)
    first, common = (np.interp(np.arange(NUM_LAYERS), (0, 15, 31), row) for row in means)
    return first, common


def skewed(choose: np.random.Generator, num_domains: int) -> list[NDArray[np.float64]]:
    """A popularity for each domain: layers from nearly uniform to one expert in most tokens."""
    concentration = np.geomspace(8, 0.4, NUM_LAYERS)
    choose.shuffle(concentration)
    return [
        np.stack([choose.dirichlet(np.full(NUM_EXPERTS, alpha)) for alpha in concentration]) + 1e-6
        for _ in range(num_domains)
    ]


def union(pairs: NDArray[np.int64]) -> list[Experts]:
    """Of the pairs (tokens, layers, 2) of a step, the union of the experts of each layer."""
    return [tuple(np.unique(pairs[:, layer]).tolist()) for layer in range(pairs.shape[1])]


def _trace(name: str, num_tokens: int, steps: Iterable[list[Experts]]) -> Trace:
    calls = [(layer, wanted) for step in steps for layer, wanted in enumerate(step)]
    return Trace(name, NUM_LAYERS, NUM_EXPERTS, num_tokens, calls)


def decode(name: str, routing: Routing, batch: int, num_steps: int) -> Trace:
    """`batch` sequences decode together."""
    steps = (union(routing.next_token()) for _ in range(num_steps))
    return _trace(name, batch * num_steps, steps)


def decode_with_prefills(
    name: str, routing: Routing, batch: int, num_steps: int, every: int
) -> Trace:
    """Decoding, with a prompt's chunk in every `every`-th step beside the decoding sequences."""

    def steps() -> Iterator[list[Experts]]:
        for number in range(num_steps):
            tokens = [routing.next_token()]
            if number % every == every - 1:
                tokens += [routing.next_token() for _ in range(-(-PREFILL_TOKENS // batch))]
            yield union(np.concatenate(tokens))

    num_tokens = batch * num_steps + PREFILL_TOKENS * (num_steps // every)
    return _trace(name, num_tokens, steps())


def in_turns(name: str, routings: list[Routing], num_steps: int, turn: int) -> Trace:
    """Batch 1: one sequence decodes `turn` tokens, then another with its own popularity."""
    steps = (
        union(routings[number // turn % len(routings)].next_token()) for number in range(num_steps)
    )
    return _trace(name, num_steps, steps)


def synthetic(*, quick: bool = False) -> Iterator[Trace]:
    """All synthetic workloads, the same ones every time."""
    length = 1 if quick else 4
    paper = agreement(TABLE_5)

    def seeded() -> np.random.Generator:
        return np.random.default_rng(0)

    for batch, num_steps in ((1, 150 * length), (8, 50 * length), (32, 25 * length)):
        yield decode(f"paper/b{batch}", Routing(seeded(), batch, paper), batch, num_steps)
        yield decode(f"uniform/b{batch}", Routing(seeded(), batch), batch, num_steps)
        [popularity] = skewed(seeded(), 1)
        skew = Routing(seeded(), batch, paper, popularity)
        yield decode(f"skewed/b{batch}", skew, batch, num_steps)
    domains = skewed(seeded(), 4)
    routings = [Routing(seeded(), 1, paper, popularity) for popularity in domains]
    yield in_turns("domains in turn/b1", routings, 150 * length, turn=100)
    mixed = Routing(seeded(), 1, paper)
    yield decode_with_prefills("paper, prefills/b1", mixed, 1, 150 * length, every=16)
    [popularity] = skewed(seeded(), 1)
    mixed = Routing(seeded(), 8, paper, popularity)
    yield decode_with_prefills("skewed, prefills/b8", mixed, 8, 50 * length, every=16)


def recorded() -> Iterator[Trace]:
    """What `traces_record` wrote; bit e of a mask stands for expert e."""
    for file in sorted(RECORDED.glob("*.json")):
        line = json.loads(file.read_text())
        calls = [
            (layer, tuple(expert for expert in range(line["num_experts"]) if mask >> expert & 1))
            for layer, mask in line["calls"]
        ]
        yield Trace(
            line["name"], line["num_layers"], line["num_experts"], line["num_tokens"], calls
        )
