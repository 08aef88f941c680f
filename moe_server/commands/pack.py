"""`moe-server pack`: a checkpoint into a packed store, with a report of what that cost."""

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from moe_server.checkpoint import Checkpoint, read_checkpoint
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
    "--max-drift",
    default=0.05,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Refuse a store whose perplexity is higher than the checkpoint's by more than this part.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A UTF-8 text to measure that on; unset: a built-in English one, or random tokens for a "
    "checkpoint without a tokenizer.",
)
@click.option(
    "--drift-tokens",
    default=1024,
    show_default=True,
    type=click.IntRange(min=0),
    help="How much of the text; both models are read once for it. 0: no measurement, no refusal.",
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
    max_drift: float,
    text: Path | None,
    drift_tokens: int,
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
    is_exact = not (stored.experts.is_integer or stored.dense_int8)

    def assess(store: Path, rounding: Mapping[str, Any]) -> Mapping[str, Any]:
        if is_exact or drift_tokens == 0:
            return rounding
        return {**rounding, **_measure(source, store, text, drift_tokens, max_drift)}

    if text is not None and not is_exact:
        _check_text(source, text, drift_tokens)
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
        *_drift_rows(report.quality),
    ]
    print_table(rows, to_stdout=True)


def _check_text(source: Checkpoint, text: Path, num_tokens: int) -> None:
    """Refuses a text before the work, not after it."""
    from moe_server.drift import take_sample  # noqa: PLC0415  # imports torch

    take_sample(source, text, num_tokens)


def _measure(
    source: Checkpoint, store: Path, text: Path | None, num_tokens: int, max_drift: float
) -> dict[str, Any]:
    """The same text through both models.

    Raises:
        MoeServerError: The store is too far from the checkpoint.
    """
    from moe_server.drift import measure_drift, refuse_drift, take_sample  # noqa: PLC0415
    from moe_server.layerwise import LayerwiseModel  # noqa: PLC0415

    packed = read_checkpoint(store)
    sample = take_sample(source, text, num_tokens)
    with (
        progress("quality", _bytes_to_read(source) + _bytes_to_read(packed)) as read,
        closing(LayerwiseModel(source, read)) as expected,
        closing(LayerwiseModel(packed, read)) as got,
    ):
        drift = measure_drift(expected.logits, got.logits, sample.windows)
    refuse_drift(drift, max_drift, packed.stored)
    return {
        "text": sample.description,
        **asdict(drift),
        "perplexity_ratio": drift.perplexity_ratio,
    }


def _bytes_to_read(checkpoint: Checkpoint) -> int:
    experts = len(checkpoint.experts) * checkpoint.record_layout.weight_bytes
    return checkpoint.dense_bytes + experts


def _drift_rows(quality: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "perplexity_ratio" not in quality:
        return []
    source, excess = quality["source_perplexity"], 100 * (quality["perplexity_ratio"] - 1)
    return [
        ("measured on", f"{quality['tokens']} tokens of {quality['text']}"),
        ("KL divergence", f"{quality['kl_divergence']:.5f} nats"),
        ("top-1 agreement", f"{100 * quality['top1_agreement']:.2f} %"),
        ("perplexity", f"{quality['perplexity']:.4g}, {excess:+.2f} % from {source:.4g}"),
    ]
