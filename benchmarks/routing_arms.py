"""What the routing benchmark runs: a layer routed, planned beforehand, and as its dense twin.

The same kernels in the same order as in the server's layer, everything resident. Weights are bytes
of one buffer that is larger than the caches, taken layer by layer in turn, so no visit finds those
of the last one. Times a layer's parts itself: both the routed layer and the planned one pay for the
clock. Shape legend: T tokens, H hidden size, E experts.
"""

import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from benchmarks.kernels import HIDDEN, INTERMEDIATE, make_buffer
from benchmarks.routing_summary import NUM_LAYERS
from moe_server.budget import EXPERT_ROWS
from moe_server.kernels.experts import ExpertRun
from moe_server.kernels.formats import WeightFormat
from moe_server.kernels.products import Activations, prepare
from moe_server.kernels.routing import RoutingPlan, combine, route
from moe_server.offload.layout import RecordLayout

NUM_EXPERTS, TOP_K = 8, 2
"""Mixtral 8x7B's, as the sizes are."""
THIN_INTERMEDIATE = 128
"""Of the thin experts, which take so little time that routing shows beside them."""
_INPUT_BYTES = 1 << 25


class Weights:
    """Experts of a few layers, and their dense twins in the same bytes.

    Args:
        weight_format: Of the experts.
        intermediate: Their width; the twin's is TOP_K times that.
        num_layers: Layers that take turns.
    """

    def __init__(self, weight_format: WeightFormat, intermediate: int, num_layers: int) -> None:
        self._expert = RecordLayout(HIDDEN, intermediate, weight_format)
        self._dense = RecordLayout(HIDDEN, TOP_K * intermediate, weight_format)
        self._layer_bytes = NUM_EXPERTS * self._expert.stride_bytes
        self._buffer = make_buffer(num_layers * self._layer_bytes)
        self._num_layers = num_layers
        self._visits = 0

    @property
    def nbytes(self) -> int:
        return len(self._buffer)

    def next_layer(self) -> "Layer":
        """The layer that was not visited for longest."""
        start = self._visits % self._num_layers * self._layer_bytes
        self._visits += 1
        records = self._buffer[start : start + self._layer_bytes]
        return Layer(records, self._expert, self._dense)


def layer_bytes(weight_format: WeightFormat) -> int:
    """Of a layer of Mixtral's size."""
    return NUM_EXPERTS * RecordLayout(HIDDEN, INTERMEDIATE, weight_format).stride_bytes


@dataclass(frozen=True, slots=True)
class Layer:
    """Bytes of a layer's experts, one behind the other."""

    records: torch.Tensor
    expert_layout: RecordLayout
    dense_layout: RecordLayout

    def expert(self, number: int) -> torch.Tensor:
        stride = self.expert_layout.stride_bytes
        return self.records[number * stride : (number + 1) * stride]

    def dense(self) -> torch.Tensor:
        return self.records[: self.dense_layout.stride_bytes]


@dataclass(frozen=True, slots=True)
class Input:
    """What a layer is given; inputs and routers are other ones at every visit."""

    x: torch.Tensor
    """(T, H)."""
    gate: torch.Tensor
    """(E, H)."""
    plan: RoutingPlan
    """That of `route`, for the planned arm."""


