"""Packed stores of tiny checkpoints, and what is in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moe_server.checkpoint import Checkpoint, read_checkpoint
from moe_server.kernels.formats import MatrixLayout
from moe_server.kernels.quantised import dequantise
from moe_server.offload.layout import ExpertId
from moe_server.pack import PackReport, choose_format, pack


def take(_store: Path, rounding: Mapping[str, Any]) -> Mapping[str, Any]:
    """Takes any store, unmeasured."""
    return rounding


def pack_as(
    source: Path,
    out: Path,
    format_name: str,
    *,
    group: int | None = None,
    dense_int8: bool = False,
    **options: Any,
) -> PackReport:
    stored = choose_format(read_checkpoint(source), format_name, group, dense_int8=dense_int8)
    return pack(source, out, stored, **{"assess": take, **options})


def record(checkpoint: Checkpoint, expert: ExpertId) -> torch.Tensor:
    """An expert's record as a reader would have it: uint8 (stride,)."""
    content = bytearray(checkpoint.record_layout.stride_bytes)
    for part in checkpoint.record_segments(expert):
        with part.file.open("rb") as file:
            file.seek(part.file_offset)
            content[part.record_offset : part.record_offset + part.nbytes] = file.read(part.nbytes)
    return torch.frombuffer(content, dtype=torch.uint8)


def matrices(checkpoint: Checkpoint, expert: ExpertId) -> list[torch.Tensor]:
    """w1, w3 and w2 in float32."""
    layout, content = checkpoint.record_layout, record(checkpoint, expert)
    return [
        values(content[offset : offset + matrix.nbytes], matrix)
        for offset, matrix in (
            (layout.w1_offset, layout.w13),
            (layout.w3_offset, layout.w13),
            (layout.w2_offset, layout.w2),
        )
    ]


def values(content: torch.Tensor, matrix: MatrixLayout) -> torch.Tensor:
    """The weights that a matrix's bytes stand for."""
    if matrix.format.is_integer:
        return dequantise(content, matrix)
    dtype: torch.dtype = getattr(torch, matrix.format.value)
    return content.view(dtype).view(matrix.rows, matrix.columns).float()


def dense_values(checkpoint: Checkpoint, parameter: str) -> torch.Tensor:
    """A dense tensor in float32."""
    tensor = checkpoint.dense[parameter]
    content = tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
    stored = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if tensor.layout is not None:
        return dequantise(stored, tensor.layout)
    dtype: torch.dtype = getattr(torch, checkpoint.dtype)
    return stored.view(dtype).view(tensor.shape).float()


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}
