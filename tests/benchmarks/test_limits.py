"""The least bytes, against published figures and against a simulated cache."""

import random

import pytest

from benchmarks.limits import Mixture

MIXTRAL_4 = Mixture(
    num_layers=4, num_experts=8, top_k=2, expert_bytes=352_321_536, dense_bytes=860_168_192
)


def test_half_of_four_mixtral_layers_must_read_1524_mb_a_token() -> None:
    half = (MIXTRAL_4.dense_bytes + 32 * MIXTRAL_4.expert_bytes) // 2
    assert MIXTRAL_4.least_read_bytes(half, 1) == pytest.approx(1524e6, rel=0.01)


def test_what_fits_reads_nothing_and_what_has_no_room_reads_every_pick() -> None:
    whole = MIXTRAL_4.dense_bytes + 32 * MIXTRAL_4.expert_bytes
    assert MIXTRAL_4.least_read_bytes(whole, 8) == 0
    assert MIXTRAL_4.least_read_bytes(2 * whole, 8) == 0
    dense_only = MIXTRAL_4.dense_bytes - 1
    assert MIXTRAL_4.least_read_bytes(dense_only, 1) == 4 * 2 * MIXTRAL_4.expert_bytes


@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_agrees_with_a_static_cache_under_uniform_routing(tokens: int) -> None:
    mixture = Mixture(num_layers=1, num_experts=8, top_k=2, expert_bytes=1000, dense_bytes=500)
    kept, rng, missed, steps = set(range(3)), random.Random(tokens), 0, 4000
    for _ in range(steps):
        wanted = {expert for _ in range(tokens) for expert in rng.sample(range(8), 2)}
        missed += len(wanted - kept) * 1000
    assert mixture.least_read_bytes(500 + 3 * 1000, tokens) == pytest.approx(
        missed / steps, rel=0.03
    )
