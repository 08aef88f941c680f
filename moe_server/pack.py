"""Makes a packed store of a checkpoint; `packed` says what one is.

Decides which formats a checkpoint can be packed in, whether there is room, and that a store takes
its name when it is complete and has passed the check of its quality. Until then it is
`OUT.partial`, and a later run goes on with it. `pack_files` writes, `pack_matrices` makes the
bytes; `commands/pack.py` calls it.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_server.checkpoint import Checkpoint, read_checkpoint, refuse_integer_activation
from moe_server.directory import complete_or_absent, refuse_small_disk
from moe_server.errors import MoeServerError, Reason
from moe_server.json_file import read_json
from moe_server.kernels.formats import GROUP_COLUMNS, WeightFormat
from moe_server.pack_files import StorePlan, write_store
from moe_server.pack_journal import JOURNAL_FILE, Finished, Journal
from moe_server.pack_matrices import RoundingError
from moe_server.packed import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    MAX_FILE_BYTES,
    Manifest,
    StoreFormat,
    from_hex,
    record_name,
)

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
    plan = StorePlan(checkpoint, stored, max_file_bytes)
    identity = {
        "source": _source_files(checkpoint),
        "format": stored.names,
        "file size": max_file_bytes,
        "version": FORMAT_VERSION,
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
            resumed = write_store(plan, partial, journal, written)
        for pattern in COPIED_FILES:
            for file in source.glob(pattern):
                if file.is_file():
                    _copy(file, partial / file.name)
        files = {name: part.file_bytes for name, part in plan.files.items()}
        sums = {name: from_hex(done.checksums) for name, done in journal.finished.items()}
        origin = {"path": str(source.resolve()), "files": identity["source"]}
        rounding = _relative_errors(journal.finished, checkpoint)
        Manifest(stored, files, sums, origin, rounding).write(partial)
        seconds = time.perf_counter() - started
        quality = assess(partial, rounding)
        if _source_files(read_checkpoint(source)) != identity["source"]:
            raise MoeServerError(
                f"{source} changed while it was being packed.",
                "Pack it again, with --force, once it stays as it is.",
                reason=Reason.UNAVAILABLE,
            )
        Manifest(stored, files, sums, origin, quality).write(partial)
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
    return StorePlan(checkpoint, stored, MAX_FILE_BYTES).size_bytes


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
        MoeServerError: The checkpoint is a packed store or float32, its activation is not for
            integers, or the wishes contradict.
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
    stored = StoreFormat(dtype, experts, group_columns or GROUP_COLUMNS, dense_int8=dense_int8)
    refuse_integer_activation(read_json(checkpoint.path / "config.json"), stored, checkpoint.path)
    return stored


def _source_files(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Every file that the weights come from: its size, and when it last changed, in ns."""
    files = {tensor.file for tensor in checkpoint.dense.values()}
    for segments in checkpoint.experts.values():
        files |= {segment.file for segment in segments}
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
        _add(totals, "dense", finished[checkpoint.kind.hub_name(parameter)])
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
