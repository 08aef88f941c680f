"""A disk that fails and dawdles: reads of large files as `FAULTS` says, in every process it is in.

Python imports a module of this name at its start, wherever PYTHONPATH leads to it. `FAULTS` in the
environment names a JSON file that is looked at before every read of a descriptor: absent or empty,
nothing happens. Keys:

- `below`: only files whose path begins so.
- `hold`: reads wait until it is gone.
- `bytes_per_s`: all reads together are that slow.
- `errno`: reads fail with it.

`benchmarks/faults.py` writes the file. Small metadata that is read through Python's own files
(config.json, the headers of safetensors) is not concerned.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAULTS = "MOE_BENCH_FAULTS"
POLL_S = 0.01

Read = Callable[..., int]


class Disk:
    """What stands before a read function of `os`.

    Args:
        file: Says what is wrong with it.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._free_at = 0.0

    def faulty(self, read: Read) -> Read:
        """A function like `read`, from this disk."""

        def faulty(descriptor: int, *arguments: Any) -> int:
            while (faults := self._faults(descriptor)).get("hold"):
                time.sleep(POLL_S)
            if "errno" in faults:
                raise OSError(faults["errno"], os.strerror(faults["errno"]))
            count = read(descriptor, *arguments)
            if "bytes_per_s" in faults:
                self._wait(count / faults["bytes_per_s"])
            return count

        return faulty

    def _faults(self, descriptor: int) -> dict[str, Any]:
        try:
            text = self._file.read_text(encoding="utf-8")
            faults: dict[str, Any] = json.loads(text) if text else {}
            path = str(Path(f"/proc/self/fd/{descriptor}").readlink()) if faults else ""
        except OSError:  # nothing is wrong
            return {}
        return faults if path.startswith(faults.get("below", "")) else {}

    def _wait(self, seconds: float) -> None:
        """Until all reads of all threads so far, one after another, would be through."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + seconds
            wait_s = self._free_at - time.monotonic()
        time.sleep(max(0.0, wait_s))


if FAULTS in os.environ:
    disk = Disk(Path(os.environ[FAULTS]))
    os.preadv, os.readv = disk.faulty(os.preadv), disk.faulty(os.readv)
