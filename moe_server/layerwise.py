"""A model that keeps none of its weights: each is read when it is needed and forgotten.

For looking at a checkpoint of any size in little memory, once: `drift` compares two of them. The
architecture and the attention are transformers'; matrices are computed by the kernels that serve
them. Knows no cache, no batches and no tokens beyond one call.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from moe_server.checkpoint import Checkpoint, DenseTensor
from moe_server.dense import use_kernels
from moe_server.kernels.experts import ExpertRun
from moe_server.kernels.products import prepare
from moe_server.kernels.routing import combine, plan_routing
from moe_server.offload.checksum import ChecksumBook
from moe_server.offload.layout import ExpertId, Segment
from moe_server.offload.pages import address_of, map_pages
from moe_server.offload.reader import Reader

EXPERTS_NAME = "moe_server_layerwise"
READ_THREADS = 2
READ_BLOCK_BYTES = 8 * 2**20


class LayerwiseModel:
    """One forward pass at a time.

    Args:
        checkpoint: A plain checkpoint or a packed store.
        read: Called with the bytes of every tensor that was read.
    """

    def __init__(self, checkpoint: Checkpoint, read: Callable[[int], None]) -> None:
        self._checkpoint = checkpoint
        self._read = read
        self._dtype: torch.dtype = getattr(torch, checkpoint.dtype)
        book = ChecksumBook(checkpoint.checksums)
        self._reader = Reader(READ_THREADS, READ_BLOCK_BYTES, book)
        stride = checkpoint.record_layout.stride_bytes
        self._pages = map_pages(stride)
        self._record = torch.frombuffer(self._pages, dtype=torch.uint8, count=stride)
        self._module = self._build()

    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Of all positions.

        Args:
            token_ids: int64 (windows, positions).

        Returns:
            (windows, positions, vocab_size) in the checkpoint's dtype.

        Raises:
            MoeServerError: A weight could not be read.
        """
        with torch.inference_mode():
            logits: torch.Tensor = self._module(input_ids=token_ids, use_cache=False).logits
        return logits

    def close(self) -> None:
        """Ends the reading threads."""
        self._reader.close()

    def _build(self) -> nn.Module:
        # transformers looks for missing pieces on the hub; a checkpoint directory has all it needs.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import transformers  # noqa: PLC0415
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: PLC0415

        ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, _run_experts)
        path = self._checkpoint.path
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        config.head_dim = self._checkpoint.head_dim
        config.output_router_logits = False
        with torch.device("meta"):
            module: nn.Module = transformers.AutoModelForCausalLM.from_config(
                config,
                dtype=self._dtype,
                attn_implementation="sdpa",
                experts_implementation=EXPERTS_NAME,
            )
        base: Any = module.get_submodule("model")
        base.rotary_emb = type(base.rotary_emb)(config)
        layers = list(module.get_submodule("model.layers").children())
        for number, layer in enumerate(layers if self._checkpoint.experts else ()):
            experts: Any = layer.get_submodule("mlp.experts")
            for name in [name for name, _ in experts.named_parameters()]:
                delattr(experts, name)
            experts.run_layerwise = partial(self._run_layer, number)
        use_kernels(module, self._checkpoint, torch.device("cpu"))
        dense = self._checkpoint.dense
        for parameter, tensor in dense.items():
            owner, _, name = parameter.rpartition(".")
            self._attach(module.get_submodule(owner), name, tensor)
        if "lm_head.weight" not in dense:
            embedding = dense["model.embed_tokens.weight"]
            self._attach(module.get_submodule("lm_head"), "weight", embedding)
        return module.eval()

    def _attach(self, owner: nn.Module, name: str, tensor: DenseTensor) -> None:
        """Lets a module have one of its parameters while it computes."""
        empty = owner.get_parameter(name)

        def before(module: Any, _args: object) -> None:
            weight = self._read_dense(tensor)
            if tensor.layout is None:
                weight = weight.view(self._dtype).view(tensor.shape)
            setattr(module, name, nn.Parameter(weight, requires_grad=False))

        def after(module: Any, _args: object, _output: object) -> None:
            setattr(module, name, empty)

        owner.register_forward_pre_hook(before)
        owner.register_forward_hook(after)

    def _read_dense(self, tensor: DenseTensor) -> torch.Tensor:
        weight = torch.empty(tensor.nbytes, dtype=torch.uint8)
        segment = Segment(tensor.file, tensor.offset, tensor.nbytes, 0)
        self._reader.submit([segment], weight.data_ptr()).wait()
        self._read(tensor.nbytes)
        return weight

    def _run_layer(
        self,
        layer: int,
        hidden_TH: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        plan = plan_routing(expert_ids_TK, weights_TK, self._checkpoint.num_experts)
        outputs_PH = hidden_TH.new_empty(len(plan.rows), hidden_TH.shape[1])
        for expert in plan.experts():
            rows = hidden_TH[plan.rows_of(expert)]
            outputs_PH[plan.picks_of(expert)] = self._run_expert(ExpertId(layer, expert), rows)
        return combine(outputs_PH, plan)

    def _run_expert(self, expert: ExpertId, rows: torch.Tensor) -> torch.Tensor:
        address = address_of(self._pages)
        segments = self._checkpoint.record_segments(expert)
        self._reader.submit(segments, address).wait()
        self._read(sum(segment.nbytes for segment in segments))
        layout = self._checkpoint.record_layout
        run = ExpertRun(
            prepare(rows, layout.w13),
            self._record,
            layout.w13,
            layout.w2,
            layout.w3_offset,
            layout.w2_offset,
        )
        run.advance(layout.stride_bytes)
        return run.output()


def _run_experts(experts: Any, *args: torch.Tensor) -> torch.Tensor:
    """What transformers calls for every experts module; each carries its own."""
    output: torch.Tensor = experts.run_layerwise(*args)
    return output
