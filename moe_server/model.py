"""A model that runs the scheduler's batches, with its experts in the expert cache.

`mixtral` or transformers builds the architecture, with attention (ragged, over paged keys and
values) and experts (rows grouped by expert, weights from slots) of ours in it. The module is built
without storage, and only the dense tensors are read. Knows nothing of requests, text or gRPC:
`engine` brings batches and takes logits.
"""

import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moe_server import zero3
from moe_server.attention import RaggedBatch, RequestSpan
from moe_server.budget import EXPERT_ROWS
from moe_server.checkpoint import Checkpoint
from moe_server.dense import use_kernels
from moe_server.errors import MoeServerError, Reason
from moe_server.json_file import read_json
from moe_server.kernels.experts import Activation, ExpertRun
from moe_server.kernels.formats import MatrixLayout
from moe_server.kernels.products import Activations, prepare
from moe_server.kernels.routing import RoutingPlan, combine, plan_routing
from moe_server.kv_cache import PagedKv
from moe_server.mixtral import Mixtral
from moe_server.offload.cache import Held
from moe_server.offload.prefetch import LookAhead
from moe_server.weights import Weights


def _nothing() -> None:
    """Nobody has to be asked."""


@dataclass(frozen=True, slots=True)
class StepInput:
    """One request's part of a step, as the scheduler decided it."""

    token_ids: Sequence[int]
    """Its new tokens, at least one."""
    num_context: int
    """Its tokens once these are stored."""
    block_table: Sequence[int]
    """KV blocks in order of position, enough for `num_context`."""
    wants_logits: bool
    """True where the last new token is to be followed by a sampled one."""
    still_wanted: Callable[[], bool]
    """Turns false when the request has left: its results are of no use any more."""
    fail: Callable[[MoeServerError], None]
    """Called when one of its rows needs an expert that cannot be read; it must leave then."""


