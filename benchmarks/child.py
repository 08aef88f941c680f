"""One measured process: started within a memory cap, asked line by line, ended whatever happens.

The cap is a memory cgroup (version 1), which counts page cache as well as memory of the process:
what a peer maps and what we allocate weigh the same. Knows no engine; `peers/session.py` is the
other end of the pipe.
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

CGROUPS = Path("/sys/fs/cgroup/memory")
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
        if self._group is not None and _oom_kills(self._group):
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
    with _memory_cap(cap_bytes) as group, log.open("w") as printed:
        if group is not None:
            enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
            command = ["/bin/sh", "-c", enter, "sh", *command]
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
    if not (CGROUPS / "memory.limit_in_bytes").exists():
        return f"there is no memory cgroup of version 1 at {CGROUPS}"
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


@contextmanager
def _memory_cap(cap_bytes: int | None) -> Iterator[Path | None]:
    if cap_bytes is None:
        yield None
        return
    group = CGROUPS / f"moe-bench-{os.getpid()}"
    group.mkdir(exist_ok=True)
    try:
        (group / "memory.limit_in_bytes").write_text(str(cap_bytes), encoding="ascii")
        yield group
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """A group can be removed once the kernel has seen its last process off."""
    for _ in range(100):
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.1)
        else:
            return


def _oom_kills(group: Path) -> int:
    lines = (group / "memory.oom_control").read_text(encoding="ascii").splitlines()
    return int(dict(line.split() for line in lines).get("oom_kill", 0))
