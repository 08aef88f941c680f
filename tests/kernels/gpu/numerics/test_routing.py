"""Routing against float64, near-ties and nonsense included; sums against the CPU's."""

import random

import pytest
import torch
import torch.nn.functional as F

from moe_server.kernels.gpu import routing
from moe_server.kernels.gpu.combine import combine
from moe_server.kernels.gpu.reference import plan_reference, route_reference
from moe_server.kernels.gpu.routing import plan_chosen, route
from moe_server.kernels.routing import combine as combine_on_cpu
from moe_server.kernels.routing import plan_routing
from tests.kernels.gpu.numerics.device import DEVICE


def exact_router(num_tokens, num_experts, hidden_size, seed):
    """Whole numbers small enough that no sum in float32 rounds, in any order."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-8, 9, (num_tokens, hidden_size), generator=generator)
    gate = torch.randint(-8, 9, (num_experts, hidden_size), generator=generator)
    # The temperature of real logits; a power of two is exact too.
    return x.bfloat16().to(DEVICE), (gate / 64).bfloat16().to(DEVICE)


@pytest.mark.parametrize("num_tokens", [1, 8, 16, 17, 65])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "hidden_size"), [(8, 2, 640), (8, 2, 100), (5, 1, 48), (60, 4, 200)]
)
def test_routes_as_float64_does(num_tokens, num_experts, top_k, hidden_size):
    x, gate = exact_router(num_tokens, num_experts, hidden_size, seed=num_tokens)
    logits, plan = route(x, gate, top_k)
    expected_logits, expected = route_reference(x, gate, top_k)
    assert torch.equal(logits.double(), expected_logits)
    assert torch.equal(plan.expert_ids, expected.expert_ids)
    assert (plan.weights - expected.weights).abs().max() < 1e-6
    assert torch.equal(plan.order, expected.order)
    assert torch.equal(plan.offsets, expected.offsets)


def test_more_tiles_than_one_look_at_the_counts_takes(monkeypatch):
    monkeypatch.setattr(routing, "PLACE_TILES_AT_ONCE", 2)
    x, gate = exact_router(5 * 16 + 3, 4, 16, seed=3)
    _, plan = route(x, gate, 2)
    expected = plan_reference(plan.expert_ids, 4)
    assert torch.equal(plan.order, expected.order)
    assert torch.equal(plan.offsets, expected.offsets)


def test_what_the_host_reads_is_the_plan_of_the_cpu():
    x, gate = exact_router(40, 8, 64, seed=4)
    gate[3] = gate[6] = 0
    x[:] = x.abs()
    gate[1] = 1
    _, plan = route(x, gate, 2)
    expected = plan_routing(plan.expert_ids, plan.weights, 8)
    assert plan.experts() == expected.experts()
    assert len(expected.experts()) < 8
    assert plan.host_offsets == expected.offsets
    for expert in range(8):
        assert plan.count_of(expert) == expected.count_of(expert)
        assert torch.equal(plan.rows_of(expert), expected.rows_of(expert))
        assert (plan.expert_ids.flatten()[plan.picks_of(expert)] == expert).all()


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 8, 2), (40, 8, 2), (5, 3, 3)])
def test_another_router_s_choice_gives_the_same_plan(num_tokens, num_experts, top_k):
    x, gate = exact_router(num_tokens, num_experts, 64, seed=7)
    _, plan = route(x, gate, top_k)
    other = plan_chosen(plan.expert_ids, plan.weights, num_experts)
    for field in ("expert_ids", "weights", "order", "offsets"):
        assert torch.equal(getattr(other, field), getattr(plan, field))


def test_more_experts_than_the_programs_have_tiles_for():
    x, gate = exact_router(7, 80, 64, seed=8)
    logits, plan = route(x, gate, 3)
    expected_logits, expected = route_reference(x, gate, 3)
    assert torch.equal(logits.double(), expected_logits)
    # Of equal logits torch may take another.
    assert torch.equal(logits.gather(1, plan.expert_ids), logits.gather(1, expected.expert_ids))
    assert torch.equal(plan.order, plan_reference(plan.expert_ids, 80).order)


def test_logits_are_rounded_before_they_are_compared():
    # 257 and 256 are one number in bfloat16: the lower expert is the first of equals.
    x = torch.ones(1, 32, dtype=torch.bfloat16, device=DEVICE)
    logits = [3.0, 256.0, 257.0, 7.0, 256.0]
    gate = torch.zeros(5, 32, dtype=torch.bfloat16, device=DEVICE)
    for expert, logit in enumerate(logits):
        gate[expert, 0] = 256.0 if logit > 255 else logit
        gate[expert, 1] = logit - gate[expert, 0]
    _, plan = route(x, gate, 2)
    assert plan.expert_ids.tolist() == [[1, 2]]
    assert plan.weights[0].tolist() == pytest.approx([0.5, 0.5], rel=1e-6)
    # 259 rounds up to 260, as ties to even have it: truncation would make it 258.
    gate[4, 1] = 3.0
    _, plan = route(x, gate, 2)
    assert plan.expert_ids.tolist() == [[4, 1]]
    assert plan.weights[0, 1].item() == pytest.approx(1 / (1 + 2.718281828**4), rel=1e-5)


@pytest.mark.parametrize("num_tokens", [16, 64])
def test_takes_what_transformers_takes_but_for_the_order_of_equals(num_tokens):
    x, gate = exact_router(num_tokens, 8, 640, seed=6)
    logits, plan = route(x, gate, 2)
    ids, weights = plan.expert_ids, plan.weights
    assert torch.equal(logits, F.linear(x, gate))
    theirs, their_ids = logits.float().softmax(-1).topk(2, dim=-1)
    assert torch.equal(logits.gather(1, ids), logits.gather(1, their_ids))
    assert (weights - theirs / theirs.sum(-1, keepdim=True)).abs().max() < 1e-6
    # There is something to round: without it others would be first.
    exact = F.linear(x.double(), gate.double())
    assert not torch.equal(exact.topk(2, dim=-1).values, logits.gather(1, ids).double())


def test_all_experts_alike_gives_the_lowest_numbers():
    x = torch.ones(3, 16, dtype=torch.bfloat16, device=DEVICE)
    gate = torch.ones(8, 16, dtype=torch.bfloat16, device=DEVICE)
    _, plan = route(x, gate, 3)
    assert plan.expert_ids.tolist() == [[0, 1, 2]] * 3
    assert plan.offsets.tolist() == [0, 3, 6, 9, 9, 9, 9, 9, 9]


@pytest.mark.parametrize("num_tokens", [2, 20])
def test_nonsense_has_experts_all_the_same(num_tokens):
    x, gate = exact_router(num_tokens, 8, 64, seed=5)
    _, sane = route(x, gate, 2)
    x[0, 5], x[1, 6] = float("nan"), float("inf")
    _, plan = route(x, gate, 2)
    ids, weights = plan.expert_ids, plan.weights
    assert ((ids >= 0) & (ids < 8)).all()
    assert (ids[:, 0] != ids[:, 1]).all()
    assert torch.equal(plan.order, plan_reference(ids, 8).order)
    assert weights[:2].isnan().any(dim=1).all()
    assert torch.equal(weights[2:], sane.weights[2:])
    assert torch.equal(ids[2:], sane.expert_ids[2:])


@pytest.mark.parametrize(("num_tokens", "top_k", "hidden_size"), [(1, 2, 64), (9, 3, 1300)])
def test_sums_have_the_bits_of_the_cpu_s(num_tokens, top_k, hidden_size):
    choose, generator = random.Random(0), torch.Generator().manual_seed(0)
    ids = torch.tensor([choose.sample(range(8), top_k) for _ in range(num_tokens)])
    outputs = torch.randn(num_tokens * top_k, hidden_size, generator=generator).bfloat16()
    weights = torch.rand(num_tokens, top_k, generator=generator).softmax(-1)
    total = combine(outputs.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE))
    # The host's outputs are in the plan's order, a GPU's in that of tokens and choices.
    plan, in_plan = plan_routing(ids, weights, 8), torch.empty_like(outputs)
    by_token = outputs.view(num_tokens, top_k, hidden_size)
    in_plan[plan.places] = by_token.take_along_dim(ids.argsort(dim=-1)[..., None], dim=1)
    assert torch.equal(total.cpu(), combine_on_cpu(in_plan, plan))
    exact = outputs.double().view(num_tokens, top_k, -1) * weights.double()[..., None]
    bound = 2 * top_k * torch.finfo(torch.bfloat16).eps * exact.abs().sum(1)
    assert ((total.cpu() - exact.sum(1)).abs() <= bound).all()