class Model:
    """The model, ready to run steps. One thread only.

    Args:
        weights: What is read from disk.
        device: Where it computes.
        num_blocks: KV blocks.
        block_tokens: Tokens in a block.
        prefetch: Predict the next layer's experts.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        device: torch.device,
        num_blocks: int,
        block_tokens: int,
        prefetch: bool,
    ) -> None:
        self.router_s = 0.0
        """Seconds spent on routing since the start: router logits, top-k, plan."""
        self.cache = weights.cache
        self.checkpoint = checkpoint = weights.checkpoint
        self._weights = weights
        self._layout = checkpoint.record_layout
        self._prefetch = prefetch
        self._look_ahead: LookAhead | None = None
        self._batch: Sequence[StepInput] = ()
        self._poll: Callable[[], None] = _nothing
        self._device = device
        self._dtype: torch.dtype = getattr(torch, checkpoint.dtype)
        self._block_tokens = block_tokens
        self._kv = PagedKv(
            num_layers=checkpoint.num_layers,
            num_blocks=num_blocks,
            block_tokens=block_tokens,
            num_kv_heads=checkpoint.num_kv_heads,
            head_dim=checkpoint.head_dim,
            dtype=self._dtype,
            device=device,
        )
        config = read_json(checkpoint.path / "config.json")
        self._module = _build_module(checkpoint, config, device)
        use_kernels(self._module, checkpoint, device)
        blocks = [
            layer.get_submodule("mlp")
            for layer in self._module.get_submodule("model.layers").children()
        ]
        # transformers wraps SiLU; the kernels know it by torch's name.
        has_silu = config.get("hidden_act", "silu") == "silu"
        stock: Any = blocks[0].get_submodule("experts")
        self._activation: Activation = F.silu if has_silu else stock.act_fn
        for number, block in enumerate(blocks):
            self._attach(number, block)
        self._forward: Callable[..., Any] = self._module

    def load_dense(self, progress: Callable[[int], None]) -> None:
        """Takes the dense weights as they arrive.

        Args:
            progress: Called with the bytes read so far.

        Raises:
            MoeServerError: A read failed.
        """
        tensors = {}
        for name, stored in self._weights.take_dense(progress).items():
            dense = self.checkpoint.dense[name]
            is_quantised = dense.layout is not None
            weights = stored if is_quantised else stored.view(self._dtype).view(dense.shape)
            tensors[name] = weights.to(self._device)
        result = self._module.load_state_dict(tensors, strict=False, assign=True)
        tied: Any = self._module
        tied.tie_weights()
        unset = [name for name, parameter in self._module.named_parameters() if parameter.is_meta]
        if unset or result.unexpected_keys:
            raise MoeServerError(
                f"The {self.checkpoint.architecture} module has other parameters than expected: "
                f"missing {unset[:3]}, unexpected {result.unexpected_keys[:3]}.",
                "Install the transformers version of constraints.txt.",
                reason=Reason.UNSUPPORTED,
            )
        self._module.requires_grad_(requires_grad=False)
        if self._prefetch:
            blocks: list[Any] = list(self._module.get_submodule("model.layers").children())
            self._look_ahead = LookAhead(
                [block.mlp.gate.weight for block in blocks],
                [block.post_attention_layernorm.weight for block in blocks],
                self.checkpoint.num_experts_per_token,
            )

    def use_zero3(self, config_file: Path | None) -> None:
        """Hands the dense weights to DeepSpeed ZeRO-3; see `zero3.wrap`."""
        self._forward = zero3.wrap(self._module, self._dtype, self._device, config_file)

    @torch.inference_mode()
    def forward(
        self, batch: Sequence[StepInput], poll: Callable[[], None] = _nothing
    ) -> torch.Tensor:
        """Runs one step.

        Args:
            batch: The requests' parts.
            poll: Called while the disk is waited for; requests may leave in it.

        Returns:
            float32 (rows, vocab_size): logits of the requests that want them, in order. Those of
            requests that have left are rubbish; no row influences another request's.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        spans: list[RequestSpan] = []
        kv_positions: list[int] = []
        last_rows: list[int] = []
        for request in batch:
            first = request.num_context - len(request.token_ids)
            new_positions = range(first, request.num_context)
            spans.append(
                RequestSpan(
                    start=len(token_ids),
                    num_new=len(request.token_ids),
                    num_context=request.num_context,
                    block_table=self._tensor(request.block_table),
                )
            )
            token_ids.extend(request.token_ids)
            positions.extend(new_positions)
            kv_positions.extend(
                request.block_table[position // self._block_tokens] * self._block_tokens
                + position % self._block_tokens
                for position in new_positions
            )
            if request.wants_logits:
                last_rows.append(len(token_ids) - 1)
        self._batch, self._poll = batch, poll
        output = self._forward(
            input_ids=self._tensor(token_ids)[None],
            position_ids=self._tensor(positions)[None],
            logits_to_keep=self._tensor(last_rows),
            ragged_batch=RaggedBatch(spans, self._kv, self._tensor(kv_positions)),
        )
        logits: torch.Tensor = output.logits[0]
        return logits.float()

    def _tensor(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)

    def _run_chosen(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """`_run_experts` for a router that does not plan; arguments as transformers has them."""
        started = time.perf_counter()
        plan = plan_routing(top_k_index, top_k_weights, self.checkpoint.num_experts)
        self.router_s += time.perf_counter() - started
        return self._run_experts(layer, hidden_states, plan)

    def _run_experts(self, layer: int, x_TH: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
        """The experts of one layer, weighted and summed: (T, H)."""
        experts = plan.experts()
        wanted = experts
        if not self._are_all_wanted():
            wanted = [expert for expert in experts if self._requests_of(plan.rows_of(expert))]
        if self._look_ahead is not None and wanted:
            started = time.perf_counter()
            self.cache.predict(layer + 1, self._look_ahead.predict(layer, x_TH))
            self.router_s += time.perf_counter() - started
        outputs_PH = x_TH.new_empty(len(plan.rows), x_TH.shape[1])
        for expert in set(experts) - set(wanted):
            outputs_PH[plan.picks_of(expert)] = 0.0

        def still_wanted(expert: int) -> bool:
            self._poll()
            return self._are_all_wanted() or bool(self._requests_of(plan.rows_of(expert)))

        rows = Rows(x_TH, self._layout.w13)
        num_rows = [len(plan.rows_of(expert)) for expert in wanted]
        cost, counters = self.cache.tiers.cost, self.cache.counters
        groups = self.cache.acquire(layer, wanted, num_rows, still_wanted)
        with closing(groups):
            for held in groups:
                index = plan.rows_of(held.expert)
                is_timed = cost.wants_compute(len(index), in_host=held.in_host)
                started = self._finished_at() if is_timed else 0.0
                waited_s = counters.read_s
                self._run_expert(rows, index, held, outputs_PH[plan.picks_of(held.expert)])
                if held.error is not None:
                    for request in self._requests_of(index):
                        request.fail(held.error)
                elif is_timed and counters.read_s == waited_s:
                    cost.observe_compute(
                        len(index),
                        self._layout.weight_bytes,
                        self._finished_at() - started,
                        in_host=held.in_host,
                    )
        return combine(outputs_PH, plan)

    def _finished_at(self) -> float:
        """Now, with all that was asked of the device done."""
        if self._device.type == "cuda":
            # What is queued would be counted with the next expert, or the last one not at all; a
            # few experts only are timed.
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _are_all_wanted(self) -> bool:
        return all(request.still_wanted() for request in self._batch)

    def _requests_of(self, rows: torch.Tensor) -> list[StepInput]:
        """The requests that are still there and that these rows of the step belong to."""
        ends = list(accumulate(len(request.token_ids) for request in self._batch))
        numbers = sorted({bisect_right(ends, row) for row in rows.tolist()})
        return [self._batch[number] for number in numbers if self._batch[number].still_wanted()]

    def touch_expert(self, layer: int, expert: int) -> None:
        """Brings an expert to the device and computes one row with it.

        Raises:
            MoeServerError: It could not be read.
        """
        row = torch.zeros(1, self.checkpoint.hidden_size, dtype=self._dtype, device=self._device)
        first = torch.zeros(1, dtype=torch.int64, device=self._device)
        with torch.inference_mode(), closing(self.cache.acquire(layer, [expert])) as groups:
            for held in groups:
                self._run_expert(Rows(row, self._layout.w13), first, held, torch.empty_like(row))
                if held.error is not None:
                    raise held.error

    def _run_expert(
        self, rows: "Rows", index: torch.Tensor, held: Held, out_NH: torch.Tensor
    ) -> None:
        """One expert over the rows that `index` names, where its weights are."""
        layout = self._layout
        arrivals: Iterable[int] = held.arrivals
        for first in range(0, len(index), EXPERT_ROWS):
            part = slice(first, first + EXPERT_ROWS)
            run = ExpertRun(
                rows.prepared(index[part], held.memory.device),
                held.memory,
                layout.w13,
                layout.w2,
                layout.w3_offset,
                layout.w2_offset,
                self._activation,
                out_NH[part],
            )
            for arrived_bytes in arrivals:
                run.advance(arrived_bytes)
            if held.dropped:
                out_NH.zero_()
                return
            run.output()  # asserts that it is complete
            arrivals = (layout.stride_bytes,)

    def _attach(self, layer: int, block: nn.Module) -> None:
        """Gives a layer's sparse block our experts, and times its router."""
        experts: Any = block.get_submodule("experts")
        for name in [name for name, _ in experts.named_parameters()]:
            delattr(experts, name)
        experts.run_chosen = partial(self._run_chosen, layer)
        experts.run_planned = partial(self._run_experts, layer)
        gate: Any = block.get_submodule("gate")
        gate.forward = partial(self._route, layer, gate.forward)

    def _route(self, layer: int, router: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Any:
        """What the router says, which begins with logits."""
        started = time.perf_counter()
        output = router(x)
        if self._look_ahead is not None:
            self._look_ahead.observe(layer, output[0])
        self.router_s += time.perf_counter() - started
        return output


class Rows:
    """The input of a layer's experts: prepared once for each device, whatever asks for rows.

    Args:
        values: (T, H).
        layout: Of the matrices that it is multiplied with.
    """

    def __init__(self, values: torch.Tensor, layout: MatrixLayout) -> None:
        self._values = values
        self._layout = layout
        self._prepared: dict[torch.device, Activations] = {}

    def prepared(self, index: torch.Tensor, device: torch.device) -> Activations:
        """Distinct rows in ascending order, as products with weights on `device` want them."""
        if device not in self._prepared:
            self._prepared[device] = prepare(self._values.to(device), self._layout)
        if len(index) == len(self._values):
            return self._prepared[device]
        return self._prepared[device].rows(index.to(device))


def _build_module(
    checkpoint: Checkpoint, config: dict[str, Any], device: torch.device
) -> nn.Module:
    """The model without storage: ours for a plain Mixtral, transformers' for everything else."""
    if checkpoint.is_plain:
        return Mixtral(checkpoint, config).eval()
    # Imported only where it is needed: it takes longer than all else that the engine imports.
    from moe_server.transformers_module import build_module  # noqa: PLC0415

    return build_module(checkpoint, device)