def make_inputs(num_tokens: int) -> list[Input]:
    """As many as layers, each with a router of its own; the rows of large batches come again."""
    generator = torch.Generator().manual_seed(num_tokens)
    different = max(2, min(NUM_LAYERS, _INPUT_BYTES // (num_tokens * HIDDEN * 2)))
    rows = [
        torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16() for _ in range(different)
    ]
    inputs = []
    for number in range(NUM_LAYERS):
        gate = torch.randn(NUM_EXPERTS, HIDDEN, generator=generator) / HIDDEN**0.5
        x_TH, gate_EH = rows[number % different], gate.bfloat16()
        _, plan = route(x_TH, gate_EH, TOP_K)
        inputs.append(Input(x_TH, gate_EH, plan))
    return inputs


@dataclass(slots=True)
class Visit:
    """Seconds of one run of one arm."""

    total_s: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    """route, gather and combine, where the arm has them."""


def run_dense(layer: Layer, given: Input) -> Visit:
    """D: one SwiGLU of the active width, no router."""
    x_TH = given.x.clone()  # into the caches, where the layer's norm would have left it
    visit, started = Visit(), time.perf_counter()
    rows = prepare(x_TH, layer.dense_layout.w13)
    out_TH = torch.empty_like(x_TH)
    for first in range(0, len(x_TH), EXPERT_ROWS):
        part = slice(first, min(first + EXPERT_ROWS, len(x_TH)))
        index = torch.arange(part.start, part.stop)
        some = rows if len(index) == len(x_TH) else rows.rows(index)
        _run(layer.dense(), layer.dense_layout, some, out_TH[part])
    visit.total_s = time.perf_counter() - started
    return visit


def run_planned(layer: Layer, given: Input) -> Visit:
    """O: experts with ids and plan computed beforehand."""
    x_TH = given.x.clone()
    started = time.perf_counter()
    visit = _run_experts(layer, x_TH, given.plan)
    visit.total_s = time.perf_counter() - started
    return visit


def run_routed(layer: Layer, given: Input) -> Visit:
    """R: router, plan and experts."""
    x_TH = given.x.clone()
    started = time.perf_counter()
    _, plan = route(x_TH, given.gate, TOP_K)
    routed = time.perf_counter()
    visit = _run_experts(layer, x_TH, plan)
    visit.total_s = time.perf_counter() - started
    visit.parts["route"] = routed - started
    return visit


def run_naive(given: Input) -> Visit:
    """Gate, choice and plan by torch's operations, one after another; no experts."""
    x_TH = given.x.clone()
    started = time.perf_counter()
    logits_TE = F.linear(x_TH, given.gate)
    gated = time.perf_counter()
    weights_TK, expert_ids_TK = F.softmax(logits_TE.float(), dim=-1).topk(TOP_K, dim=-1)
    weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    picks = expert_ids_TK.flatten()
    torch.argsort(picks, stable=True)
    torch.bincount(picks, minlength=NUM_EXPERTS).tolist()
    ended = time.perf_counter()
    return Visit(ended - started, {"gate": gated - started, "plan": ended - gated})


def run_narrow(given: Input) -> Visit:
    """The routing call with next to no columns: all of it but the product."""
    x_TH = given.x[:, :32].contiguous()
    gate_EH = given.gate[:, :32].contiguous()
    started = time.perf_counter()
    route(x_TH, gate_EH, TOP_K)
    return Visit(time.perf_counter() - started)


def _run_experts(layer: Layer, x_TH: torch.Tensor, plan: RoutingPlan) -> Visit:
    """As `Model` has it, with every expert at hand."""
    gather_s = 0.0
    rows = prepare(x_TH, layer.expert_layout.w13)
    outputs_PH = x_TH.new_empty(len(plan.rows), HIDDEN)
    for expert in plan.experts():
        index, out_NH = plan.rows_of(expert), outputs_PH[plan.picks_of(expert)]
        for first in range(0, len(index), EXPERT_ROWS):
            part = slice(first, first + EXPERT_ROWS)
            started = time.perf_counter()
            some = rows if len(index[part]) == len(x_TH) else rows.rows(index[part])
            gather_s += time.perf_counter() - started
            _run(layer.expert(expert), layer.expert_layout, some, out_NH[part])
    started = time.perf_counter()
    combine(outputs_PH, plan)
    return Visit(parts={"gather": gather_s, "combine": time.perf_counter() - started})


def _run(
    record: torch.Tensor, layout: RecordLayout, rows: Activations, out_NH: torch.Tensor
) -> None:
    w13, w2 = layout.w13, layout.w2
    run = ExpertRun(rows, record, w13, w2, layout.w3_offset, layout.w2_offset, F.silu, out_NH)
    run.advance(layout.stride_bytes)


def choose_format(available_bytes: int, num_layers: int) -> WeightFormat:
    """The widest format of which that many layers take a third of the memory at most."""
    formats = (WeightFormat.BFLOAT16, WeightFormat.INT8, WeightFormat.INT4)
    return next(
        (one for one in formats if num_layers * layer_bytes(one) * 3 <= available_bytes),
        WeightFormat.INT4,
    )
