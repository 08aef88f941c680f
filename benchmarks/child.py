"""One measured process: started within a memory cap, asked line by line, ended whatever happens.

The cap is a memory cgroup, see `cgroups`. Knows no engine; `peers/session.py` is the other end of
the pipe.
"""

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from benchmarks.cgroups import LIMIT, MEMORY, memory_group, oom_kills, within

ANSWERS = "MOE_BENCH_ANSWERS"
TAIL_CHARACTERS = 600
END_TIMEOUT_S = 30


class ChildFailedError(Exception):
    """The process ended, answered nonsense or took too long; the message says which."""


class Child:
    """A running process; use `running`."""

    def __init__(
        self,
        process: subprocess.Popen[str],
        answers: TextIO,
        group: Path | None,
        log: Path,
        started_at: float,
    ) -> None:
        self.started_at = started_at
        """`time.monotonic()`, which Linux shares between processes."""
        self._process = process
        self._answers = answers
        self._group = group
        self._log = log
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._collect, daemon=True).start()

    def ask(self, work: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Sends a piece of work and waits for its answer."""
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended: `answer` says how
            self._process.stdin.write(json.dumps(work) + "\n")
            self._process.stdin.flush()
        return self.answer(timeout_s)

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """The next line it writes.

        Raises:
            ChildFailedError: There is none.
        """
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise ChildFailedError(f"no answer within {timeout_s:.0f} s") from None
        if line is None:
            raise ChildFailedError(self._how_it_ended())
        parsed: dict[str, Any] = json.loads(line)
        return parsed

    def _collect(self) -> None:
        with self._answers:
            for line in self._answers:
                self._lines.put(line)
        self._lines.put(None)

    def _how_it_ended(self) -> str:
        code = self._process.wait(END_TIMEOUT_S)
        if self._group is not None and oom_kills(self._group):
            return "killed by the memory cap"
        tail = self._log.read_text(errors="replace").strip()[-TAIL_CHARACTERS:]
        return f"ended with code {code}: {tail}"


@contextmanager
def running(
    command: Sequence[str], *, cap_bytes: int | None, log: Path, environ: Mapping[str, str]
) -> Iterator[Child]:
    """Starts `command`, within `cap_bytes` of memory if given.

    It answers to the descriptor that `ANSWERS` in its environment names; whatever it and its
    libraries print goes to `log`.
    """
    with memory_group(cap_bytes) as group, log.open("w") as printed:
        command = within([group] if group is not None else [], command)
        reading, writing = os.pipe()
        started_at = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=printed,
            env={**os.environ, **environ, ANSWERS: str(writing)},
            pass_fds=[writing],
            text=True,
            # So that it and all it starts can be ended together. Not a session: Linux gives each
            # a share of the processors of its own, not that of what it is compared with.
            process_group=0,
        )
        os.close(writing)
        try:
            yield Child(process, os.fdopen(reading), group, log, started_at)
        finally:
            _end(process)


def drop_page_cache() -> None:
    """Writes back and forgets what the kernel has cached of files; needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")


def can_cap() -> str | None:
    """None if this process may cap memory and drop the page cache; otherwise why not."""
    if os.geteuid() != 0:
        return "capping memory and dropping the page cache need root"
    if not (MEMORY / LIMIT).exists():
        return f"there is no memory cgroup of version 1 at {MEMORY}"
    return None


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()  # an idle one ends by itself
    with suppress(subprocess.TimeoutExpired):
        process.wait(3)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
