"""Plans against a brute-force grouping, sums against float64."""

import random

import pytest
import torch

from moe_server.kernels.routing import combine, plan_routing


def random_picks(choose: random.Random, tokens: int, choices: int, experts: int) -> torch.Tensor:
    return torch.tensor([choose.sample(range(experts), choices) for _ in range(tokens)])


@pytest.mark.parametrize("seed", range(20))
def test_plan_groups_picks_by_expert_and_then_by_token(seed):
    choose = random.Random(seed)
    num_experts = choose.randint(1, 16)
    expert_ids = random_picks(
        choose, choose.randint(1, 70), choose.randint(1, min(4, num_experts)), num_experts
    )
    groups = {}
    for pick, expert in enumerate(expert_ids.flatten().tolist()):
        groups.setdefault(expert, []).append(pick)
    plan = plan_routing(expert_ids, num_experts)
    assert plan.experts == tuple(sorted(groups))
    assert len(plan.offsets) == len(plan.experts) + 1
    assert plan.offsets[0] == 0
    assert plan.order.shape == (expert_ids.numel(),)
    for number, expert in enumerate(plan.experts):
        picks = plan.order[plan.offsets[number] : plan.offsets[number + 1]]
        assert picks.tolist() == groups[expert]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(6))
def test_combine_sums_what_float64_sums(dtype, seed):
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    tokens, choices, hidden = choose.randint(1, 20), choose.randint(1, 4), 24
    expert_ids = random_picks(choose, tokens, choices, 8)
    outputs = torch.randn(tokens * choices, hidden, generator=generator).to(dtype)
    weights = torch.rand(tokens, choices, generator=generator).softmax(-1)
    expected = (outputs.double().view(tokens, choices, hidden) * weights.double()[..., None]).sum(1)
    combined = combine(outputs, expert_ids, weights)
    assert combined.dtype == dtype
    # One rounding of each product and of each sum.
    magnitude = (outputs.double().abs().view(tokens, choices, hidden) * weights[..., None]).sum(1)
    bound = 2 * choices * torch.finfo(dtype).eps * magnitude + 1e-7
    assert ((combined.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_in_order_of_experts_whatever_the_order_of_choices(dtype):
    generator = torch.Generator().manual_seed(0)
    expert_ids = torch.tensor([[6, 1, 4, 3]])
    outputs = (torch.randn(4, 200, generator=generator) * 10).to(dtype)
    weights = torch.rand(1, 4, generator=generator)
    expected = torch.zeros(200, dtype=dtype)
    for choice in (1, 3, 2, 0):
        expected += (outputs[choice].float() * weights[0, choice]).to(dtype)
    assert torch.equal(combine(outputs, expert_ids, weights)[0], expected)
    for order in ([3, 2, 1, 0], [1, 0, 3, 2]):
        shuffled = combine(outputs[order], expert_ids[:, order], weights[:, order])
        assert torch.equal(shuffled[0], expected)
    # The test can fail: another order gives another sum.
    other = sum((outputs[c].float() * weights[0, c]).to(dtype) for c in range(4))
    assert not torch.equal(other, expected)
