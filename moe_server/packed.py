"""The packed store: a checkpoint directory with one contiguous, page-aligned record per expert.

Beside the checkpoint's own JSON and tokenizer files it holds

    experts-0000N-of-M.safetensors   one U8 tensor per expert, its record, in the order of a pass
    dense-0000N-of-M.safetensors     everything else, under its Hugging Face name
    moe_server.json                  the manifest: formats, sizes, checksums of every tensor

All are valid safetensors files. This module knows names, shapes and the manifest; how weights lie
in a record is `kernels.formats`' business. Pure Python: `checkpoint` reads with it, `pack` and
`synth` write with it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from moe_server.errors import MoeServerError, Reason
from moe_server.json_file import read_json, write_json
from moe_server.kernels.formats import GROUP_CHOICES, MatrixLayout, WeightFormat
from moe_server.offload.checksum import PIECE_BYTES
from moe_server.offload.layout import ExpertId, RecordLayout
from moe_server.safetensors_file import TensorLocation, read_header

MANIFEST_FILE = "moe_server.json"
FORMAT_VERSION = 1
MAX_FILE_BYTES = 5 * 10**9
"""Data in one file, as on the hub."""
CHECKSUM = {"algorithm": "xxh3_64", "piece_bytes": PIECE_BYTES}
BYTES_DTYPE = "U8"
"""The safetensors dtype of records and quantised matrices."""

Tensor = TypeVar("Tensor")


@dataclass(frozen=True, slots=True)
class StoreFormat:
    """How a store holds its weights."""

    dtype: WeightFormat
    """The float format that the model computes in; dense weights have it unless `dense_int8`."""
    experts: WeightFormat
    group_columns: int
    """Columns that share a scale, in int4."""
    dense_int8: bool = False
    """True: the dense matrices are int8, all but the routers'."""

    @property
    def names(self) -> dict[str, str | int]:
        """As the manifest has it."""
        return {
            "dtype": self.dtype.value,
            "expert_format": self.experts.value,
            "group_columns": self.group_columns,
            "dense_format": "int8" if self.dense_int8 else "checkpoint",
        }

    @property
    def experts_text(self) -> str:
        """The experts' format, for people."""
        groups = f", groups of {self.group_columns}" if self.experts is WeightFormat.INT4 else ""
        return self.experts.value + groups

    def record_layout(self, hidden_size: int, intermediate_size: int) -> RecordLayout:
        return RecordLayout(hidden_size, intermediate_size, self.experts, self.group_columns)

    def dense_layout(self, name: str, shape: tuple[int, ...]) -> MatrixLayout | None:
        """How a dense tensor lies in its bytes if it is quantised; None: as in the checkpoint."""
        if not self.dense_int8 or len(shape) != 2 or name.endswith(".gate.weight"):
            return None
        return MatrixLayout(*shape, WeightFormat.INT8)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `moe_server.json` says."""

    format: StoreFormat
    files: Mapping[str, int]
    """Safetensors file -> its bytes."""
    checksums: Mapping[str, Sequence[int]]
    """Tensor -> XXH3 of each of its pieces, in order (`offload.checksum`)."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """What the store was made from."""
    quality: Mapping[str, Any] = field(default_factory=dict)
    """What quantising cost, as `pack` measured it."""

    def write(self, directory: Path) -> None:
        """Writes it to stable storage."""
        content = {
            "format_version": FORMAT_VERSION,
            **self.format.names,
            "files": self.files,
            "checksum": CHECKSUM,
            "checksums": {name: to_hex(pieces) for name, pieces in self.checksums.items()},
            "source": self.source,
            "quality": self.quality,
        }
        write_json(directory / MANIFEST_FILE, content)


def record_name(expert: ExpertId) -> str:
    """The name of an expert's record in a packed store, whatever the checkpoint called it."""
    return f"model.layers.{expert.layer}.block_sparse_moe.experts.{expert.expert}"


def group_files(
    kind: str, tensors: Iterable[Tensor], nbytes: Callable[[Tensor], int], max_bytes: int
) -> dict[str, list[Tensor]]:
    """File name -> what it holds, filled in order.

    Args:
        kind: How the names begin.
        tensors: What is to be stored.
        nbytes: The size of one.
        max_bytes: Data in one file; a larger tensor gets a file of its own.
    """
    groups: list[list[Tensor]] = []
    size_bytes = 0
    for tensor in tensors:
        if not groups or size_bytes + nbytes(tensor) > max_bytes:
            groups.append([])
            size_bytes = 0
        groups[-1].append(tensor)
        size_bytes += nbytes(tensor)
    count = len(groups)
    return {
        f"{kind}-{number:05}-of-{count:05}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


def to_hex(checksums: Iterable[int]) -> str:
    """Checksums in a row, 16 digits each: JSON readers round whole numbers of 64 bits."""
    return "".join(f"{checksum:016x}" for checksum in checksums)


def from_hex(text: str) -> list[int]:
    """What `to_hex` was given.

    Raises:
        ValueError: It is something else.
    """
    return [int(text[start : start + 16], 16) for start in range(0, len(text), 16)]


def read_manifest(directory: Path) -> Manifest:
    """Reads and checks the manifest.

    Raises:
        MoeServerError: It is damaged, or of another version of the format.
    """
    file = directory / MANIFEST_FILE
    content = read_json(file)
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise MoeServerError(
            f"{file}: format_version is {version!r}, this version of moe-server reads "
            f"{FORMAT_VERSION}.",
            "Pack the checkpoint again with this version, or serve it with the one that packed it.",
            reason=Reason.UNSUPPORTED,
            field="model",
        )
    try:
        return _parse(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MoeServerError(
            f"{file} is damaged ({error!r}).",
            "Copy the store again, or pack the checkpoint again.",
            field="model",
        ) from None


def _parse(content: Mapping[str, Any]) -> Manifest:
    stored = StoreFormat(
        dtype=WeightFormat(content["dtype"]),
        experts=WeightFormat(content["expert_format"]),
        group_columns=content["group_columns"],
        dense_int8={"int8": True, "checkpoint": False}[content["dense_format"]],
    )
    if stored.dtype.is_integer or not (stored.experts.is_integer or stored.experts is stored.dtype):
        raise ValueError(f"{stored.experts.value} experts in a model of {stored.dtype.value}")
    if stored.group_columns not in GROUP_CHOICES:
        raise ValueError(f"group_columns {stored.group_columns!r}")
    if not all(type(size_bytes) is int for size_bytes in content["files"].values()):
        raise TypeError("sizes of files must be whole numbers")
    if content["checksum"] != CHECKSUM:
        raise ValueError(f"checksum {content['checksum']!r}")
    if any(Path(name).name != name for name in content["files"]):
        raise ValueError("a file outside of the directory")
    checksums = {name: from_hex(text) for name, text in content["checksums"].items()}
    return Manifest(stored, content["files"], checksums, content["source"], content["quality"])


def read_headers(directory: Path, manifest: Manifest) -> dict[str, TensorLocation]:
    """Every tensor's place, by its name in the files.

    Raises:
        MoeServerError: A file is missing, or has another size than the manifest says.
    """
    tensors: dict[str, TensorLocation] = {}
    for name, size_bytes in manifest.files.items():
        file = directory / name
        found = dict(read_header(file))
        file_bytes = file.stat().st_size
        if file_bytes != size_bytes:
            raise MoeServerError(
                f"{file} has {file_bytes} bytes, {MANIFEST_FILE} says {size_bytes}.",
                "Copy the store again, or pack the checkpoint again.",
                field="model",
            )
        tensors.update(found)
    return tensors
