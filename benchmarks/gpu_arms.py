"""What the routing benchmark runs on a GPU: every arm one graph over all layers that take turns.

The same kernels in the same order as in the server's layer (`moe_server/slot_run.py`), everything
resident. Weights of the layers are other bytes of one arena, larger than the caches. Shape legend:
T tokens, H hidden size, I intermediate size, E experts.
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.kernels import HIDDEN, INTERMEDIATE, fill_with_weights
from benchmarks.replay import Replay
from benchmarks.routing_arms import NUM_EXPERTS, TOP_K, Visit
from moe_server.kernels.formats import WeightFormat
from moe_server.kernels.gpu.combine import combine
from moe_server.kernels.gpu.experts import grouped_swiglu
from moe_server.kernels.gpu.routing import DevicePlan, plan_chosen, route
from moe_server.offload.layout import RecordLayout
from moe_server.slot_run import slot_layout

NARROW_COLUMNS = 32
"""Of the routing call that is all but the product."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a layer; the defaults are Mixtral 8x7B's."""

    hidden: int = HIDDEN
    intermediate: int = INTERMEDIATE
    num_experts: int = NUM_EXPERTS
    top_k: int = TOP_K


def random_arena(nbytes: int, device: torch.device) -> torch.Tensor:
    """Weights for every format."""
    arena = torch.empty(nbytes, dtype=torch.uint8, device=device)
    fill_with_weights(arena)
    return arena


