"""`moe-server synth`: a Mixtral-shaped Hugging Face checkpoint with random weights, of any size.

For trying out machines, budgets and deployments without a download. Decides what may be replaced,
whether there is room, and that a checkpoint appears under its name only when it is complete.
`synth_spec` says what it consists of, `synth_weights` makes and writes the bytes. Knows nothing of
the server. The CLI calls it.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from moe_server.budget import usable_cores
from moe_server.config import parse_bytes
from moe_server.directory import complete_or_absent, refuse_small_disk
from moe_server.json_file import write_json
from moe_server.kernels.formats import GROUP_CHOICES, GROUP_COLUMNS
from moe_server.packed import Manifest
from moe_server.progress import progress
from moe_server.synth_spec import SynthSpec
from moe_server.synth_weights import Dtype, write_shard

__all__ = ["Dtype", "SynthReport", "SynthSpec", "synth", "synth_command"]

MARKER = "synth.json"
"""The file that says a directory is ours to replace; it holds the spec."""
SLACK_BYTES = 2**20
"""Room for the JSON files and for rounding to disk blocks."""
MAX_THREADS = 16
"""Each holds a block of memory; more of them than this write no faster to any one disk."""


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
    threads = threads or min(usable_cores() + 1, MAX_THREADS)
    shards = spec.shards()
    size_bytes = sum(shard.file_bytes for shard in shards.values())
    with complete_or_absent(
        out, marker=MARKER, what="a synthetic checkpoint", force=force
    ) as partial:
        refuse_small_disk(
            partial,
            size_bytes + SLACK_BYTES,
            "The checkpoint",
            "make a smaller checkpoint (--layers)",
        )
        made_from = asdict(spec) | {"dtype": spec.dtype.value}
        write_json(partial / MARKER, made_from)
        sums: dict[str, list[int]] = {}
        for name, shard in shards.items():
            sums |= write_shard(partial / name, shard, threads, written)
        if spec.stored is not None:
            files = {name: shard.file_bytes for name, shard in shards.items()}
            Manifest(spec.stored, files, sums, {"synth": made_from}).write(partial)
        elif len(shards) > 1:
            weight_map = {
                tensor.entry.name: name
                for name, shard in shards.items()
                for tensor in shard.tensors
            }
            index = {"metadata": {"total_size": spec.data_bytes}, "weight_map": weight_map}
            write_json(partial / "model.safetensors.index.json", index)
        write_json(partial / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
        write_json(partial / "config.json", spec.config())
    seconds = time.perf_counter() - started
    return SynthReport(out, len(shards), spec.parameters, size_bytes, seconds)


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
@click.option(
    "--expert-format",
    default="checkpoint",
    show_default=True,
    type=click.Choice(["checkpoint", "int8", "int4"]),
    help="int8 and int4 write a packed store directly, as `moe-server pack` would make it.",
)
@click.option(
    "--group-size",
    default=GROUP_COLUMNS,
    show_default=True,
    type=click.Choice(GROUP_CHOICES),
    help="Weights that share a scale, in int4.",
)
@click.option(
    "--dense-format",
    default="checkpoint",
    show_default=True,
    type=click.Choice(["checkpoint", "int8"]),
    help="int8 quantises a packed store's dense matrices, too.",
)
@click.option("--seed", default=0, show_default=True, help="Same seed, same bytes.")
@click.option(
    "--force",
    is_flag=True,
    help="Replace OUT whatever is in it; without this only what synth wrote there before.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON line.")
def synth_command(out: Path, dtype: str, *, force: bool, as_json: bool, **dimensions: Any) -> None:
    """Write a Mixtral-shaped checkpoint with random weights to the directory OUT.

    The defaults are Mixtral 8x7B's dimensions: 46.7 B parameters, 93.4 GB in bf16. There is no
    tokenizer, so a server of it takes token ids.

    \b
    Example: two layers of real size, 6.3 GB
      moe-server synth /tmp/mixtral-2 --layers 2

    \b
    All layers in int4, 26 GB, without the 93 GB before
      moe-server synth /tmp/mixtral-int4 --expert-format int4
    """  # noqa: D301 - click keeps the lines of a paragraph that starts with this character
    spec = SynthSpec(dtype=Dtype(dtype), **dimensions)
    with progress("synth", spec.data_bytes) as written:
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
