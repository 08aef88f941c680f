"""What the control groups around this process leave it: a container's limits, of either version.

A limit may also stand further up than our own group: systemd puts them on slices, Kubernetes on
pods. Inside a container the group's own path may not be visible; the root then is our group. Pure
reading; `budget` draws the conclusions.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = "/sys/fs/cgroup"


def memory_room() -> Iterator[int]:
    """Bytes that each limit on memory leaves; page cache does not count as used."""
    for folder, version in _groups("memory"):
        limit, usage, cached = (
            ("memory.max", "memory.current", ("inactive_file", "active_file"))
            if version == 2
            else (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                ("total_inactive_file", "total_active_file"),
            )
        )
        try:
            limit_bytes = int((folder / limit).read_text())
            used_bytes = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # "max" is no number: no limit
            continue
        yield limit_bytes - used_bytes + sum(int(stat.get(name, 0)) for name in cached)


def cpu_quotas() -> Iterator[float]:
    """Cores' worth of time that each quota allows."""
    for folder, version in _groups("cpu"):
        try:
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text()
                period = (folder / "cpu.cfs_period_us").read_text()
            cores = int(quota) / int(period)
        except (OSError, ValueError):  # "max": no quota
            continue
        if cores > 0:  # -1: none
            yield cores


def _groups(controller: str) -> Iterator[tuple[Path, int]]:
    """The folders of every group that this process is in, own ones first, and their version."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root, version = (f"{ROOT}/{controller}", 1) if controllers else (ROOT, 2)
        path = PurePosixPath(group)
        for level in (path, *path.parents):
            yield Path(f"{root}{level}"), version
