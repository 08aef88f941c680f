"""Groups of processes (cgroups, version 1) with a bound on their memory or on their reads.

A memory group counts page cache as well as memory of the processes: what one maps and what another
allocates weigh the same. Knows no servers; needs root.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMORY, BLKIO = CGROUPS / "memory", CGROUPS / "blkio"
LIMIT, READ_RATE = "memory.limit_in_bytes", "blkio.throttle.read_bps_device"


@contextmanager
def memory_group(cap_bytes: int | None) -> Iterator[Path | None]:
    """A group that may hold `cap_bytes`; none at all where that is None."""
    if cap_bytes is None:
        yield None
        return
    with _group(MEMORY) as group:
        limit_memory(group, cap_bytes)
        yield group


@contextmanager
def disk_group() -> Iterator[Path]:
    """A group whose reads `limit_reads` can slow down; O_DIRECT does not escape it."""
    with _group(BLKIO) as group:
        yield group


def limit_memory(group: Path, cap_bytes: int) -> None:
    """Raises or lowers what a memory group may hold.

    Raises:
        OSError: EBUSY: more is in use and cannot be given back.
    """
    (group / LIMIT).write_text(str(cap_bytes), encoding="ascii")


def memory_in_use(group: Path) -> int:
    """Bytes that the kernel cannot simply forget."""
    lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    stat = dict(line.split() for line in lines)
    return int(stat["total_rss"]) + int(stat["total_shmem"])


def limit_reads(group: Path, folder: Path, bytes_per_s: int) -> None:
    """Slows the group's reads from the disk that `folder` is on; 0: as fast as it goes."""
    device = folder.stat().st_dev
    # A partition has no throttle of its own; here and in most clouds the disk is the device.
    rate = f"{os.major(device)}:{os.minor(device)} {bytes_per_s}"
    (group / READ_RATE).write_text(rate, encoding="ascii")


def within(groups: Sequence[Path], command: Sequence[str]) -> list[str]:
    """A command line that enters the groups first; its process id stays the same."""
    if not groups:
        return list(command)
    enter = " && ".join(f"echo $$ > {group}/cgroup.procs" for group in groups)
    return ["/bin/sh", "-c", f'{enter} && exec "$@"', "sh", *command]


def oom_kills(group: Path) -> int:
    """Processes of a memory group that the kernel has killed for memory."""
    lines = (group / "memory.oom_control").read_text(encoding="ascii").splitlines()
    return int(dict(line.split() for line in lines).get("oom_kill", 0))


@contextmanager
def _group(controller: Path) -> Iterator[Path]:
    group = controller / f"moe-bench-{os.getpid()}"
    group.mkdir(exist_ok=True)
    try:
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
