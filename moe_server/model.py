"""A model that runs the scheduler's batches, with its experts in the expert cache.

`mixtral` or transformers builds the architecture, with attention (ragged, over paged keys and
values) and experts (rows grouped by expert, weights from slots) of ours in it. The module is built
without storage, and only the dense tensors are read. Knows nothing of requests, text or gRPC:
`engine` brings batches and takes logits.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moe_server import zero3
from moe_server.attention import RaggedBatch, RequestSpan
from moe_server.checkpoint import EMBEDDING, Checkpoint
from moe_server.dense import use_kernels
from moe_server.embedding import StoredEmbedding
from moe_server.errors import MoeServerError, Reason
from moe_server.json_file import read_json
from moe_server.kernels.experts import Activation
from moe_server.kv_cache import PagedKv
from moe_server.layer_experts import LayerExperts
from moe_server.mixtral import Mixtral
from moe_server.offload.prefetch import LookAhead
from moe_server.readout import ReadoutRows, ReadoutTaps
from moe_server.slot_run import can_compute
from moe_server.step import Step, StepInput, nothing
from moe_server.weights import Weights


class Model:
    """The model, ready to run steps. One thread only.

    Args:
        weights: What is read from disk.
        device: Where it computes.
        num_blocks: KV blocks.
        block_tokens: Tokens in a block.
        prefetch: Predict the next layer's experts.
        readout_rows: As many rows of logits are held at a time beside those that are returned.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        device: torch.device,
        num_blocks: int,
        block_tokens: int,
        prefetch: bool,
        readout_rows: int = 1,
    ) -> None:
        self.cache = weights.cache
        self.checkpoint = checkpoint = weights.checkpoint
        self._weights = weights
        self._prefetch = prefetch
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
        layers = self._module.get_submodule("model.layers").children()
        blocks = [layer.get_submodule("mlp") for layer in layers if checkpoint.experts]
        activation: Activation = F.silu
        # transformers wraps SiLU; the kernels know it by torch's name.
        if blocks and config.get("hidden_act", "silu") != "silu":
            stock: Any = blocks[0].get_submodule("experts")
            activation = stock.act_fn
        uses_slots = self.cache.tiers.on_gpu and can_compute(
            checkpoint.record_layout.format, self._dtype, activation
        )
        use_kernels(self._module, checkpoint, device, routes_on_gpu=uses_slots)
        self._embedding: StoredEmbedding | None = None
        if weights.embedding is not None:
            self._embedding = StoredEmbedding(weights.embedding, self._dtype)
            self._module.set_submodule(EMBEDDING, self._embedding)
        self._taps = ReadoutTaps(self._module, readout_rows)
        self.experts = LayerExperts(
            checkpoint,
            self.cache,
            weights.uses,
            activation,
            device,
            uses_slots=uses_slots,
        )
        for number, block in enumerate(blocks):
            self.experts.attach(number, block)
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
            self.experts.look_ahead = LookAhead(
                [block.mlp.gate.weight for block in blocks],
                [block.post_attention_layernorm.weight for block in blocks],
                self.checkpoint.num_experts_per_token,
            )

    def use_zero3(self, config_file: Path | None) -> None:
        """Hands the dense weights to DeepSpeed ZeRO-3; see `zero3.wrap`."""
        self._forward = zero3.wrap(self._module, self._dtype, self._device, config_file)

    @torch.inference_mode()
    def forward(
        self, batch: Sequence[StepInput], poll: Callable[[], None] = nothing
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
        readouts: list[ReadoutRows] = []
        for request in batch:
            first = request.num_context - len(request.token_ids)
            new_positions = range(first, request.num_context)
            spans.append(
                RequestSpan(
                    start=len(token_ids),
                    num_new=len(request.token_ids),
                    num_context=request.num_context,
                    num_prompt=request.num_prompt,
                    block_table=self._tensor(request.block_table),
                )
            )
            if request.readout is not None:
                num_new = len(request.token_ids)
                readouts.append(ReadoutRows(request.readout, len(token_ids), first, num_new))
            token_ids.extend(request.token_ids)
            positions.extend(new_positions)
            kv_positions.extend(
                request.block_table[position // self._block_tokens] * self._block_tokens
                + position % self._block_tokens
                for position in new_positions
            )
            if request.wants_logits:
                last_rows.append(len(token_ids) - 1)
        self.experts.step = step = Step(batch, poll)
        if self._embedding is not None:
            self._embedding.step = step
        self._taps.expect(readouts)
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


def _build_module(
    checkpoint: Checkpoint, config: dict[str, Any], device: torch.device
) -> nn.Module:
    """The model without storage: ours for a plain Mixtral, transformers' for everything else."""
    if checkpoint.is_plain:
        return Mixtral(checkpoint, config).eval()
    # Imported only where it is needed: it takes longer than all else that the engine imports.
    from moe_server.transformers_module import build_module  # noqa: PLC0415

    return build_module(checkpoint, device)
