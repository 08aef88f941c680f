"""`moe-server synth`: a Mixtral-shaped Hugging Face checkpoint with random weights, of any size.

For trying out machines, budgets and deployments without a download. Decides what may be replaced,
whether there is room, and that a checkpoint appears under its name only when it is complete.
`synth_spec` says what it consists of, `synth_weights` makes and writes the bytes. Knows nothing of
the server. The CLI calls it.
"""

import errno
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from moe_server.config import parse_bytes
from moe_server.errors import MoeServerError, Reason
from moe_server.synth_spec import SynthSpec
from moe_server.synth_weights import Dtype, write_shard

__all__ = ["Dtype", "SynthReport", "SynthSpec", "synth", "synth_command"]

MARKER = "synth.json"
"""The file that says a directory is ours to replace; it holds the spec."""
SLACK_BYTES = 2**20
"""Room for the JSON files and for rounding to disk blocks."""
MAX_THREADS = 16
"""Each holds a block of memory; more of them than this write no faster to any one disk."""
LOG_INTERVAL_S = 5.0


@dataclass(frozen=True, slots=True)
class SynthReport:
    """What was made, and how fast."""

    path: Path
    files: int
    """Safetensors files."""
    parameters: int
    size_bytes: int
    """Of the safetensors files, headers included."""
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """To stable storage, everything included."""
        return self.size_bytes / self.seconds


def _ignore(_size_bytes: int) -> None:
    """No progress is wanted."""


