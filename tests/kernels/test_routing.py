"""Routing against float64 and torch.topk, plans against a loop, sums bit for bit."""

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_server.kernels import native
from moe_server.kernels.formats import MatrixLayout, WeightFormat
from moe_server.kernels.products import linear, prepare
from moe_server.kernels.routing import RoutingPlan, combine, plan_routing, route

compiled = pytest.mark.skipif(
    not native.is_available(), reason=f"no compiled kernels: {native.unavailable_reason()}"
)
SIZES = [(8, 2), (8, 1), (8, 4), (5, 3), (3, 3), (1, 1), (16, 4), (64, 1), (128, 2), (256, 8)]
NUM_TOKENS = [0, 1, 2, 5, 8, 15, 16, 17, 49, 130, 700]


@pytest.fixture(params=["torch", *native.INSTRUCTION_SETS])
def way(request, monkeypatch):
    """Every instruction set of the compiled kernels, and torch without them."""
    if request.param == "torch":
        monkeypatch.setattr("moe_server.kernels.native.is_available", lambda: False)
        yield request.param
        return
    if request.param not in native.supported_instruction_sets():
        pytest.skip(f"no {request.param} here")
    before = native.instruction_set()
    native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set(before)


def random_picks(choose: random.Random, tokens: int, choices: int, experts: int) -> torch.Tensor:
    return torch.tensor([choose.sample(range(experts), choices) for _ in range(tokens)])


