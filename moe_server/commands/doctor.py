"""`moe-server doctor`: what this machine has and lacks, each with the remedy.

Works where things are missing; that is what it is for. It imports none of what it checks.
"""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import click

from moe_server.budget import available_memory_bytes, usable_cores
from moe_server.commands.format import format_bytes

PACKAGES = ("torch", "transformers", "deepspeed", "safetensors", "grpcio", "pyzmq", "tokenizers")
OPTIONAL_PACKAGES = ("triton", "sentencepiece")
MIN_TORCH = (2, 11)
LOW_MEMORY_BYTES = 2 * 2**30
LOW_DISK_BYTES = 5 * 2**30
KERNELS_TIMEOUT_S = 120
NO_KERNELS_COST = (
    "torch computes instead: an expert takes 1.6 to 1.8 times as long in bf16, 12 to 45 times in "
    "int8, 16 to 65 times in int4"
)
"""At 1 to 128 rows, on a machine with AVX-512 (benchmarks/LOG.md, 2026-11-25)."""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
FREE_MEMORY_JITTER_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: str
    is_ok: bool
    found: str
    remedy: str = ""


@click.command(epilog="Example: moe-server doctor --model /models/Mixtral-8x7B")
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=".",
    help="Look at the disk of this checkpoint; otherwise at that of the working directory.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(model: Path, *, as_json: bool) -> None:
    """Check this machine: libraries, CPU, memory, disk and GPU.

    A warning says what would work less well and what to do; the exit code is 0 all the same.
    """
    checks = (*CHECKS, partial(check_disk, model.resolve()))
    findings = [finding for check in checks for finding in _safely(check)]
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings]))
        return
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        verdict = "ok  " if finding.is_ok else "warn"
        click.echo(f"{verdict}  {finding.check:<{width}}  {finding.found}")
        if finding.remedy:
            click.echo(f"      {'':<{width}}  -> {finding.remedy}")


