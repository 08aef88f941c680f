"""The files that are measured: what they are made of, and making, keeping and freeing them.

All are made from random weights, below one folder whose size is bounded: what is not needed now
goes when room is short. A model appears under its name only when it is complete.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from moe_server.synth_spec import SynthSpec

MAKE_TIMEOUT_S = 3600
Q4_0_BYTES_PER_WEIGHT = 0.575
"""Of a whole file: 4.5 bits a weight, and a few tensors of more."""
INT4_DENSE_BYTES_PER_WEIGHT = 1.05
INT4_EXPERT_BYTES_PER_WEIGHT = 0.57
"""Upper bounds: 8 and 4 bits a weight, and what scales a row or a group."""
DENSE = ("--dense-format", "int8")
"""The peer's 4-bit files have no large matrix in bf16 either."""
WRITER = Path(__file__).parent / "peers/write_gguf.py"


class ModelUnavailableError(Exception):
    """It could not be made."""


@dataclass(frozen=True)
class Model:
    """One model file or folder."""

    name: str
    spec: SynthSpec
    format: str
    """bf16 | int4 (a packed store of ours) | gguf-bf16 | gguf-q4_0."""
    source: str | None = None
    """The model it is made from; None: from nothing."""

    @property
    def size_bytes(self) -> int:
        """About what it takes on disk."""
        spec = self.spec
        expert_weights = spec.layers * spec.experts * 3 * spec.hidden * spec.intermediate
        if self.format == "gguf-q4_0":
            return round(spec.parameters * Q4_0_BYTES_PER_WEIGHT)
        if self.format == "int4":
            dense = (spec.parameters - expert_weights) * INT4_DENSE_BYTES_PER_WEIGHT
            return round(dense + expert_weights * INT4_EXPERT_BYTES_PER_WEIGHT)
        return spec.data_bytes


MIXTRAL_2 = SynthSpec(layers=2)
MIXTRAL_4 = SynthSpec(layers=4)
MIXTRAL_32 = SynthSpec(layers=32)
SMALL = SynthSpec(layers=4, hidden=2048, intermediate=7168, heads=16, kv_heads=4, vocab=8000)
"""For QUICK: a quarter of an expert's size."""
TINY = SynthSpec(
    layers=4,
    hidden=512,
    intermediate=1792,
    heads=8,
    kv_heads=2,
    vocab=8000,
    max_shard_bytes=40 * 10**6,
)
"""Loaded in no time, from several files."""
MODELS = {
    model.name: model
    for model in (
        Model("bf16-2", MIXTRAL_2, "bf16"),
        Model("bf16-4", MIXTRAL_4, "bf16"),
        Model("bf16-4.gguf", MIXTRAL_4, "gguf-bf16", "bf16-4"),
        Model("q4_0-4.gguf", MIXTRAL_4, "gguf-q4_0", "bf16-4.gguf"),
        Model("int4-4", MIXTRAL_4, "int4", "bf16-4"),
        Model("int4-4-synth", MIXTRAL_4, "int4"),
        Model("int4-32", MIXTRAL_32, "int4"),
        Model("q4_0-32.gguf", MIXTRAL_32, "gguf-q4_0"),
        Model("bf16-small", SMALL, "bf16"),
        Model("bf16-tiny", TINY, "bf16"),
        Model("int4-small", SMALL, "int4"),
        Model("bf16-small.gguf", SMALL, "gguf-bf16", "bf16-small"),
    )
}