def random_input(
    tokens: int, hidden: int, experts: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    return x, (torch.randn(experts, hidden, generator=generator) / hidden**0.5).bfloat16()


def of_hugging_face(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts, ascending, and weights of rounded logits, operation by operation as its router."""
    weights, experts = F.softmax(logits.float(), dim=-1).topk(top_k, dim=-1)
    experts, order = experts.sort(dim=-1)
    return experts, (weights / weights.sum(dim=-1, keepdim=True)).gather(1, order)


def check_plan(plan: RoutingPlan, num_experts: int) -> None:
    """The plan against a grouping by a loop."""
    groups = [[] for _ in range(num_experts)]
    for token, experts in enumerate(plan.expert_ids.tolist()):
        assert experts == sorted(set(experts))
        for expert in experts:
            groups[expert].append(token)
    assert plan.experts() == [expert for expert in range(num_experts) if groups[expert]]
    assert len(plan.offsets) == num_experts + 1
    assert plan.offsets[0] == 0
    assert plan.offsets[-1] == len(plan.rows) == plan.expert_ids.numel()
    for expert in range(num_experts):
        assert plan.rows_of(expert).tolist() == groups[expert]
        assert plan.rows[plan.picks_of(expert)].tolist() == groups[expert]
    for token, (experts, places) in enumerate(
        zip(plan.expert_ids.tolist(), plan.places.tolist(), strict=True)
    ):
        for expert, place in zip(experts, places, strict=True):
            assert plan.offsets[expert] <= place < plan.offsets[expert + 1]
            assert plan.rows[place] == token


# The router


@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
@pytest.mark.parametrize("tokens", [1, 17, 130])
def test_a_route_is_that_of_float64(way, num_experts, top_k, tokens):
    x, gate = random_input(tokens, 300, num_experts, seed=num_experts + tokens)
    logits, plan = route(x, gate, top_k)
    exact = x.double() @ gate.double().T
    # A rounding of the sum, which errs by a little itself.
    bound = exact.abs() * 2.0**-8 + (x.double().abs() @ gate.double().abs().T) * 2.0**-20
    assert ((logits.double() - exact).abs() <= bound).all()
    probabilities = logits.double().softmax(dim=-1)
    chosen = probabilities.gather(1, plan.expert_ids)
    others = probabilities.scatter(1, plan.expert_ids, -1.0).amax(dim=-1)
    # Exact ties are another test's.
    assert (chosen.amin(dim=-1) >= others * (1 - 1e-6)).all()
    expected = chosen / chosen.sum(dim=-1, keepdim=True)
    assert torch.allclose(plan.weights.double(), expected, rtol=2e-6, atol=1e-30)
    assert logits.dtype is torch.bfloat16
    assert plan.weights.dtype is torch.float32
    check_plan(plan, num_experts)


@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_exact_ties_break_as_in_the_hugging_face_model(way, num_experts, top_k):
    generator = torch.Generator().manual_seed(num_experts)
    # A router that hands its input on: few different logits, so nearly every token has ties.
    logits = torch.randint(-2, 3, (600, num_experts), generator=generator).bfloat16()
    logits[:9] = torch.tensor([0.0, 1.0, -1.0]).bfloat16().repeat(3)[:, None]
    told, plan = route(logits, torch.eye(num_experts).bfloat16(), top_k)
    assert torch.equal(told, logits)
    experts, weights = of_hugging_face(logits, top_k)
    assert torch.equal(plan.expert_ids, experts)
    assert torch.allclose(plan.weights, weights, rtol=1e-6, atol=0)
    check_plan(plan, num_experts)


def test_ties_are_what_rounding_makes_of_near_ties(way):
    # Apart in float32, equal in bfloat16; and equal in probability, though not as logits.
    x = torch.zeros(2, 4, dtype=torch.bfloat16)
    x[0] = torch.tensor([1.0, 2.0**-9, 1.0, 0.0])
    x[1] = torch.tensor([8.0, 0.0, 1e-9, 3e-9])
    gate = torch.eye(4).bfloat16()
    gate[0, 1] = 1.0
    logits, plan = route(x, gate, 1)
    assert logits[0, 0] == logits[0, 2]
    assert torch.equal(plan.expert_ids, of_hugging_face(logits, 1)[0])
    logits, plan = route(x, torch.eye(4).bfloat16(), 2)
    assert torch.equal(plan.expert_ids, of_hugging_face(logits, 2)[0])


def test_logits_far_apart(way):
    # Beyond what the kernels' exponential tells apart, and beyond what float32 does.
    logits = torch.tensor([[0.0, -95, -90, -200], [300, -304, -300, -400], [-1e4, 1e4, -1e30, 7]])
    told, plan = route(logits.bfloat16(), torch.eye(4).bfloat16(), 2)
    experts, weights = of_hugging_face(told, 2)
    assert torch.equal(plan.expert_ids, experts)
    assert plan.expert_ids[0].tolist() == [0, 2]
    assert torch.allclose(plan.weights, weights, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_number_that_is_none_spoils_its_token_and_no_other(way, bad):
    x, gate = random_input(20, 64, 8)
    logits, plan = route(x, gate, 2)
    x[3, 5] = bad
    spoilt_logits, spoilt = route(x, gate, 2)
    others = torch.arange(20) != 3
    assert torch.equal(spoilt_logits[others], logits[others])
    assert torch.equal(spoilt.expert_ids[others], plan.expert_ids[others])
    assert torch.equal(spoilt.weights[others], plan.weights[others])
    assert spoilt.weights[3].isnan().all()
    check_plan(spoilt, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_routed_by_torch(dtype):
    x, gate = (values.to(dtype) for values in random_input(30, 64, 8))
    logits, plan = route(x, gate, 3)
    assert torch.equal(logits, F.linear(x, gate))
    experts, weights = of_hugging_face(logits, 3)
    assert torch.equal(plan.expert_ids, experts)
    assert torch.equal(plan.weights, weights)
    check_plan(plan, 8)


@compiled
@settings(max_examples=60)
@given(st.sampled_from(NUM_TOKENS), st.integers(1, 20), st.integers(1, 300), st.data())
def test_a_token_s_bits_do_not_depend_on_its_company(tokens, num_experts, hidden, data):
    top_k = data.draw(st.integers(1, num_experts))
    x, gate = random_input(tokens, hidden, num_experts, seed=hidden)
    threads, instruction_set = native.num_threads(), native.instruction_set()
    try:
        native.set_num_threads(1)
        expected_logits, expected = route(x, gate, top_k)
        # The sums of every other product of ours.
        layout = MatrixLayout(num_experts, hidden, WeightFormat.BFLOAT16)
        product = torch.empty(tokens, num_experts, dtype=torch.bfloat16)
        linear(prepare(x, layout), gate.view(-1).view(torch.uint8), layout, product)
        assert torch.equal(expected_logits, product)
        for name in native.supported_instruction_sets():
            native.use_instruction_set(name)
            native.set_num_threads(data.draw(st.integers(1, 3)))
            logits, plan = route(x, gate, top_k)
            assert torch.equal(logits, expected_logits)
            for field in ("expert_ids", "weights", "rows", "places"):
                assert torch.equal(getattr(plan, field), getattr(expected, field))
            assert plan.offsets == expected.offsets
            if tokens:
                one = data.draw(st.integers(0, tokens - 1))
                logits, alone = route(x[one : one + 1], gate, top_k)
                assert torch.equal(logits[0], expected_logits[one])
                assert torch.equal(alone.expert_ids[0], expected.expert_ids[one])
                assert torch.equal(alone.weights[0], expected.weights[one])
    finally:
        native.use_instruction_set(instruction_set)
        native.set_num_threads(threads)


@compiled
@pytest.mark.parametrize("num_experts", [8, 11, 16])
@pytest.mark.parametrize("hidden", [64, 1056, 2048])
def test_shapes_of_large_batches_have_the_same_bits(num_experts, hidden):
    # Their tiles, passes and blocks of columns, each with a remainder.
    x, gate = random_input(197, hidden, num_experts)
    before = native.instruction_set()
    try:
        native.use_instruction_set("scalar")
        expected, plan = route(x, gate, 2)
        for name in native.supported_instruction_sets():
            native.use_instruction_set(name)
            for tokens in (7, 8, 9, 10, 33, 48, 49, 197):
                logits, some = route(x[:tokens], gate, 2)
                assert torch.equal(logits, expected[:tokens])
                assert torch.equal(some.weights, plan.weights[:tokens])
    finally:
        native.use_instruction_set(before)


@compiled
def test_more_experts_than_the_kernels_take_are_routed_by_torch():
    num_experts = native.MOST_EXPERTS + 1
    x, gate = random_input(9, 32, num_experts)
    logits, plan = route(x, gate, 2)
    assert torch.equal(plan.expert_ids, of_hugging_face(logits, 2)[0])
    check_plan(plan, num_experts)


# The plan


@pytest.mark.parametrize("seed", range(20))
def test_plan_groups_picks_by_expert_and_then_by_token(way, seed):
    choose = random.Random(seed)
    num_experts = choose.randint(1, 16)
    chosen = random_picks(
        choose, choose.randint(1, 70), choose.randint(1, min(4, num_experts)), num_experts
    )
    weights = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(seed))
    plan = plan_routing(chosen, weights, num_experts)
    check_plan(plan, num_experts)
    for token, experts in enumerate(chosen.tolist()):
        assert sorted(experts) == plan.expert_ids[token].tolist()
        of_expert = dict(zip(experts, weights[token].tolist(), strict=True))
        in_order = [of_expert[expert] for expert in plan.expert_ids[token].tolist()]
        assert plan.weights[token].tolist() == in_order


# The sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(6))
def test_combine_sums_what_float64_sums(way, dtype, seed):
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    tokens, choices, hidden = choose.randint(1, 20), choose.randint(1, 4), 300
    weights = torch.rand(tokens, choices, generator=generator).softmax(-1)
    plan = plan_routing(random_picks(choose, tokens, choices, 8), weights, 8)
    outputs = torch.randn(tokens * choices, hidden, generator=generator).to(dtype)
    terms = outputs.double()[plan.places] * plan.weights.double()[..., None]
    combined = combine(outputs, plan)
    assert combined.dtype == dtype
    # One rounding of each product and of each sum.
    bound = 2 * choices * torch.finfo(dtype).eps * terms.abs().sum(1) + 1e-7
    assert ((combined.double() - terms.sum(1)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [1, 127, 200, 4096])
def test_the_sum_is_in_order_of_experts_whatever_the_order_of_choices(way, dtype, hidden):
    generator = torch.Generator().manual_seed(0)
    chosen = torch.tensor([[6, 1, 4, 3], [0, 7, 5, 2]])
    outputs = (torch.randn(2, 4, hidden, generator=generator) * 10).to(dtype)
    weights = torch.rand(2, 4, generator=generator)
    expected = torch.zeros(2, hidden, dtype=dtype)
    for token, choices in enumerate(chosen.argsort(dim=-1).tolist()):
        for choice in choices:
            expected[token] += (outputs[token, choice].float() * weights[token, choice]).to(dtype)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]):
        plan = plan_routing(chosen[:, order], weights[:, order], 8)
        in_plan = torch.empty(8, hidden, dtype=dtype)
        in_plan[plan.places] = outputs.gather(
            1, chosen.argsort(dim=-1)[..., None].expand(-1, -1, hidden)
        )
        assert torch.equal(combine(in_plan, plan), expected)
    if hidden == 4096:
        # The test can fail: another order gives another sum.
        other = sum((outputs[:, c].float() * weights[:, c, None]).to(dtype) for c in range(4))
        assert not torch.equal(other, expected)


@compiled
@pytest.mark.parametrize("bad", [-1, 8, 300])
def test_the_compiled_plan_takes_no_expert_that_there_is_not(bad):
    with pytest.raises(AssertionError):
        plan_routing(torch.tensor([[1, bad]]), torch.ones(1, 2), 8)