class GpuArms:
    """The arms of one batch size.

    Args:
        num_tokens: T.
        weight_format: Of the experts.
        sizes: Of a layer.
        num_layers: Layers that take turns in each graph.
        device: Where.
    """

    names = ("D", "O", "R", "naive", "narrow")

    def __init__(
        self,
        num_tokens: int,
        weight_format: WeightFormat,
        sizes: Sizes,
        num_layers: int,
        device: torch.device,
    ) -> None:
        self._sizes, self._num_layers = sizes, num_layers
        record = RecordLayout(sizes.hidden, sizes.intermediate, weight_format)
        twin = RecordLayout(sizes.hidden, sizes.top_k * sizes.intermediate, weight_format)
        self._layout, self._twin_layout = slot_layout(record), slot_layout(twin)
        layer_bytes = sizes.num_experts * record.stride_bytes
        self._arena = random_arena(num_layers * layer_bytes, device)
        generator = torch.Generator(device).manual_seed(num_tokens)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device).bfloat16()

        self._x = [normal(num_tokens, sizes.hidden) for _ in range(num_layers)]
        self._gates = [
            normal(sizes.num_experts, sizes.hidden) / sizes.hidden**0.5 for _ in range(num_layers)
        ]
        columns = min(NARROW_COLUMNS, sizes.hidden)
        self._narrow_x = [x[:, :columns].contiguous() for x in self._x]
        self._narrow_gates = [gate[:, :columns].contiguous() for gate in self._gates]
        self._plans = [
            route(x, gate, sizes.top_k)[1] for x, gate in zip(self._x, self._gates, strict=True)
        ]
        everyone = torch.zeros(num_tokens, 1, dtype=torch.int64, device=device)
        self._twin_plan = plan_chosen(everyone, torch.ones_like(everyone), 1)
        self._slots, self._twin_slots = (
            [
                torch.arange(count, dtype=torch.int32, device=device) + layer * per_layer
                for layer in range(num_layers)
            ]
            for count, per_layer in (
                (sizes.num_experts, sizes.num_experts),
                (1, layer_bytes // twin.stride_bytes),
            )
        )
        num_picks = num_tokens * sizes.top_k
        self._hidden = torch.empty(
            num_picks * sizes.intermediate, dtype=torch.bfloat16, device=device
        )
        self._outputs = torch.empty(num_picks, sizes.hidden, dtype=torch.bfloat16, device=device)
        self._replays = {
            name: Replay(work, device)
            for name, work in (
                ("D", self._dense),
                ("O", self._planned),
                ("R", self._routed),
                ("route", self._route),
                ("narrow", self._narrow),
                ("experts", self._only_experts),
                ("combine", self._combine),
            )
        }

    @property
    def expert_bytes(self) -> int:
        """Weights that the experts of one layer's plan read, on average over the layers."""
        wanted = sum(len(plan.experts()) for plan in self._plans)
        layout = self._layout
        return wanted * (2 * layout.w13.nbytes + layout.w2.nbytes) // self._num_layers

    def run(self, arm: str) -> Visit:
        """One layer's share of one run of an arm."""
        if arm == "naive":
            return self._naive()
        visit = Visit(self._layer_seconds(arm))
        if arm == "O":
            visit.parts = {"gather": 0.0, "combine": self._layer_seconds("combine")}
        if arm == "R":
            visit.parts = {
                "route": self._layer_seconds("route"),
                "gather": 0.0,  # rows are taken where they are, by number
                "combine": self._layer_seconds("combine"),
                "host wait": self._host_wait(),
            }
        return visit

    def experts_seconds(self) -> float:
        """One layer's experts, neither routed nor combined."""
        return self._layer_seconds("experts")

    def _layer_seconds(self, name: str) -> float:
        return self._replays[name].seconds() / self._num_layers

    def _dense(self) -> None:
        for layer in range(self._num_layers):
            x = self._x[layer]
            grouped_swiglu(
                x,
                self._twin_plan,
                self._twin_slots[layer],
                self._arena,
                self._twin_layout,
                self._outputs[: len(x)],
                self._hidden.view(len(x), -1),
            )

    def _planned(self) -> None:
        for layer, plan in enumerate(self._plans):
            self._experts(layer, plan)

    def _routed(self) -> None:
        for layer in range(self._num_layers):
            _, plan = route(self._x[layer], self._gates[layer], self._sizes.top_k)
            self._experts(layer, plan)

    def _experts(self, layer: int, plan: DevicePlan) -> None:
        self._swiglu(layer, plan)
        combine(self._outputs, plan.expert_ids, plan.weights)

    def _only_experts(self) -> None:
        for layer, plan in enumerate(self._plans):
            self._swiglu(layer, plan)

    def _swiglu(self, layer: int, plan: DevicePlan) -> None:
        hidden = self._hidden.view(len(self._outputs), -1)
        layout, slots = self._layout, self._slots[layer]
        grouped_swiglu(self._x[layer], plan, slots, self._arena, layout, self._outputs, hidden)

    def _route(self) -> None:
        for x, gate in zip(self._x, self._gates, strict=True):
            route(x, gate, self._sizes.top_k)

    def _narrow(self) -> None:
        for x, gate in zip(self._narrow_x, self._narrow_gates, strict=True):
            route(x, gate, self._sizes.top_k)

    def _combine(self) -> None:
        for plan in self._plans:
            combine(self._outputs, plan.expert_ids, plan.weights)

    def _host_wait(self) -> float:
        """What launches and the layer's one synchronisation take, beyond the routing itself."""
        started = time.perf_counter()
        for x, gate in zip(self._x, self._gates, strict=True):
            _, plan = route(x, gate, self._sizes.top_k)
            _ = plan.host_offsets
        elapsed = (time.perf_counter() - started) / self._num_layers
        return max(0.0, elapsed - self._layer_seconds("route"))

    def _naive(self) -> Visit:
        """Gate, choice and plan by torch's operations, one after another; no experts."""
        gate_s = plan_s = 0.0
        for x, gate in zip(self._x, self._gates, strict=True):
            started = time.perf_counter()
            logits = F.linear(x, gate)
            if logits.is_cuda:
                torch.cuda.synchronize()
            gated = time.perf_counter()
            chosen = F.softmax(logits.float(), dim=-1).topk(self._sizes.top_k, dim=-1)
            _ = chosen.values / chosen.values.sum(dim=-1, keepdim=True)
            picks = chosen.indices.flatten()
            torch.argsort(picks, stable=True)
            torch.bincount(picks, minlength=self._sizes.num_experts).tolist()
            gate_s += gated - started
            plan_s += time.perf_counter() - gated
        parts = {"gate": gate_s / self._num_layers, "plan": plan_s / self._num_layers}
        return Visit(sum(parts.values()), parts)
