"""Makes a packed store of a checkpoint: `packed` says what one is, `pack_matrices` makes its bytes.

The store is written to `OUT.partial`, tensor by tensor, each noted in a journal once it is on the
disk; a later run checks what is there and goes on. It takes the name OUT when it is complete and
has passed the check of its quality. `commands/pack.py` calls it.
"""

import math
import mmap
import os
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from moe_server.checkpoint import DTYPES, Checkpoint, DenseTensor, read_checkpoint
from moe_server.direct_file import open_direct, write_aligned
from moe_server.directory import complete_or_absent, refuse_small_disk
from moe_server.errors import MoeServerError, Reason
from moe_server.kernels.formats import GROUP_COLUMNS, MatrixLayout, WeightFormat
from moe_server.offload.layout import PAGE_BYTES, ExpertId
from moe_server.offload.pages import map_pages
from moe_server.pack_journal import JOURNAL_FILE, Finished, Journal
from moe_server.pack_matrices import MatrixMaker, RoundingError
from moe_server.packed import (
    BYTES_DTYPE,
    MANIFEST_FILE,
    MAX_FILE_BYTES,
    Manifest,
    StoreFormat,
    group_files,
    hub_name,
    record_name,
)
from moe_server.safetensors_file import TensorEntry, build_header

COPIED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
)
SLACK_BYTES = 2**22
"""Room for the JSON files and for rounding to disk blocks."""
VERIFY_BYTES = 8 * 2**20

Assess = Callable[[Path, Mapping[str, Any]], Mapping[str, Any]]
"""(the finished store, what rounding changed) -> the quality report; raises if it is not good
enough."""


@dataclass(frozen=True, slots=True)
class PackReport:
    """What was made, and how fast."""

    path: Path
    size_bytes: int
    """Of the safetensors files."""
    records: int
    resumed: int
    """Records that an earlier run had made."""
    seconds: float
    """Until all of it was on the disk, and before its quality was measured."""
    quality: Mapping[str, Any]


def _ignore(_size_bytes: int) -> None:
    """No progress is wanted."""


def pack(
    source: Path,
    out: Path,
    stored: StoreFormat,
    *,
    assess: Assess,
    force: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
    written: Callable[[int], None] = _ignore,
) -> PackReport:
    """Packs the checkpoint `source` into the directory `out`.

    Args:
        source: A Hugging Face checkpoint.
        out: The directory to make.
        stored: See `choose_format`.
        assess: Measures the finished store.
        force: Replace whatever is at `out`, and the beginning of another run.
        max_file_bytes: Data in one file.
        written: Called with the bytes of each tensor that is done.

    Raises:
        MoeServerError: `source` cannot be packed, `out` is not ours to replace, the disk is too
            small or failed, or `assess` refused. All but the first two leave what was done.
    """
    started = time.perf_counter()
    checkpoint = read_checkpoint(source)
    _refuse_nested(source.resolve(), out.resolve())
    out = out.resolve()
    plan = _Plan(checkpoint, stored, max_file_bytes)
    identity = {
        "source": _source_files(checkpoint),
        "format": stored.names,
        "file size": max_file_bytes,
    }
    with complete_or_absent(
        out,
        marker=JOURNAL_FILE,
        what="the beginning of a packed store",
        force=force,
        resumable=True,
    ) as partial:
        journal = Journal(partial, identity, replace_other=force)
        with closing(journal):
            refuse_small_disk(
                partial,
                plan.size_bytes + SLACK_BYTES - _used_bytes(partial),
                "The rest of the store",
                "choose a smaller --format",
            )
            resumed = _write_store(plan, partial, journal, written)
        for pattern in COPIED_FILES:
            for file in source.glob(pattern):
                if file.is_file():
                    _copy(file, partial / file.name)
        files = {name: part.file_bytes for name, part in plan.files.items()}
        crc32 = {name: done.crc32 for name, done in journal.finished.items()}
        origin = {"path": str(source.resolve()), "files": identity["source"]}
        rounding = _relative_errors(journal.finished, checkpoint)
        Manifest(stored, files, crc32, origin, rounding).write(partial)
        seconds = time.perf_counter() - started
        quality = assess(partial, rounding)
        if _source_files(read_checkpoint(source)) != identity["source"]:
            raise MoeServerError(
                f"{source} changed while it was being packed.",
                "Pack it again, with --force, once it stays as it is.",
                reason=Reason.UNAVAILABLE,
            )
        Manifest(stored, files, crc32, origin, quality).write(partial)
    return PackReport(
        path=out,
        size_bytes=sum(files.values()),
        records=len(checkpoint.experts),
        resumed=resumed,
        seconds=seconds,
        quality=quality,
    )


def store_bytes(checkpoint: Checkpoint, stored: StoreFormat) -> int:
    """Size of a store's safetensors files."""
    return _Plan(checkpoint, stored, MAX_FILE_BYTES).size_bytes


