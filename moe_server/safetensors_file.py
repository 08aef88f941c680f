"""One safetensors file: 8 bytes of length, a header in JSON, then the data it points into.

Reads headers without the data, and builds headers whose data begins on a page. Knows no models.
Pure Python; `checkpoint` reads with it, `synth` and `pack` write with it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_server.errors import MoeServerError, Reason

MAX_HEADER_BYTES = 100 * 2**20
"""The format's own bound on its header."""
DATA_ALIGN_BYTES = 4096
"""Where the data of our own files begins: on a page, as O_DIRECT asks for."""


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """Where a tensor's bytes are: `nbytes` from `offset` on in `file`, row-major."""

    file: Path
    offset: int
    nbytes: int
    dtype: str
    """As safetensors writes it, for example "BF16"."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What a header says of a tensor that is to be written."""

    name: str
    dtype: str
    """As the format writes it, for example "BF16"."""
    shape: tuple[int, ...]
    nbytes: int


def build_header(tensors: Iterable[TensorEntry]) -> bytes:
    """The bytes before the data, a multiple of `DATA_ALIGN_BYTES`.

    Args:
        tensors: In the order of their data, which follows without gaps.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (start, start + tensor.nbytes),
        }
        start += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Spaces after the JSON are the format's own way to align the data.
    text += b" " * (-(8 + len(text)) % DATA_ALIGN_BYTES)
    return len(text).to_bytes(8, "little") + text


def read_header(file: Path) -> Iterator[tuple[str, TensorLocation]]:
    """Yields every tensor's name and place.

    Raises:
        MoeServerError: The file is missing, truncated or no safetensors file.
    """
    try:
        with file.open("rb") as stream:
            if not stream.seekable():
                raise TypeError("it is no regular file")
            file_bytes = stream.seek(0, 2)
            stream.seek(0)
            header_bytes = int.from_bytes(stream.read(8), "little")
            data_start = 8 + header_bytes
            # Zeros are space that a download has reserved.
            if not 0 < header_bytes <= MAX_HEADER_BYTES or data_start > file_bytes:
                raise _truncated(file, f"its header says {header_bytes} bytes", file_bytes)
            header = json.loads(stream.read(header_bytes))
            if not isinstance(header, dict):
                raise TypeError("its header is no table")
            for name, entry in header.items():
                if name != "__metadata__":
                    tensor = _location(file, data_start, entry)
                    end = tensor.offset + tensor.nbytes
                    if end > file_bytes:
                        raise _truncated(file, f"{name} ends at byte {end}", file_bytes)
                    yield name, tensor
    except FileNotFoundError:
        raise MoeServerError(
            f"{file} is missing.",
            "Complete the download; every file that the index names must be there.",
            reason=Reason.UNAVAILABLE,
            field="model",
        ) from None
    except OSError as error:
        raise MoeServerError(
            f"Cannot read {file}: {error.strerror}.",
            "Check the file and its permissions.",
            reason=Reason.UNAVAILABLE,
            field="model",
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MoeServerError(
            f"{file} is not a valid safetensors file ({error}).",
            "Copy the file again.",
            field="model",
        ) from None


def _location(file: Path, data_start: int, entry: Mapping[str, Any]) -> TensorLocation:
    start, end = entry["data_offsets"]
    shape, dtype = entry["shape"], entry["dtype"]
    if any(type(number) is not int for number in (start, end, *shape)):
        raise TypeError(f"offsets {start}..{end} and shape {shape} are no whole numbers")
    if not isinstance(dtype, str) or not 0 <= start <= end:
        raise ValueError(f"dtype {dtype}, offsets {start}..{end}")
    return TensorLocation(file, data_start + start, end - start, dtype, tuple(shape))


def _truncated(file: Path, claim: str, file_bytes: int) -> MoeServerError:
    return MoeServerError(
        f"{file} is truncated: {claim}, but the file has {file_bytes} bytes.",
        "Copy the file again.",
        reason=Reason.UNAVAILABLE,
        field="model",
    )
