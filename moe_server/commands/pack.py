"""`moe-server pack`: a checkpoint into a packed store, with a report of what that cost."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from moe_server.checkpoint import read_checkpoint
from moe_server.commands.format import print_table
from moe_server.kernels.formats import GROUP_CHOICES, GROUP_COLUMNS
from moe_server.progress import progress


@click.command(
    "pack",
    epilog="Example: moe-server pack /models/Mixtral-8x7B /models/Mixtral-8x7B-int4 --format int4",
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_name",
    default="bf16",
    show_default=True,
    type=click.Choice(["bf16", "int8", "int4"]),
    help="How experts are stored; bf16 keeps the checkpoint's own dtype, bit for bit.",
)
@click.option(
    "--group-size",
    type=click.Choice(GROUP_CHOICES),
    help=f"Weights that share a scale, in int4: fewer are closer to the checkpoint and take more "
    f"bytes.  [default: {GROUP_COLUMNS}]",
)
@click.option(
    "--dense-format",
    default="checkpoint",
    show_default=True,
    type=click.Choice(["checkpoint", "int8"]),
    help="int8 quantises attention, embeddings and output layer, too; never routers and norms.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Replace whatever is at OUT, and the beginning of another run.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON line.")
def pack_command(
    checkpoint: Path,
    out: Path,
    format_name: str,
    group_size: int | None,
    dense_format: str,
    *,
    force: bool,
    as_json: bool,
) -> None:
    """Pack the Hugging Face CHECKPOINT into the directory OUT, for faster reads or fewer bytes.

    Each expert becomes one page-aligned, checksummed record in a safetensors file. A run that was
    killed goes on where it stopped when it is repeated.
    """
    from moe_server.pack import choose_format, pack, store_bytes  # noqa: PLC0415  # imports torch

    source = read_checkpoint(checkpoint)
    stored = choose_format(source, format_name, group_size, dense_int8=dense_format == "int8")

    def assess(_store: Path, rounding: Mapping[str, Any]) -> Mapping[str, Any]:
        return rounding

    with progress("pack", store_bytes(source, stored)) as written:
        report = pack(checkpoint, out, stored, assess=assess, force=force, written=written)
    if as_json:
        figures = {
            "path": str(report.path),
            "bytes": report.size_bytes,
            "seconds": report.seconds,
            "records": report.records,
            "resumed": report.resumed,
            **stored.names,
            "quality": report.quality,
        }
        click.echo(json.dumps(figures))
        return
    size, seconds = report.size_bytes / 1e9, report.seconds
    rows = [
        ("store", str(report.path)),
        ("experts", f"{report.records} in {stored.experts.value}, {report.resumed} made before"),
        ("size", f"{size:.2f} GB in {seconds:.1f} s ({size / seconds:.2f} GB/s)"),
        *(
            (f"weight error, {name}", f"{100 * error:.2f} %")
            for name, error in report.quality["weight_error"].items()
        ),
    ]
    print_table(rows, to_stdout=True)
