"""What a run of `pack` has finished: one line of JSON for each tensor that is on the disk.

The first line says what is being made from what, so that a later run goes on only if it would make
the same bytes. A line that a kill cut short does not count. Knows no tensors; `pack` calls it.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_server.directory import clear
from moe_server.errors import MoeServerError

JOURNAL_FILE = "pack.jsonl"


@dataclass(frozen=True, slots=True)
class Finished:
    """A tensor whose bytes are on the disk."""

    name: str
    checksums: str
    """Of its pieces, as the manifest has them."""
    squared_error: float = 0.0
    """Of its weights, summed, against the source; 0 where nothing was quantised."""
    squared_norm: float = 0.0
    """Of the source's weights, summed; 0 where nothing was quantised."""


class Journal:
    """Append-only; keeps what was read at the start up to date.

    Args:
        directory: Where its file is, or is to be.
        identity: What is being made from what, as JSON would give it back.
        replace_other: Clear the directory if an earlier run was making something else.

    Raises:
        MoeServerError: An earlier run was making something else, and is not to be replaced.
    """

    def __init__(
        self, directory: Path, identity: Mapping[str, Any], *, replace_other: bool
    ) -> None:
        path = directory / JOURNAL_FILE
        whole = _whole_lines(path)
        changed = _changed_keys(whole, identity)
        if changed and not replace_other:
            raise MoeServerError(
                f"{directory} holds the beginning of another run: its {' and '.join(changed)} "
                "differed.",
                "Repeat that run, or add --force to start again.",
            )
        if changed or not whole:
            clear(directory)
            whole = []
        entries = [Finished(**json.loads(line)) for line in whole[1:]]
        self.finished = {entry.name: entry for entry in entries}
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
        os.ftruncate(self._file, sum(map(len, whole)))
        if not whole:
            self._append([identity])

    def add(self, entries: Iterable[Finished]) -> None:
        """Notes tensors that are on the disk."""
        entries = list(entries)
        self._append([asdict(entry) for entry in entries])
        self.finished |= {entry.name: entry for entry in entries}

    def close(self) -> None:
        os.close(self._file)

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        written = os.write(self._file, text)
        if written < len(text):  # the rest fails, and says why
            os.write(self._file, text[written:])
        os.fsync(self._file)


def _whole_lines(path: Path) -> list[bytes]:
    """Those before the first that a kill, or the disk, has spoilt."""
    lines: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            is_table = isinstance(json.loads(line), dict)
        except ValueError:
            break
        if not is_table or not line.endswith(b"\n"):
            break
        lines.append(line)
    return lines


def _changed_keys(lines: list[bytes], identity: Mapping[str, Any]) -> list[str]:
    found = json.loads(lines[0]) if lines else identity
    return [key for key in identity if found.get(key) != identity[key]]
