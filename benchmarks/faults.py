"""What `faulty_disk/sitecustomize.py` is told: read errors and slowness without root."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

FAULTY_DISK = Path(__file__).parent / "faulty_disk"


class Faults:
    """The disk below a folder, for processes started with `environ`.

    Args:
        file: Where the processes look.
        below: Which files are concerned.
    """

    def __init__(self, file: Path, below: Path) -> None:
        self._file = file
        self._below = str(below.resolve())
        self.end()

    @property
    def environ(self) -> Mapping[str, str]:
        """For a process that is to have this disk."""
        path = os.pathsep.join([str(FAULTY_DISK), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {"PYTHONPATH": path, "MOE_BENCH_FAULTS": str(self._file)}

    def hold(self) -> None:
        """Reads wait."""
        self._say(hold=True)

    def slow(self, bytes_per_s: float) -> None:
        """All reads of a process together are that slow."""
        self._say(bytes_per_s=bytes_per_s)

    def fail(self) -> None:
        """Reads fail as those of a broken disk."""
        self._say(errno=errno.EIO)

    def end(self) -> None:
        """A good disk again."""
        self._replace("")

    def _say(self, **faults: object) -> None:
        self._replace(json.dumps({"below": self._below, **faults}))

    def _replace(self, text: str) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(text, encoding="utf-8")
        new.replace(self._file)
