"""A model that runs the scheduler's batches, with its experts in the expert cache.

`mixtral` or transformers builds the architecture, with attention (ragged, over paged keys and
values) and experts (rows grouped by expert, weights from slots) of ours in it. The module is built
without storage, and only the dense tensors are read. Knows nothing of requests, text or gRPC:
`engine` brings batches and takes logits.
"""

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from moe_server import zero3
from moe_server.attention import RaggedBatch, RequestSpan
from moe_server.budget import EXPERT_ROWS
from moe_server.checkpoint import Checkpoint
from moe_server.dense import use_kernels
from moe_server.errors import MoeServerError, Reason
from moe_server.json_file import read_json
from moe_server.kernels.experts import ExpertRun, swiglu
from moe_server.kernels.formats import MatrixLayout
from moe_server.kernels.products import Activations, prepare
from moe_server.kernels.routing import combine, plan_routing
from moe_server.kv_cache import PagedKv
from moe_server.mixtral import Mixtral
from moe_server.offload.cache import Held
from moe_server.offload.prefetch import LookAhead
from moe_server.weights import Weights

Activation: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


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
        self._has_silu = config.get("hidden_act", "silu") == "silu"
        for number, layer in enumerate(self._module.get_submodule("model.layers").children()):
            self._attach(number, layer.get_submodule("mlp"))
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

    def _run_experts(
        self,
        layer: int,
        activation: Activation,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """The experts of one layer.

        Args:
            layer: Its number.
            activation: The gate's activation.
            hidden_states: (T, H).
            top_k_index: int64 (T, K).
            top_k_weights: float32 (T, K).

        Returns:
            (T, H).
        """
        started = time.perf_counter()
        num_choices = top_k_index.shape[1]
        plan = plan_routing(top_k_index, self.checkpoint.num_experts)
        picks_of = {
            expert: plan.order[start:end]
            for expert, start, end in zip(
                plan.experts, plan.offsets, plan.offsets[1:], strict=False
            )
        }
        rows_of = {expert: picks // num_choices for expert, picks in picks_of.items()}
        wanted = [expert for expert, index in rows_of.items() if self._is_any_wanted(index)]
        if self._look_ahead is not None and wanted:
            self.cache.predict(layer + 1, self._look_ahead.predict(layer, hidden_states))
        self.router_s += time.perf_counter() - started
        outputs = hidden_states.new_empty(top_k_index.numel(), hidden_states.shape[1])
        for expert in picks_of.keys() - set(wanted):
            outputs[picks_of[expert]] = 0.0

        def still_wanted(expert: int) -> bool:
            self._poll()
            return self._is_any_wanted(rows_of[expert])

        num_rows = [len(picks_of[expert]) for expert in wanted]
        rows = Rows(hidden_states, self._layout.w13)
        groups = self.cache.acquire(layer, wanted, num_rows, still_wanted)
        with closing(groups):
            for held in groups:
                index = rows_of[held.expert]
                is_timed = self.cache.tiers.cost.wants_compute(len(index), in_host=held.in_host)
                started = self._finished_at() if is_timed else 0.0
                waited_s = self.cache.counters.read_s
                outputs[picks_of[held.expert]] = self._run_expert(activation, rows, index, held)
                if held.error is not None:
                    for request in self._requests_of(index):
                        request.fail(held.error)
                elif is_timed and self.cache.counters.read_s == waited_s:
                    self.cache.tiers.cost.observe_compute(
                        len(index),
                        self._layout.weight_bytes,
                        self._finished_at() - started,
                        in_host=held.in_host,
                    )
        return combine(outputs, top_k_index, top_k_weights)

    def _finished_at(self) -> float:
        """Now, with all that was asked of the device done."""
        if self._device.type == "cuda":
            # What is queued would be counted with the next expert, or the last one not at all; a
            # few experts only are timed.
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _is_any_wanted(self, rows: torch.Tensor) -> bool:
        """True where one of these rows of the step belongs to a request that is still there."""
        if all(request.still_wanted() for request in self._batch):
            return True
        return bool(self._requests_of(rows))

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
        experts: Any = self._module.get_submodule(f"model.layers.{layer}.mlp.experts")
        row = torch.zeros(1, self.checkpoint.hidden_size, dtype=self._dtype, device=self._device)
        first = torch.zeros(1, dtype=torch.int64, device=self._device)
        with torch.inference_mode(), closing(self.cache.acquire(layer, [expert])) as groups:
            for held in groups:
                self._run_expert(experts.act_fn, Rows(row, self._layout.w13), first, held)
                if held.error is not None:
                    raise held.error

    def _run_expert(
        self, activation: Activation, rows: "Rows", index: torch.Tensor, held: Held
    ) -> torch.Tensor:
        """One expert over the rows that `index` names, where its weights are."""
        first, *others = torch.split(index, EXPERT_ROWS)
        if held.memory.device.type == "cpu" and self._has_silu:
            run = self._start_expert(rows, first, held)
            for arrived_bytes in held.arrivals:
                run.advance(arrived_bytes)
            outputs = [] if held.dropped else [run.output()]
        else:
            for _ in held.arrivals:
                pass
            others = [first, *others]
            outputs = []
        if held.dropped:
            return rows.values.new_zeros(len(index), rows.values.shape[1])
        outputs += [self._run_arrived(activation, rows, part, held) for part in others]
        return torch.cat(outputs).to(self._device)

    def _run_arrived(
        self, activation: Activation, rows: "Rows", index: torch.Tensor, held: Held
    ) -> torch.Tensor:
        """At most EXPERT_ROWS rows, with all of the expert's weights there."""
        if held.memory.device.type == "cpu" and self._has_silu:
            run = self._start_expert(rows, index, held)
            run.advance(self._layout.stride_bytes)
            return run.output()
        return swiglu(
            rows.values[index].to(held.memory.device),
            held.memory,
            intermediate_size=self.checkpoint.intermediate_size,
            w2_offset=self._layout.w2_offset,
            activation=activation,
        )

    def _start_expert(self, rows: "Rows", index: torch.Tensor, held: Held) -> ExpertRun:
        layout = self._layout
        return ExpertRun(
            rows.prepared(index),
            held.memory,
            layout.w13,
            layout.w2,
            layout.w3_offset,
            layout.w2_offset,
        )

    def _attach(self, layer: int, block: nn.Module) -> None:
        """Gives a layer's sparse block our experts, and times its router."""
        experts: Any = block.get_submodule("experts")
        for name in [name for name, _ in experts.named_parameters()]:
            delattr(experts, name)
        experts.run_cached = partial(self._run_experts, layer, experts.act_fn)
        started = 0.0

        def before(_module: nn.Module, _args: object) -> None:
            nonlocal started
            started = time.perf_counter()

        def after(_module: nn.Module, _args: object, output: tuple[torch.Tensor, ...]) -> None:
            if self._look_ahead is not None:
                self._look_ahead.observe(layer, output[0])
            self.router_s += time.perf_counter() - started

        gate = block.get_submodule("gate")
        gate.register_forward_pre_hook(before)
        gate.register_forward_hook(after)


class Rows:
    """The input of a layer's experts: prepared for the kernels once, whatever asks for rows.

    Args:
        values: (T, H).
        layout: Of the matrices that it is multiplied with.
    """

    def __init__(self, values: torch.Tensor, layout: MatrixLayout) -> None:
        self.values = values
        self._layout = layout
        self._prepared: Activations | None = None

    def prepared(self, index: torch.Tensor) -> Activations:
        """Rows as the CPU's kernels want them."""
        if self._prepared is None:
            self._prepared = prepare(self.values.cpu(), self._layout)
        return self._prepared.rows(index.cpu())


def _build_module(
    checkpoint: Checkpoint, config: dict[str, Any], device: torch.device
) -> nn.Module:
    """The model without storage: ours for a plain Mixtral, transformers' for everything else."""
    if checkpoint.is_plain:
        return Mixtral(checkpoint, config).eval()
    # Imported only where it is needed: it takes longer than all else that the engine imports.
    from moe_server.transformers_module import build_module  # noqa: PLC0415

    return build_module(checkpoint, device)
