"""Control groups as the kernel shows them, of both versions, and what is left for this process."""

import os
from pathlib import Path, PurePosixPath

import pytest

from moe_server import budget, cgroups


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """A function that writes files of /proc and /sys, which are then read for the real ones."""

    def write(files: dict[str, str]) -> None:
        for name, content in files.items():
            file = tmp_path / name.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)

    def fake_path(name: str | PurePosixPath) -> Path:
        return Path(f"{tmp_path}{name}")

    for module in (budget, cgroups):
        monkeypatch.setattr(module, "Path", fake_path)
    monkeypatch.setattr(budget.os, "sched_getaffinity", lambda _pid: set(range(64)))
    write({"/proc/meminfo": "MemTotal:       9000 kB\nMemAvailable:    8000 kB\nHugePages:  0\n"})
    return write


def group_v2(limit: str, used: int, inactive: int = 0, active: int = 0) -> dict[str, str]:
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{used}\n",
        "memory.stat": f"anon 5\ninactive_file {inactive}\nactive_file {active}\n",
    }


def at(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": content for name, content in files.items()}


def test_without_cgroups_it_is_what_the_machine_has(kernel):
    assert budget.available_memory_bytes() == 8000 * 1024


def test_a_v2_group_leaves_its_limit_less_what_it_uses_but_cache(kernel):
    kernel({"/proc/self/cgroup": "0::/service\n"})
    kernel(at("/sys/fs/cgroup/service", group_v2("5000000", 3000000, 1000, 500)))
    assert budget.available_memory_bytes() == 5000000 - 3000000 + 1500


def test_a_v2_group_without_a_limit_leaves_what_the_machine_has(kernel):
    kernel({"/proc/self/cgroup": "0::/service\n"})
    kernel(at("/sys/fs/cgroup/service", group_v2("max", 3000000)))
    assert budget.available_memory_bytes() == 8000 * 1024


def test_inside_a_container_the_root_is_our_group(kernel):
    kernel({"/proc/self/cgroup": "0::/../../pod/container\n"})
    kernel(at("/sys/fs/cgroup", group_v2("4000000", 1000000)))
    assert budget.available_memory_bytes() == 3000000


def test_a_limit_further_up_counts_too(kernel):
    """systemd puts limits on slices, Kubernetes on pods."""
    kernel({"/proc/self/cgroup": "0::/pod.slice/inner.slice/service\n"})
    root = "/sys/fs/cgroup/pod.slice"
    kernel(at(root, group_v2("2000000", 500000)))
    kernel(at(f"{root}/inner.slice", group_v2("max", 500000)))
    kernel(at(f"{root}/inner.slice/service", group_v2("5000000", 400000)))
    assert budget.available_memory_bytes() == 1500000


def test_a_v1_group(kernel):
    kernel({"/proc/self/cgroup": "11:cpu,cpuacct:/other\n4:memory:/service\n"})
    kernel(
        at(
            "/sys/fs/cgroup/memory/service",
            {
                "memory.limit_in_bytes": "6000000",
                "memory.usage_in_bytes": "2000000",
                "memory.stat": "total_inactive_file 300\ntotal_active_file 20\nactive_file 9999\n",
            },
        )
    )
    assert budget.available_memory_bytes() == 4000320


def test_a_v1_group_without_a_limit(kernel):
    kernel({"/proc/self/cgroup": "4:memory:/\n"})
    kernel(
        at(
            "/sys/fs/cgroup/memory",
            {
                "memory.limit_in_bytes": "9223372036854771712",
                "memory.usage_in_bytes": "2000000",
                "memory.stat": "total_inactive_file 300\n",
            },
        )
    )
    assert budget.available_memory_bytes() == 8000 * 1024


def test_of_two_hierarchies_the_tighter_one_counts(kernel):
    kernel({"/proc/self/cgroup": "4:memory:/a\n0::/a\n"})
    kernel(at("/sys/fs/cgroup/a", group_v2("3000000", 0)))
    assert budget.available_memory_bytes() == 3000000


def test_the_real_files_of_this_machine_can_be_read():
    assert budget.available_memory_bytes() > 2**20
    assert 1 <= budget.usable_cores() <= os.cpu_count()


def test_without_a_quota_all_cores_are_ours(kernel):
    kernel({"/proc/self/cgroup": "4:cpu,cpuacct:/service\n0::/service\n"})
    kernel(at("/sys/fs/cgroup/service", {"cpu.max": "max 100000\n"}))
    no_quota = {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}
    kernel(at("/sys/fs/cgroup/cpu/service", no_quota))
    assert budget.usable_cores() == 64


@pytest.mark.parametrize(("quota", "cores"), [(400000, 4), (250000, 2), (50000, 1), (10**8, 64)])
def test_no_more_threads_than_a_quota_keeps_busy(kernel, quota, cores):
    kernel({"/proc/self/cgroup": "0::/pod/container\n"})
    kernel(at("/sys/fs/cgroup/pod/container", {"cpu.max": "max 100000\n"}))
    kernel(at("/sys/fs/cgroup/pod", {"cpu.max": f"{quota} 100000\n"}))
    assert budget.usable_cores() == cores


def test_a_v1_quota(kernel):
    kernel({"/proc/self/cgroup": "9:cpuset:/\n4:cpu,cpuacct:/service\n"})
    quota = {"cpu.cfs_quota_us": "300000\n", "cpu.cfs_period_us": "100000\n"}
    kernel(at("/sys/fs/cgroup/cpu/service", quota))
    assert budget.usable_cores() == 3
