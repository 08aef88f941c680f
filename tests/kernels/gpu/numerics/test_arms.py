"""The routing benchmark's GPU arms: rehearsed, as graphs are called where there is no GPU."""

import pytest
import torch

from benchmarks import routing
from benchmarks.gpu_arms import GpuArms, Sizes
from benchmarks.routing_summary import PARTS
from moe_server.kernels.formats import WeightFormat
from moe_server.kernels.gpu.reference import swiglu_reference
from tests.kernels.gpu.numerics.device import DEVICE

SIZES = Sizes(hidden=64, intermediate=32, num_experts=4, top_k=2)


def test_a_batch_size_is_summed_up(monkeypatch):
    monkeypatch.setattr(routing, "MIN_ROUNDS", 1)
    monkeypatch.setattr(routing, "FULL_LAYERS", 1)
    monkeypatch.setattr(routing.routing_arms, "THIN_INTERMEDIATE", 16)
    [found] = routing.measure_gpu([2], DEVICE, SIZES, seconds=0.0)
    assert found.arms.keys() == {"D", "O", "R", "naive"}
    assert found.parts.keys() == set(PARTS)
    assert min(found.arms.values()) > 0
    assert found.parts["host wait"] >= 0


@pytest.mark.parametrize("arm", ["O", "R", "D"])
def test_an_arm_computes_the_last_layer_s_experts(arm):
    arms = GpuArms(3, WeightFormat.BFLOAT16, SIZES, 2, DEVICE)
    arms.run(arm)
    is_dense = arm == "D"
    layout = arms._twin_layout if is_dense else arms._layout
    plan = arms._twin_plan if is_dense else arms._plans[1]
    slots = (arms._twin_slots if is_dense else arms._slots)[1].tolist()
    rows, columns = layout.w13.rows, layout.w13.columns
    experts = {}
    for expert, slot in enumerate(slots):
        record = arms._arena[slot * layout.stride_bytes :]
        w13 = record[: 2 * layout.w13.nbytes].view(torch.bfloat16).view(2, rows, columns).double()
        w2 = record[layout.w2_offset : layout.w2_offset + layout.w2.nbytes].view(torch.bfloat16)
        experts[expert] = (w13[0], w13[1], w2.view(columns, rows).double())
    expected, bound = swiglu_reference(arms._x[1], plan.expert_ids, experts)
    outputs = arms._outputs[: len(expected)].double()
    assert ((outputs - expected).abs() <= bound).all()
    assert arms.expert_bytes > 0
