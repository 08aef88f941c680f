"""Grouped SwiGLU against float64, in every format, tile and division into passes."""

import random

import pytest
import torch
import torch.nn.functional as F

from moe_server.kernels.formats import WeightFormat
from moe_server.kernels.gpu.experts import grouped_swiglu
from moe_server.kernels.gpu.reference import plan_reference, swiglu_reference
from moe_server.kernels.gpu.tiles import FORMATS, down_tiles, expert_tile, gate_up_tiles
from tests.kernels.gpu.numerics.device import DEVICE
from tests.kernels.gpu.numerics.slots import random_slots, slot_layout

NUM_EXPERTS = 4
UNTOUCHED = -123.0
BY_NAME = {"ids": lambda value: getattr(value, "value", value)}


def picks(num_tokens, seed, experts=range(NUM_EXPERTS), top_k=2):
    choose = random.Random(seed)
    chosen = [choose.sample(list(experts), top_k) for _ in range(num_tokens)]
    return torch.tensor(chosen, device=DEVICE)


def activations(num_tokens, hidden_size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, hidden_size, generator=generator).bfloat16().to(DEVICE)


def empty_outputs(ids_TK, hidden_size):
    shape = ids_TK.numel(), hidden_size
    return torch.full(shape, UNTOUCHED, dtype=torch.bfloat16, device=DEVICE)


def check(x_TH, ids_TK, slots, outputs_PH, computed=range(NUM_EXPERTS)):
    experts = {expert: slots.experts[expert] for expert in computed}
    expected, bound = swiglu_reference(x_TH, ids_TK, experts)
    is_computed = torch.isin(ids_TK.flatten(), torch.tensor(list(computed), device=DEVICE))
    assert ((outputs_PH.double() - expected).abs() <= bound)[is_computed].all()
    assert (outputs_PH[~is_computed] == UNTOUCHED).all()


@pytest.mark.parametrize("num_tokens", [1, 8, 20, 65])
@pytest.mark.parametrize("sizes", [(128, 64), (150, 37)], **BY_NAME)
@pytest.mark.parametrize("weight_format", FORMATS, **BY_NAME)
def test_every_pick_gets_its_expert_s_output(weight_format, sizes, num_tokens):
    slots = random_slots(slot_layout(weight_format, *sizes), NUM_EXPERTS, seed=num_tokens)
    x, ids = activations(num_tokens, sizes[0], 0), picks(num_tokens, 1)
    outputs = empty_outputs(ids, sizes[0])
    plan = plan_reference(ids, NUM_EXPERTS)
    grouped_swiglu(x, plan, slots.every(), slots.arena, slots.layout, outputs)
    check(x, ids, slots, outputs)


@pytest.mark.parametrize("weight_format", FORMATS, **BY_NAME)
def test_these_numbers_of_tokens_use_every_tile(weight_format):
    layout = slot_layout(weight_format, 64, 32)
    for tiles in (gate_up_tiles(layout.w13), down_tiles(layout.w2)):
        used = {expert_tile(tiles, 2 * tokens, NUM_EXPERTS) for tokens in (1, 8, 20, 65)}
        assert used == set(tiles)


@pytest.mark.parametrize("group_columns", [32, 64])
@pytest.mark.parametrize(
    ("weight_format", "num_tokens"),
    # The tiles of int8 know no groups, but its padded columns do.
    [(WeightFormat.INT8, 8), *((WeightFormat.INT4, tokens) for tokens in (8, 20, 65))],
    **BY_NAME,
)
def test_groups_of_every_size(weight_format, group_columns, num_tokens):
    layout = slot_layout(weight_format, 150, 40, group_columns)
    slots = random_slots(layout, NUM_EXPERTS, seed=2)
    x, ids = activations(num_tokens, 150, 0), picks(num_tokens, 1)
    outputs = empty_outputs(ids, 150)
    plan = plan_reference(ids, NUM_EXPERTS)
    grouped_swiglu(x, plan, slots.every(), slots.arena, layout, outputs)
    check(x, ids, slots, outputs)


