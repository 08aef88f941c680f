"""Tokens equal transformers', wherever experts are: without this nothing else matters."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_server.kernels import native
from moe_server.kernels.formats import WeightFormat
from moe_server.messages import Sampling, TokenEvent
from moe_server.pack import pack
from moe_server.packed import StoreFormat
from tests.driver import greedy, run, running_engine, token_ids
from tests.tiny import Tiny, transformers_answers

NEW_TOKENS = 64
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CHECKPOINTS = {
    "plain": Tiny(),
    "tied": Tiny(tied=True, seed=1),
    "multi-query": Tiny(heads=6, kv_heads=1, head_dim=8, seed=2),
    "multi-head": Tiny(heads=4, kv_heads=4, layers=3, seed=3),
    "wide heads": Tiny(heads=2, kv_heads=1, head_dim=64, seed=4),
    "4 experts top-1": Tiny(experts=4, top_k=1, seed=5),
    "16 experts top-4": Tiny(experts=16, top_k=4, seed=6),
    "5 experts top-3": Tiny(experts=5, top_k=3, seed=7, hidden=52, head_dim=10, intermediate=37),
    "sliding window": Tiny(sliding_window=16, seed=8),
    "yarn": Tiny(rope=YARN, seed=9),
    "llama3 rope": Tiny(rope=LLAMA3, seed=10),
    "linear rope": Tiny(rope={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, seed=11),
    "dynamic rope": Tiny(rope={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, seed=12),
    "sharded": Tiny(max_shard="100KB", seed=13),
    "one layer": Tiny(layers=1, seed=14),
}
PLACES = {
    "resident": {},
    "one slot": {"device_memory": "min"},
    "one slot, host tier": {"device_memory": "min", "host_memory": 300_000},
}


def prompts_of(tiny: Tiny, lengths: tuple[int, ...] = (1, 7, 40, 23)) -> list[list[int]]:
    choose = random.Random(tiny.seed)
    return [[choose.randrange(tiny.vocab) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_fp32_tokens_and_logprobs_equal_transformers(name: str, tmp_path: Path) -> None:
    tiny = CHECKPOINTS[name]
    path = tiny.write(tmp_path)
    prompts = prompts_of(tiny)
    expected = transformers_answers(path, prompts, NEW_TOKENS)
    for place, budgets in PLACES.items():
        # 32 tokens a step: prompts are prefilled in chunks, beside others that decode.
        with running_engine(path, **budgets, **{"scheduler.max_batch_tokens": 32}) as engine:
            requests = greedy(prompts, NEW_TOKENS)
            batch = run(engine, requests)
            alone = [run(engine, [request])[0] for request in requests]
        for together, single, answer in zip(batch, alone, expected, strict=True):
            assert token_ids(together) == answer.token_ids, place
            assert token_ids(single) == answer.token_ids, place
            for events in (together, single):
                logprobs = [event.logprob for event in events]
                # float32 rounds differently with the number of rows in a product.
                assert logprobs == pytest.approx(answer.logprobs, abs=2e-4), place


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("backend", ["resident", "zero3"])
def test_half_precision_tokens_do_not_depend_on_places(
    dtype: str, backend: str, tmp_path: Path
) -> None:
    tiny = Tiny(dtype=dtype, seed=20)
    path = tiny.write(tmp_path)
    requests = greedy(prompts_of(tiny), NEW_TOKENS)
    outcomes = []
    for budgets in PLACES.values():
        with running_engine(path, **budgets, dense_backend=backend) as engine:
            outcomes.append(run(engine, requests))
    for outcome in outcomes[1:]:
        assert told(outcome) == told(outcomes[0])


@pytest.mark.parametrize("seed", range(3))
def test_bf16_tokens_do_not_depend_on_neighbours(seed: int, tmp_path: Path) -> None:
    if torch.ops.mkldnn._is_mkldnn_bf16_supported() and not native.is_available():
        pytest.skip("oneDNN's bfloat16 products round by the number of rows; see benchmarks/LOG.md")
    tiny = Tiny(dtype="bfloat16", seed=seed)
    path = tiny.write(tmp_path)
    requests = greedy(prompts_of(tiny, (61, 5, 33, 90, 17, 48, 75, 26)), 48)
    with running_engine(path, **{"scheduler.max_batch_tokens": 64}) as engine:
        batch = run(engine, requests)
        alone = [run(engine, [request])[0] for request in requests]
    assert told(batch) == told(alone)


STORES = {
    "bf16": StoreFormat(WeightFormat.BFLOAT16, WeightFormat.BFLOAT16, 128),
    "int8": StoreFormat(WeightFormat.BFLOAT16, WeightFormat.INT8, 128),
    "int4": StoreFormat(WeightFormat.BFLOAT16, WeightFormat.INT4, 32),
    "int4, dense int8": StoreFormat(WeightFormat.BFLOAT16, WeightFormat.INT4, 128, dense_int8=True),
    "int4 of float16": StoreFormat(WeightFormat.FLOAT16, WeightFormat.INT4, 32),
    "int8 of float32": StoreFormat(WeightFormat.FLOAT32, WeightFormat.INT8, 64),
}
SHAPES = (Tiny(dtype="bfloat16"), Tiny(dtype="bfloat16", tied=True, hidden=52, intermediate=37))


@pytest.mark.parametrize("shape", range(len(SHAPES)))
@pytest.mark.parametrize("name", STORES)
def test_packed_tokens_do_not_depend_on_places_or_neighbours(
    name: str, shape: int, tmp_path: Path
) -> None:
    tiny = replace(SHAPES[shape], dtype=STORES[name].dtype.value, head_dim=10)
    source, store = tiny.write(tmp_path / "source"), tmp_path / "store"
    pack(source, store, STORES[name], assess=lambda _store, _rounding: {})
    requests = greedy(prompts_of(tiny, (61, 5, 33, 40)), 32)
    outcomes = []
    for budgets in ({"prefetch": False}, *PLACES.values()):
        with running_engine(store, **budgets, **{"scheduler.max_batch_tokens": 64}) as engine:
            outcomes.append(told(run(engine, requests)))
            outcomes.append(told([run(engine, [request])[0] for request in requests]))
    for outcome in outcomes[1:]:
        if STORES[name].dtype is not WeightFormat.BFLOAT16:
            # The dense layers are the library's, and round by the number of rows.
            tokens = [[token for token, _ in events] for events in outcome]
            assert tokens == [[token for token, _ in events] for events in outcomes[0]]
        else:
            assert outcome == outcomes[0]


def told(answers: Sequence[Sequence[TokenEvent]]) -> list[list[tuple[int, float | None]]]:
    """Tokens and log-probabilities, to be compared bit for bit."""
    return [[(event.token_id, event.logprob) for event in events] for events in answers]


def test_sampled_tokens_depend_on_the_seed_alone(tmp_path: Path) -> None:
    tiny = Tiny(seed=21)
    path = tiny.write(tmp_path)
    sampling = Sampling(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, seed=7)
    requests = greedy(prompts_of(tiny), 32, sampling)
    with running_engine(path) as engine:
        batch = [token_ids(events) for events in run(engine, requests)]
    with running_engine(path, device_memory="min") as engine:
        alone = [token_ids(run(engine, [request])[0]) for request in requests]
    assert batch == alone
