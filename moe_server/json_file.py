"""JSON files of a checkpoint directory: read with a clear refusal, written to stable storage."""

import json
import os
from pathlib import Path
from typing import Any

from moe_server.errors import MoeServerError, Reason


def read_json(file: Path) -> dict[str, Any]:
    """The object that the file holds.

    Raises:
        MoeServerError: The file is missing, cannot be read or holds something else; UNAVAILABLE
            where it may be on its way: it is missing, or ends too soon.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MoeServerError(
            f"{file} is missing.",
            "Give a complete Hugging Face checkpoint directory.",
            reason=Reason.UNAVAILABLE,
            field="model",
        ) from None
    except OSError as error:
        raise MoeServerError(
            f"Cannot read {file}: {error.strerror}.",
            "Check the file and its permissions.",
            field="model",
        ) from None
    except (ValueError, RecursionError) as error:
        raise MoeServerError(
            f"{file} is not valid JSON ({error}).",
            "Copy the file again.",
            reason=Reason.UNAVAILABLE if is_cut_short(error) else Reason.INVALID,
            field="model",
        ) from None
    if not isinstance(content, dict):
        raise MoeServerError(
            f"{file} does not hold an object.", "Copy the file again.", field="model"
        )
    return content


def is_cut_short(error: Exception) -> bool:
    """Whether what is wrong with a JSON text is that it ends: a copy may not be complete yet."""
    if isinstance(error, UnicodeDecodeError):
        return error.reason == "unexpected end of data"
    return isinstance(error, json.JSONDecodeError) and (
        error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")
    )


def write_json(path: Path, content: object) -> None:
    """Writes the file and waits until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