def synth(
    out: Path,
    spec: SynthSpec,
    *,
    force: bool = False,
    threads: int | None = None,
    written: Callable[[int], None] = _ignore,
) -> SynthReport:
    """Writes the checkpoint to `OUT.partial` and renames it when it is complete.

    Same spec, same bytes, on any machine and with any number of threads.

    Args:
        out: The directory to make. An earlier synthetic checkpoint there is replaced.
        spec: What to make.
        force: Replace whatever else is there, too.
        threads: Threads that make and write the weights; None: one more than there are cores, for
            one that waits for the disk.
        written: Called with the bytes of each block as it is written.

    Raises:
        MoeServerError: `out` is not ours to replace, the disk is too small or cannot be written.
    """
    started = time.perf_counter()
    out = out.resolve()
    threads = threads or min(len(os.sched_getaffinity(0)) + 1, MAX_THREADS)
    shards = spec.shards()
    size_bytes = sum(shard.file_bytes for shard in shards.values())
    try:
        with _complete_or_absent(out, force=force) as partial:
            _refuse_small_disk(partial, size_bytes + SLACK_BYTES)
            _write_json(partial / MARKER, asdict(spec) | {"dtype": spec.dtype.value})
            for name, shard in shards.items():
                write_shard(partial / name, shard, threads, written)
            if len(shards) > 1:
                weight_map = {t.name: name for name, shard in shards.items() for t in shard.tensors}
                index = {"metadata": {"total_size": spec.data_bytes}, "weight_map": weight_map}
                _write_json(partial / "model.safetensors.index.json", index)
            _write_json(partial / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
            _write_json(partial / "config.json", spec.config())
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        raise MoeServerError(
            f"Cannot write {error.filename or out}: {error.strerror}.",
            "Free some space or take another disk." if full else "Check the path and permissions.",
            reason=Reason.EXHAUSTED if full else Reason.INVALID,
        ) from error
    seconds = time.perf_counter() - started
    return SynthReport(out, len(shards), spec.parameters, size_bytes, seconds)


@contextmanager
def _complete_or_absent(out: Path, *, force: bool) -> Iterator[Path]:
    """A directory beside `out` that takes its place on success and goes away on failure."""
    _refuse_foreign(out, force=force)
    partial = out.with_name(f"{out.name}.partial")
    _refuse_foreign(partial, force=force)
    partial.mkdir(parents=True, exist_ok=True)
    directory = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MoeServerError(
                f"Another process is writing {partial}.",
                "Wait until it is done, or name another directory.",
                reason=Reason.UNAVAILABLE,
            ) from None
        try:
            for leftover in partial.iterdir():  # of a run that was killed
                _remove(leftover)
            yield partial
            os.fsync(directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _publish(partial, out)
    finally:
        os.close(directory)


def _refuse_foreign(directory: Path, *, force: bool) -> None:
    """Refuses what is neither absent, nor empty, nor a synthetic checkpoint."""
    if not directory.exists():
        return
    if directory.is_mount() or not directory.is_dir():
        raise MoeServerError(
            f"{directory} is a file or a mount point, which cannot be replaced.",
            "Name a directory that does not exist, for example one below it.",
        )
    if not force and any(directory.iterdir()) and not (directory / MARKER).is_file():
        raise MoeServerError(
            f"{directory} is not empty and not a synthetic checkpoint.",
            "Name another directory, or add --force to delete what is in it.",
        )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _refuse_small_disk(directory: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        needed, free = needed_bytes / 1e9, free_bytes / 1e9
        raise MoeServerError(
            f"The checkpoint needs {needed:.2f} GB and the disk of {directory} has {free:.2f} GB "
            f"free: {needed - free:.2f} GB are missing.",
            "Free that much, take another disk, or make a smaller checkpoint (--layers).",
            reason=Reason.EXHAUSTED,
        )


def _write_json(path: Path, content: object) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _publish(partial: Path, out: Path) -> None:
    """Renames `partial` to `out`; what was there goes only when its successor is in place."""
    replaced = "replaced"
    if out.exists():
        out.rename(partial / replaced)
    partial.rename(out)
    shutil.rmtree(out / replaced, ignore_errors=True)


@contextmanager
def _progress(total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Takes the bytes of each block: a bar on a terminal, a line every few seconds elsewhere."""
    if sys.stderr.isatty():
        columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=total_bytes)
            yield lambda size_bytes: bar.advance(task, size_bytes)
        return
    started = logged = time.monotonic()
    done_bytes = 0

    def log(size_bytes: int) -> None:
        nonlocal logged, done_bytes
        done_bytes += size_bytes
        now = time.monotonic()
        if now - logged >= LOG_INTERVAL_S:
            logged = now
            done, total = done_bytes / 1e9, total_bytes / 1e9
            rate = done / (now - started)
            click.echo(f"synth: {done:.1f} of {total:.1f} GB, {rate:.2f} GB/s", err=True)

    yield log


def _shard_size(_context: click.Context, _parameter: click.Parameter, text: str) -> int:
    try:
        size_bytes = parse_bytes(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a size: {error}.") from None
    if not isinstance(size_bytes, int):
        raise click.BadParameter(f"{text!r} is not a size; write for example 5GB.")
    return size_bytes


@click.command("synth")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layers", default=32, show_default=True, help="Decoder layers.")
@click.option("--hidden", default=4096, show_default=True, help="Width of the residual stream.")
@click.option("--intermediate", default=14336, show_default=True, help="Width of one expert.")
@click.option("--experts", default=8, show_default=True, help="Experts per layer.")
@click.option("--top-k", default=2, show_default=True, help="Experts each token goes to.")
@click.option("--heads", default=32, show_default=True, help="Attention heads.")
@click.option("--kv-heads", default=8, show_default=True, help="Heads of keys and values.")
@click.option("--vocab", default=32000, show_default=True, help="Token ids.")
@click.option(
    "--dtype",
    default=Dtype.BF16.value,
    show_default=True,
    type=click.Choice([dtype.value for dtype in Dtype]),
    help="How weights are stored.",
)
@click.option(
    "--max-shard-size",
    "max_shard_bytes",
    default="5GB",
    show_default=True,
    callback=_shard_size,
    help="Size of one safetensors file.",
)
@click.option("--seed", default=0, show_default=True, help="Same seed, same bytes.")
@click.option(
    "--force",
    is_flag=True,
    help="Replace OUT whatever is in it; without this only what synth wrote there before.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON line.")
def synth_command(out: Path, dtype: str, *, force: bool, as_json: bool, **dimensions: int) -> None:
    """Write a Mixtral-shaped checkpoint with random weights to the directory OUT.

    The defaults are Mixtral 8x7B's dimensions: 46.7 B parameters, 93.4 GB in bf16. There is no
    tokenizer, so a server of it takes token ids.

    \b
    Example: two layers of real size, 6.3 GB
      moe-server synth /tmp/mixtral-2 --layers 2
    """  # noqa: D301 - click keeps the lines of a paragraph that starts with this character
    spec = SynthSpec(dtype=Dtype(dtype), **dimensions)
    with _progress(spec.data_bytes) as written:
        report = synth(out, spec, force=force, written=written)
    if as_json:
        figures = {
            "path": str(report.path),
            "files": report.files,
            "bytes": report.size_bytes,
            "seconds": report.seconds,
            "bytes_per_second": report.bytes_per_second,
            "parameters": report.parameters,
        }
        click.echo(json.dumps(figures))
        return
    size, rate = report.size_bytes / 1e9, report.bytes_per_second / 1e9
    click.echo(
        f"{report.path}: {report.parameters:,} parameters, {size:.2f} GB in {report.files} files, "
        f"{report.seconds:.1f} s ({rate:.2f} GB/s)"
    )