def _safely(check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return check()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        function = check.func if isinstance(check, partial) else check
        name = function.__name__.removeprefix("check_")
        return [Finding(name, is_ok=False, found=f"cannot be told: {error}")]


def check_python() -> list[Finding]:
    """The interpreter."""
    version = platform.python_version_tuple()
    is_ok = (int(version[0]), int(version[1])) >= (3, 11)
    return [
        Finding(
            "python",
            is_ok,
            platform.python_version(),
            "" if is_ok else "Use Python 3.11 or newer.",
        )
    ]


def check_packages() -> list[Finding]:
    """Libraries, installed or not."""
    findings = []
    for name in (*PACKAGES, *OPTIONAL_PACKAGES):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            is_optional = name in OPTIONAL_PACKAGES
            findings.append(
                Finding(
                    name,
                    is_optional,
                    "not installed" + (" (optional)" if is_optional else ""),
                    "" if is_optional else f"pip install {name}",
                )
            )
            continue
        is_old = name == "torch" and _numbers(version) < MIN_TORCH
        remedy = f"moe-server needs torch >= {MIN_TORCH[0]}.{MIN_TORCH[1]}." if is_old else ""
        findings.append(Finding(name, not is_old, version, remedy))
    return findings


def check_cpu() -> list[Finding]:
    """Cores this process may use, and instruction sets."""
    flags: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    has = [name for name in wanted if name in flags]
    cores = f"{usable_cores()} usable of {os.cpu_count()}"
    return [
        Finding("CPU cores", is_ok=True, found=cores),
        Finding(
            "CPU features",
            "avx2" in flags,
            " ".join(has) or "none of " + " ".join(wanted),
            "" if "avx2" in flags else "Computing on this CPU will be slow; use one with AVX2.",
        ),
    ]


def check_kernels() -> list[Finding]:
    """Whether the compiled kernels serve, as an engine process would find them."""
    # In a process of its own: it needs torch, which takes seconds to import, or may be missing.
    code = (
        "import json; from moe_server.kernels import native as n; "
        "print(json.dumps([n.instruction_set(), n.unavailable_reason()]))"
    )
    done = subprocess.run(  # noqa: S603  the code above
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=KERNELS_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return [Finding("CPU kernels", is_ok=False, found=said[-1], remedy="Mend the above first.")]
    instruction_set, reason = json.loads(done.stdout.splitlines()[-1])
    if not reason:
        return [Finding("CPU kernels", is_ok=True, found=f"compiled, use {instruction_set}")]
    return [
        Finding(
            "CPU kernels",
            is_ok=False,
            found=f"{reason}. {NO_KERNELS_COST}",
            remedy="Install a C++17 compiler (apt-get install g++) and install moe-server again: "
            "pip install --force-reinstall --no-deps --no-cache-dir, from its source.",
        )
    ]


def check_memory() -> list[Finding]:
    """What this process would get: of the machine, and of the memory cgroups around it."""
    meminfo = {
        name: int(rest.split()[0]) * 1024
        for name, _, rest in (
            line.partition(":")
            for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        )
    }
    free, total = meminfo["MemAvailable"], meminfo["MemTotal"]
    # As `serve` counts. It asks again how much is free, hence a tolerance.
    available = available_memory_bytes()
    is_limited = available < free - FREE_MEMORY_JITTER_BYTES
    return [
        _memory_finding(
            "memory",
            free,
            f"{format_bytes(free)} available of {format_bytes(total)}",
            "Free memory, or give small --device-memory and --host-memory.",
        ),
        _memory_finding(
            "cgroup memory limit",
            available,
            f"leaves {format_bytes(available)}; it counts both processes and the page cache they "
            "dirty",
            "Raise the container's limit, or give small --device-memory and --host-memory.",
        )
        if is_limited
        else Finding("cgroup memory limit", is_ok=True, found="none below what is available"),
    ]


def _memory_finding(check: str, available: int, found: str, remedy: str) -> Finding:
    is_ok = available >= LOW_MEMORY_BYTES
    return Finding(check, is_ok, found, "" if is_ok else remedy)


def check_huge_pages() -> list[Finding]:
    """Whether the kernel gives huge pages to a program that asks for them."""
    modes = HUGE_PAGES.read_text(encoding="ascii").strip()
    is_ok = "[never]" not in modes
    remedy = (
        ""
        if is_ok
        else "Disks fill small pages two to three times slower: "
        f"echo madvise > {HUGE_PAGES}, on the machine itself."
    )
    return [Finding("huge pages", is_ok, modes, remedy)]


def check_memlock() -> list[Finding]:
    """How much memory may be pinned."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return [Finding("memlock limit", is_ok=True, found="unlimited")]
    if not NVIDIA_DRIVER.exists():
        found = f"{format_bytes(soft)}; memory is pinned for CUDA only"
        return [Finding("memlock limit", is_ok=True, found=found)]
    return [
        Finding(
            "memlock limit",
            is_ok=False,
            found=format_bytes(soft),
            remedy="Pinned host memory may be refused: `ulimit -l unlimited`; in systemd "
            "LimitMEMLOCK=infinity, of containerd's unit for containers, which have its limit. "
            "(CAP_IPC_LOCK helps a container's root only.)",
        )
    ]


def check_disk(folder: Path) -> list[Finding]:
    """Room, and whether reads can pass the page cache by."""
    free = shutil.disk_usage(folder).free
    is_ok = free >= LOW_DISK_BYTES
    remedy = "" if is_ok else "A packed or synthetic checkpoint may not fit here."
    found = f"{format_bytes(free)} at {folder}"
    return [Finding("free disk", is_ok, found, remedy), _direct(folder)]


def _direct(folder: Path) -> Finding:
    try:
        # A checkpoint may be mounted read-only.
        file = next((file for file in folder.glob("*.safetensors")), None)
        if file is not None:
            _open_direct(file)
        else:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".moe-server-") as scratch:
                _open_direct(Path(scratch.name))
    except OSError as error:
        return Finding(
            "O_DIRECT",
            is_ok=False,
            found=f"refused at {folder}: {error.strerror}",
            remedy="Keep checkpoints on a file system with O_DIRECT (ext4, xfs); otherwise reads "
            "go through the page cache.",
        )
    return Finding("O_DIRECT", is_ok=True, found=f"works at {folder}")


def _open_direct(file: Path) -> None:
    os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))


def check_gpu() -> list[Finding]:
    """NVIDIA devices, as the driver sees them."""
    # Asking torch would import it, which takes seconds; the driver's files say as much.
    if not NVIDIA_DRIVER.exists():
        return [Finding("GPU", is_ok=True, found="no NVIDIA driver; --device cpu works")]
    num_devices = len(list(NVIDIA_DRIVER.with_name("gpus").glob("*")))
    return [
        Finding(
            "GPU",
            num_devices > 0,
            f"{num_devices} NVIDIA device(s)",
            "" if num_devices else "Is a device passed to this container?",
        )
    ]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(
        int(part) for part in version.split("+", maxsplit=1)[0].split(".")[:2] if part.isdigit()
    )


CHECKS = (
    check_python,
    check_packages,
    check_cpu,
    check_kernels,
    check_memory,
    check_huge_pages,
    check_memlock,
    check_gpu,
)
