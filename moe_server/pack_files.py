"""The files of a store that is being packed: what goes where, and its way to the disk.

Tensor by tensor, each noted in the journal once it is on the disk; what an earlier run noted is
checked and kept. `pack` calls it; `pack_matrices` makes the bytes.
"""

import mmap
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from moe_server.checkpoint import DTYPES, Checkpoint, DenseTensor
from moe_server.kernels.formats import MatrixLayout
from moe_server.large_file import LargeFile
from moe_server.offload.checksum import PIECE_BYTES, checksums
from moe_server.offload.layout import PAGE_BYTES, ExpertId
from moe_server.offload.pages import map_pages
from moe_server.pack_journal import Finished, Journal
from moe_server.pack_matrices import MatrixMaker, RoundingError
from moe_server.packed import BYTES_DTYPE, StoreFormat, group_files, record_name, to_hex
from moe_server.safetensors_file import TensorEntry, build_header


@dataclass(frozen=True, slots=True)
class _Member:
    """One tensor of a store, and what it is made from."""

    entry: TensorEntry
    source: ExpertId | DenseTensor
    layout: MatrixLayout | None
    """How a dense tensor is to be quantised; None: not at all."""


class _File:
    """One safetensors file to be written."""

    def __init__(self, members: list[_Member]) -> None:
        self.header = build_header(member.entry for member in members)
        sizes = [member.entry.nbytes for member in members]
        offsets = accumulate(sizes, initial=len(self.header))
        self.places = list(zip(members, offsets, strict=False))
        self.file_bytes = len(self.header) + sum(sizes)


class StorePlan:
    """What a store consists of: a function of the checkpoint and the format alone."""

    def __init__(self, checkpoint: Checkpoint, stored: StoreFormat, max_file_bytes: int) -> None:
        self.checkpoint = checkpoint
        self.record_layout = stored.record_layout(
            checkpoint.hidden_size, checkpoint.intermediate_size
        )
        dense = [
            _dense_member(stored, checkpoint.kind.hub_name(parameter), tensor)
            for parameter, tensor in checkpoint.dense.items()
        ]
        record_bytes = self.record_layout.stride_bytes
        records = [
            _Member(
                TensorEntry(record_name(expert), BYTES_DTYPE, (record_bytes,), record_bytes),
                expert,
                None,
            )
            for expert in sorted(checkpoint.experts)
        ]
        self.files = {
            name: _File(members)
            for kind, all_members in (("dense", dense), ("experts", records))
            for name, members in group_files(
                kind, all_members, lambda member: member.entry.nbytes, max_file_bytes
            ).items()
        }
        self.size_bytes = sum(file.file_bytes for file in self.files.values())
        self.largest_bytes = max(member.entry.nbytes for member in dense + records)


def _dense_member(stored: StoreFormat, name: str, tensor: DenseTensor) -> _Member:
    layout = stored.dense_layout(name, tensor.shape)
    if layout is None:
        entry = TensorEntry(name, DTYPES[stored.dtype], tensor.shape, tensor.nbytes)
    else:
        entry = TensorEntry(name, BYTES_DTYPE, (layout.nbytes,), layout.nbytes)
    return _Member(entry, tensor, layout)


def write_store(
    plan: StorePlan, partial: Path, journal: Journal, written: Callable[[int], None]
) -> int:
    """Makes what an earlier run has not, one tensor while the one before is being written.

    Returns:
        How many experts an earlier run had made.
    """
    buffers = [map_pages(_whole_pages(plan.largest_bytes)) for _ in range(2)]
    under_way: deque[Future[Finished]] = deque()
    resumed = number = 0
    with (
        closing(MatrixMaker(plan.checkpoint, plan.record_layout)) as maker,
        ThreadPoolExecutor(1, "write") as writer,
    ):
        for name, file in plan.files.items():
            path = partial / name
            _write_header(path, file.header)
            for member, offset in file.places:
                done = journal.finished.get(member.entry.name)
                if (
                    done is not None
                    and _checksums(path, offset, member.entry.nbytes) == done.checksums
                ):
                    resumed += isinstance(member.source, ExpertId)
                    written(member.entry.nbytes)
                    continue
                buffer = buffers[number % 2]
                number += 1
                if len(under_way) == 2:
                    journal.add([under_way.popleft().result()])
                if isinstance(member.source, ExpertId):
                    rounding = maker.record(member.source, buffer)
                else:
                    rounding = maker.dense(member.source, member.layout, buffer)
                under_way.append(
                    writer.submit(_write_member, path, offset, member.entry, buffer, rounding)
                )
                written(member.entry.nbytes)
        while under_way:
            journal.add([under_way.popleft().result()])
    return resumed


def _write_member(
    path: Path, offset: int, entry: TensorEntry, buffer: mmap.mmap, rounding: RoundingError
) -> Finished:
    """Brings a tensor to stable storage."""
    with closing(LargeFile(path, keep=True)) as file:
        file.write(buffer, entry.nbytes, offset)
        file.sync()
    pieces = to_hex(checksums(memoryview(buffer)[: entry.nbytes]))
    return Finished(entry.name, pieces, rounding.squared_error, rounding.squared_norm)


def _write_header(path: Path, header: bytes) -> None:
    memory = map_pages(len(header))
    memory[:] = header
    with closing(LargeFile(path, keep=True)) as file:
        file.write(memory, len(header), 0)
        file.sync()


def _checksums(path: Path, offset: int, nbytes: int) -> str:
    """Of what is on the disk; where the file ends before, they are other ones."""
    pieces: list[int] = []
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        for start in range(0, nbytes, PIECE_BYTES):
            pieces += checksums(memoryview(file.read(min(PIECE_BYTES, nbytes - start))))
            os.posix_fadvise(file.fileno(), offset, start, os.POSIX_FADV_DONTNEED)
    return to_hex(pieces)


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