@pytest.mark.parametrize("weight_format", FORMATS, **BY_NAME)
def test_each_weight_counts_as_what_it_stands_for(weight_format):
    # One column of x is 1, the others 0: gate and up are single weights.
    layout = slot_layout(weight_format, 40, 50)
    slots = random_slots(layout, 1, seed=5)
    ids = torch.zeros(40, 1, dtype=torch.int64, device=DEVICE)
    x = torch.eye(40, dtype=torch.bfloat16, device=DEVICE)
    hidden = torch.empty(40, 50, dtype=torch.bfloat16, device=DEVICE)
    outputs = empty_outputs(ids, 40)
    plan = plan_reference(ids, 1)
    grouped_swiglu(x, plan, slots.every(), slots.arena, layout, outputs, hidden)
    w1, w3, w2 = slots.experts[0]
    expected = F.silu(w1.T) * w3.T
    assert ((hidden - expected).abs() <= 2.0**-8 * 1.01 * expected.abs() + 1e-30).all()
    expected, size = hidden.double() @ w2.T, hidden.double().abs() @ w2.abs().T
    assert ((outputs - expected).abs() <= 2.0**-8 * 1.01 * expected.abs() + 2e-7 * size).all()


@pytest.mark.parametrize("num_tokens", [1, 8, 65])
@pytest.mark.parametrize("weight_format", FORMATS, **BY_NAME)
def test_passes_with_complementary_tables_are_one_pass(weight_format, num_tokens):
    slots = random_slots(slot_layout(weight_format, 48, 40), NUM_EXPERTS, seed=7)
    x, ids = activations(num_tokens, 48, 3), picks(num_tokens, 4)
    plan = plan_reference(ids, NUM_EXPERTS)
    once = empty_outputs(ids, 48)
    grouped_swiglu(x, plan, slots.every(), slots.arena, slots.layout, once)
    check(x, ids, slots, once)
    outputs = empty_outputs(ids, 48)
    resident, arrived = (1, 3), (0, 2)
    grouped_swiglu(x, plan, slots.only(*resident), slots.arena, slots.layout, outputs)
    check(x, ids, slots, outputs, computed=resident)
    grouped_swiglu(x, plan, slots.only(*arrived), slots.arena, slots.layout, outputs)
    assert torch.equal(outputs, once)


@pytest.mark.parametrize("weight_format", FORMATS, **BY_NAME)
def test_experts_without_rows_are_nobody_s_concern(weight_format):
    slots = random_slots(slot_layout(weight_format, 64, 32), NUM_EXPERTS, seed=8)
    x, ids = activations(9, 64, 5), picks(9, 6, experts=(1, 3))
    outputs = empty_outputs(ids, 64)
    plan = plan_reference(ids, NUM_EXPERTS)
    grouped_swiglu(x, plan, slots.only(1, 3), slots.arena, slots.layout, outputs)
    check(x, ids, slots, outputs)
    nothing = empty_outputs(ids, 64)
    grouped_swiglu(x, plan, slots.only(0, 2), slots.arena, slots.layout, nothing)
    assert (nothing == UNTOUCHED).all()


@pytest.mark.parametrize("weight_format", FORMATS, **BY_NAME)
def test_slots_lie_beyond_2_to_the_31(weight_format):
    layout = slot_layout(weight_format, 64, 32, stride_bytes=2**30)
    slots = random_slots(layout, 2, seed=9, slots=[0, 3])
    x, ids = activations(3, 64, 5), torch.tensor([[1, 0]] * 3, device=DEVICE)
    outputs = empty_outputs(ids, 64)
    grouped_swiglu(x, plan_reference(ids, 2), slots.every(), slots.arena, layout, outputs)
    check(x, ids, slots, outputs, computed=(0, 1))


def test_a_row_s_bits_do_not_depend_on_its_neighbours():
    slots = random_slots(slot_layout(WeightFormat.INT4, 136, 32), NUM_EXPERTS, seed=10)
    x, ids = activations(12, 136, 6), picks(12, 7)
    outputs = empty_outputs(ids, 136)
    plan = plan_reference(ids, NUM_EXPERTS)
    grouped_swiglu(x, plan, slots.every(), slots.arena, slots.layout, outputs)
    for token in (0, 5):
        alone = empty_outputs(ids[:1], 136)
        plan = plan_reference(ids[token : token + 1], NUM_EXPERTS)
        row = x[token : token + 1].contiguous()
        grouped_swiglu(row, plan, slots.every(), slots.arena, slots.layout, alone)
        assert torch.equal(alone, outputs[2 * token : 2 * token + 2])
