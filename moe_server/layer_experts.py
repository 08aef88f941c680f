"""A layer's experts over the rows of a step, wherever the cache has them.

Asks the cache, tells it what the next layer will probably want, and passes each expert that it
gives to a run: `RecordRun`, one expert after another in the memory that it is in, or `SlotRun`, all
that are in a GPU's slots at once. Those who wait for an expert that cannot be read are told. Knows
requests only as owners of rows. Shape legend: T tokens, K experts per token, H hidden size.
"""

import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from moe_server.checkpoint import Checkpoint
from moe_server.kernels.experts import Activation
from moe_server.kernels.gpu.routing import DevicePlan, plan_chosen
from moe_server.kernels.routing import RoutingPlan, plan_routing
from moe_server.offload.cache import ExpertCache
from moe_server.offload.prefetch import LookAhead
from moe_server.offload.uses import Uses
from moe_server.record_run import RecordRun
from moe_server.slot_run import SlotRun, Slots
from moe_server.step import Step

Plan: TypeAlias = RoutingPlan | DevicePlan


class LayerExperts:
    """The experts of every layer. One thread only.

    Args:
        checkpoint: Their sizes.
        cache: Where they are.
        uses: Where it is noted which were wanted.
        activation: Of their gates.
        device: Where rows are.
        uses_slots: Compute by the GPU's kernels, in slots.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        cache: ExpertCache,
        uses: Uses,
        activation: Activation,
        device: torch.device,
        *,
        uses_slots: bool,
    ) -> None:
        self.router_s = 0.0
        """Seconds spent on routing since the start: router logits, top-k, plan."""
        self.step = Step()
        """Whose rows they are now."""
        self.look_ahead: LookAhead | None = None
        self._checkpoint = checkpoint
        self._cache = cache
        self._uses = uses
        self._layout = checkpoint.record_layout
        self._activation = activation
        self._device = device
        self._slots: Slots | None = None
        if uses_slots:
            self._slots = Slots(cache.tiers, self._layout, checkpoint.num_experts)

    def attach(self, layer: int, block: nn.Module) -> None:
        """Gives a layer's sparse block these experts, and times its router."""
        experts: Any = block.get_submodule("experts")
        for name in [name for name, _ in experts.named_parameters()]:
            delattr(experts, name)
        experts.run_chosen = partial(self._run_chosen, layer)
        experts.run_planned = partial(self.run, layer)
        gate: Any = block.get_submodule("gate")
        gate.forward = partial(self._route, layer, gate.forward)

    def run(self, layer: int, x_TH: torch.Tensor, plan: Plan) -> torch.Tensor:
        """The experts of one layer, weighted and summed: (T, H)."""
        step = self.step
        experts = plan.experts()
        wanted = experts
        if not step.are_all_wanted():
            wanted = [one for one in experts if step.requests_of(plan.rows_of(one).tolist())]
        self._uses.note(layer, wanted)
        if self.look_ahead is not None and wanted:
            started = time.perf_counter()
            self._cache.predict(layer + 1, self.look_ahead.predict(layer, x_TH))
            self.router_s += time.perf_counter() - started
        run = self._begin(layer, x_TH, plan)
        for expert in set(experts) - set(wanted):
            run.skip(expert)

        def still_wanted(expert: int) -> bool:
            step.poll()
            if step.are_all_wanted():
                return True
            return bool(step.requests_of(plan.rows_of(expert).tolist()))

        cost, counters = self._cache.tiers.cost, self._cache.counters
        num_rows = [plan.count_of(expert) for expert in wanted]
        with closing(self._cache.acquire(layer, wanted, num_rows, still_wanted)) as acquired:
            for held in acquired:
                rows = plan.count_of(held.expert)
                is_timed = cost.wants_compute(rows, in_host=held.in_host)
                started = self._finished_at() if is_timed else 0.0
                waited_s = counters.read_s
                num_computed = run.compute(held)
                if held.error is not None:
                    for request in step.requests_of(plan.rows_of(held.expert).tolist()):
                        request.fail(held.error)
                elif is_timed and num_computed == 1 and counters.read_s == waited_s:
                    elapsed = self._finished_at() - started
                    nbytes = self._layout.weight_bytes
                    cost.observe_compute(rows, nbytes, elapsed, in_host=held.in_host)
        return run.combined()

    def touch(self, layer: int, expert: int) -> None:
        """Brings an expert to the device and computes one row with it.

        Raises:
            MoeServerError: It could not be read.
        """
        checkpoint = self._checkpoint
        dtype: torch.dtype = getattr(torch, checkpoint.dtype)
        row = torch.zeros(1, checkpoint.hidden_size, dtype=dtype, device=self._device)
        # A token's choice as others are, so that nothing is compiled for this one alone.
        chosen = [
            (expert + number) % checkpoint.num_experts
            for number in range(checkpoint.num_experts_per_token)
        ]
        ids = torch.tensor([chosen], dtype=torch.int64, device=self._device)
        with torch.inference_mode():
            run = self._begin(layer, row, self._plan(ids, torch.ones_like(ids, dtype=torch.float)))
            with closing(self._cache.acquire(layer, [expert])) as acquired:
                for held in acquired:
                    run.compute(held)
                    if held.error is not None:
                        raise held.error

    def _begin(self, layer: int, x_TH: torch.Tensor, plan: Plan) -> RecordRun | SlotRun:
        if self._slots is not None:
            assert isinstance(plan, DevicePlan)
            return SlotRun(layer, x_TH, plan, self._slots)
        assert isinstance(plan, RoutingPlan)
        return RecordRun(x_TH, plan, self._layout, self._activation)

    def _plan(self, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Plan:
        plan = plan_routing if self._slots is None else plan_chosen
        return plan(top_k_index, top_k_weights, self._checkpoint.num_experts)

    def _run_chosen(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """`run` for a router that does not plan; arguments as transformers has them."""
        started = time.perf_counter()
        plan = self._plan(top_k_index, top_k_weights)
        self.router_s += time.perf_counter() - started
        return self.run(layer, hidden_states, plan)

    def _route(self, layer: int, router: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Any:
        """What the router says, which begins with logits."""
        started = time.perf_counter()
        output = router(x)
        if self.look_ahead is not None:
            self.look_ahead.observe(layer, output[0])
        self.router_s += time.perf_counter() - started
        return output

    def _finished_at(self) -> float:
        """Now, with all that was asked of the device done."""
        if self._device.type == "cuda":
            # What is queued would be counted with the next expert, or the last one not at all; a
            # few experts only are timed.
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
