"""One expert against float64, and the whole sparse layer bit for bit against transformers."""

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe_server.kernels.experts import swiglu
from moe_server.kernels.formats import WeightFormat
from moe_server.kernels.routing import combine, plan_routing
from moe_server.offload.layout import RecordLayout

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUM_EXPERTS = 6


def make_record(
    layout: RecordLayout, w1: torch.Tensor, w3: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    """A record with rubbish wherever the layout puts nothing."""
    record = torch.full((layout.stride_bytes,), 0xFF, dtype=torch.uint8)
    for offset, weight in (
        (layout.w1_offset, w1),
        (layout.w3_offset, w3),
        (layout.w2_offset, w2),
    ):
        content = weight.contiguous().view(torch.uint8).flatten()
        record[offset : offset + len(content)] = content
    return record


def run_swiglu(layout: RecordLayout, rows: torch.Tensor, record: torch.Tensor) -> torch.Tensor:
    return swiglu(
        rows,
        record,
        intermediate_size=layout.intermediate_size,
        w2_offset=layout.w2_offset,
        activation=torch.nn.functional.silu,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "intermediate"), [(16, 32), (52, 37), (7, 3), (64, 96)])
@pytest.mark.parametrize("num_rows", [1, 5, 33])
def test_swiglu_equals_float64(dtype, hidden, intermediate, num_rows):
    generator = torch.Generator().manual_seed(hidden + num_rows)

    def weights(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    w1, w3, w2 = (
        weights(intermediate, hidden),
        weights(intermediate, hidden),
        weights(hidden, intermediate),
    )
    rows = weights(num_rows, hidden)
    layout = RecordLayout(hidden, intermediate, WeightFormat(str(dtype).removeprefix("torch.")))
    output = run_swiglu(layout, rows, make_record(layout, w1, w3, w2))
    x = rows.double()
    gate, up = x @ w1.double().T, x @ w3.double().T
    expected = (gate * gate.sigmoid() * up) @ w2.double().T
    assert output.dtype == dtype
    # Relative to the largest: three products and a handful of roundings of the dtype.
    error = (output.double() - expected).abs().max() / expected.abs().max()
    assert error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 40])
def test_plan_swiglu_and_combine_equal_transformers_bit_for_bit(dtype, top_k, num_tokens):
    hidden, intermediate = 64, 96
    torch.manual_seed(top_k * 100 + num_tokens)
    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=top_k,
    )
    config._experts_implementation = "eager"
    experts = MixtralExperts(config).to(dtype)
    layout = RecordLayout(hidden, intermediate, WeightFormat(str(dtype).removeprefix("torch.")))
    with torch.inference_mode():
        experts.gate_up_proj.normal_(std=0.3)
        experts.down_proj.normal_(std=0.3)
        states = torch.randn(num_tokens, hidden).to(dtype)
        weights, expert_ids = torch.randn(num_tokens, NUM_EXPERTS).softmax(-1).topk(top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        expected = experts(states, expert_ids, weights)

        plan = plan_routing(expert_ids, weights, NUM_EXPERTS)
        outputs = torch.full((num_tokens * top_k, hidden), torch.nan, dtype=dtype)
        # Misses come in any order.
        for expert in reversed(plan.experts()):
            w1, w3 = experts.gate_up_proj[expert].chunk(2)
            record = make_record(layout, w1, w3, experts.down_proj[expert])
            rows = states[plan.rows_of(expert)]
            outputs[plan.picks_of(expert)] = run_swiglu(layout, rows, record)
        combined = combine(outputs, plan)
    assert torch.equal(combined, expected)