def choose_format(
    checkpoint: Checkpoint, name: str, group_columns: int | None, *, dense_int8: bool
) -> StoreFormat:
    """The store's format, from what a user asked for.

    Args:
        checkpoint: What is to be packed.
        name: "bf16" keeps the checkpoint's own dtype; "int8" and "int4" quantise the experts.
        group_columns: Columns that share a scale, in int4; None: the default.
        dense_int8: Whether the dense matrices are to be int8, too.

    Raises:
        MoeServerError: The checkpoint is a packed store or float32, or the wishes contradict.
    """
    if (checkpoint.path / MANIFEST_FILE).exists():
        raise MoeServerError(
            f"{checkpoint.path} is a packed store already.",
            "Give the checkpoint that it was made from.",
            field="checkpoint",
        )
    if name == "bf16" and checkpoint.stored.dtype is WeightFormat.FLOAT32:
        raise MoeServerError(
            f"{checkpoint.path} is float32; bf16 keeps a checkpoint's own dtype and converts none.",
            "Pack it with --format int8 or int4, or serve it as it is.",
            reason=Reason.UNSUPPORTED,
            field="format",
        )
    if group_columns is not None and name != "int4":
        raise MoeServerError(
            f"A group size of {group_columns} in the format {name}, which has no groups.",
            "Leave --group-size out, or use --format int4.",
            field="group_size",
        )
    dtype = checkpoint.stored.dtype
    experts = dtype if name == "bf16" else WeightFormat(name)
    return StoreFormat(dtype, experts, group_columns or GROUP_COLUMNS, dense_int8=dense_int8)


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


class _Plan:
    """What a store consists of: a function of the checkpoint and the format alone."""

    def __init__(self, checkpoint: Checkpoint, stored: StoreFormat, max_file_bytes: int) -> None:
        self.checkpoint = checkpoint
        self.record_layout = stored.record_layout(
            checkpoint.hidden_size, checkpoint.intermediate_size
        )
        dense = [_dense_member(stored, name, one) for name, one in checkpoint.dense.items()]
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


def _dense_member(stored: StoreFormat, parameter: str, tensor: DenseTensor) -> _Member:
    name = hub_name(parameter)
    layout = stored.dense_layout(name, tensor.shape)
    if layout is None:
        entry = TensorEntry(name, DTYPES[stored.dtype], tensor.shape, tensor.nbytes)
    else:
        entry = TensorEntry(name, BYTES_DTYPE, (layout.nbytes,), layout.nbytes)
    return _Member(entry, tensor, layout)


def _write_store(
    plan: _Plan, partial: Path, journal: Journal, written: Callable[[int], None]
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
                if done is not None and _crc32(path, offset, member.entry.nbytes) == done.crc32:
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
    aligned = (offset | entry.nbytes) % PAGE_BYTES == 0
    file = open_direct(path, truncate=False) if aligned else os.open(path, os.O_WRONLY)
    try:
        if aligned:
            write_aligned(file, buffer, entry.nbytes, offset)
        else:
            _write_all(file, memoryview(buffer)[: entry.nbytes], offset)
        os.fdatasync(file)
        os.posix_fadvise(file, offset, entry.nbytes, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
    with memoryview(buffer) as view:
        crc32 = zlib.crc32(view[: entry.nbytes])
    return Finished(entry.name, crc32, rounding.squared_error, rounding.squared_norm)


def _write_header(path: Path, header: bytes) -> None:
    file = os.open(path, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        _write_all(file, memoryview(header), 0)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def _write_all(file: int, view: memoryview, offset: int) -> None:
    position = 0
    while position < len(view):
        position += os.pwrite(file, view[position:], offset + position)


def _crc32(path: Path, offset: int, nbytes: int) -> int:
    """Of what is on the disk; a file that ends before gives another one."""
    crc32 = 0
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        for start in range(0, nbytes, VERIFY_BYTES):
            crc32 = zlib.crc32(file.read(min(VERIFY_BYTES, nbytes - start)), crc32)
            os.posix_fadvise(file.fileno(), offset, start, os.POSIX_FADV_DONTNEED)
    return crc32


def _source_files(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Every file that the weights come from: its size, and when it last changed, in ns."""
    files = {tensor.file for tensor in checkpoint.dense.values()}
    for record in checkpoint.experts.values():
        files |= {segment.file for segment in record.segments}
    files.add(checkpoint.path / "config.json")
    stats = {file.name: file.stat() for file in sorted(files)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _relative_errors(
    finished: Mapping[str, Finished], checkpoint: Checkpoint
) -> dict[str, dict[str, float]]:
    """Root mean square error over root mean square weight, of what was quantised, by layer."""
    totals: dict[str, RoundingError] = {}
    for expert in checkpoint.experts:
        _add(totals, f"layer {expert.layer}", finished[record_name(expert)])
    for parameter in checkpoint.dense:
        _add(totals, "dense", finished[hub_name(parameter)])
    return {
        "weight_error": {
            name: math.sqrt(total.squared_error / total.squared_norm)
            for name, total in totals.items()
            if total.squared_norm
        }
    }


def _add(totals: dict[str, RoundingError], name: str, done: Finished) -> None:
    error = RoundingError(done.squared_error, done.squared_norm)
    totals[name] = totals.get(name, RoundingError()) + error


def _used_bytes(directory: Path) -> int:
    """What its files take of the disk."""
    return sum(512 * file.stat().st_blocks for file in directory.iterdir())


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    file = os.open(target, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _refuse_nested(source: Path, out: Path) -> None:
    """Taking the place of a directory removes what was there."""
    if source.is_relative_to(out):
        raise MoeServerError(
            f"{out} holds the checkpoint itself.",
            "Name another directory for the store.",
            field="out",
        )


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