class ModelFolder:
    """Where models are, and how many bytes they may take together.

    Args:
        path: The folder; nothing else may be in it.
        limit_bytes: Of everything in it.
        writer_python: Gives the interpreter that can write GGUF; may raise.
    """

    def __init__(self, path: Path, limit_bytes: int, writer_python: Callable[[], Path]) -> None:
        self._path = path
        self._limit_bytes = limit_bytes
        self._writer_python = writer_python
        path.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        return self._path / name

    def fit_together(self, names: Iterable[str]) -> bool:
        """Whether these models may be on disk at the same time."""
        return sum(MODELS[name].size_bytes for name in names) <= self._limit_bytes

    def require(self, name: str, keep: Iterable[str] = ()) -> Path:
        """The path of a model, made if it is missing.

        Args:
            name: Of the model.
            keep: Models that must not be freed for it.

        Raises:
            ModelUnavailableError: It could not be made.
        """
        path, model = self.path(name), MODELS[name]
        if path.exists():
            return path
        keep = {*keep, name} | ({model.source} if model.source else set())
        if model.source:
            self.require(model.source, keep)
        self.make_room(model.size_bytes, keep)
        print(f"Making {path} ...", file=sys.stderr)
        try:
            subprocess.run(
                self._command(model),
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=MAKE_TIMEOUT_S,
            )
        except (OSError, subprocess.SubprocessError) as error:
            self._remove(path.with_name(f"{name}.partial"))
            told = (getattr(error, "stderr", None) or str(error)).strip()[-400:]
            raise ModelUnavailableError(f"{name} could not be made: {told}") from None
        return path

    def make_room(self, size_bytes: int, keep: Iterable[str]) -> None:
        """Frees models, largest first, until `size_bytes` more are within the limit.

        Raises:
            ModelUnavailableError: There is not enough room without those to keep, or on the disk.
        """
        spare = [entry for entry in self._path.iterdir() if entry.name not in set(keep)]
        spare.sort(key=_size_bytes)
        free = shutil.disk_usage(self._path).free
        used = sum(map(_size_bytes, self._path.iterdir()))
        while used + size_bytes > self._limit_bytes or free < size_bytes:
            if not spare:
                raise ModelUnavailableError(
                    f"{size_bytes / 1e9:.1f} GB are needed in {self._path}, which holds "
                    f"{used / 1e9:.1f} of {self._limit_bytes / 1e9:.1f} GB; the disk has "
                    f"{free / 1e9:.1f} GB free"
                )
            entry = spare.pop()
            print(f"Freeing {entry} ...", file=sys.stderr)
            self._remove(entry)
            free = shutil.disk_usage(self._path).free
            used = sum(map(_size_bytes, self._path.iterdir()))

    def free(self, name: str) -> None:
        """Removes a model if it is there."""
        self._remove(self.path(name))

    def _command(self, model: Model) -> list[str]:
        out, ours = str(self.path(model.name)), [sys.executable, "-m", "moe_server"]
        if model.format == "int4" and model.source:
            source = str(self.path(model.source))
            # Random weights have no text whose perplexity could say anything.
            return [*ours, "pack", source, out, "--format", "int4", *DENSE, "--drift-tokens", "0"]
        if model.format in ("bf16", "int4"):
            spec = model.spec
            shape = [
                *("--layers", str(spec.layers), "--hidden", str(spec.hidden)),
                *("--intermediate", str(spec.intermediate), "--vocab", str(spec.vocab)),
                *("--heads", str(spec.heads), "--kv-heads", str(spec.kv_heads)),
                *("--max-shard-size", str(spec.max_shard_bytes)),
            ]
            stored = ["--expert-format", "int4", *DENSE] if model.format == "int4" else []
            return [*ours, "synth", out, *shape, *stored]
        writer = [str(self._writer_python()), str(WRITER)]
        if model.format == "gguf-bf16":
            return [*writer, "convert", str(self.path(model.source or "")), out]
        if model.source:
            return [*writer, "quantize", str(self.path(model.source)), out]
        config = self._path.parent / f"{model.name}.config.json"
        config.write_text(json.dumps(model.spec.config()))
        return [*writer, "random", str(config), out]

    @staticmethod
    def _remove(entry: Path) -> None:
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def _size_bytes(entry: Path) -> int:
    files = entry.rglob("*") if entry.is_dir() else [entry]
    return sum(file.stat().st_size for file in files if file.is_file())
