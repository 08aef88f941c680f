"""The first stage of a start: everything that can be known to be wrong before a byte is loaded.

What makes serving impossible raises; what makes it worse is a warning of the stage, told in status
and log. A file that is not there yet (a volume that is still being filled, a download) is waited
for: `wait` tries again until it is, and says what it lacks meanwhile.
"""

import asyncio
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import structlog
from packaging.requirements import Requirement

from moe_server.budget import format_bytes
from moe_server.config import Config
from moe_server.errors import MoeServerError, Reason
from moe_server.planned_models import PlannedModel, check_room, plan_models
from moe_server.startup import Startup
from moe_server.warmup.hot_set import OFF, folder_of

log = structlog.get_logger(__name__)

DISTRIBUTION = "moe-server"
LOW_DISK_BYTES = 16 * 2**20
"""A hot set has some kilobytes, that of a thousand experts in a hundred layers a megabyte."""
FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 10.0
"""A look at the headers costs next to nothing."""

T = TypeVar("T")


def check(config: Config) -> list[PlannedModel]:
    """Plans all models of a configuration on this machine.

    Raises:
        MoeServerError: They cannot be served; UNAVAILABLE where a file is missing or incomplete,
            which may be on its way.
    """
    clashes = unmet_requirements()
    if clashes:
        raise MoeServerError(
            f"Installed libraries do not fit: {'; '.join(clashes)}.",
            "Install moe-server anew in an environment of its own: pip install moe-server.",
            reason=Reason.UNSUPPORTED,
        )
    planned = plan_models(config)
    check_room(planned)
    return planned


def unmet_requirements() -> list[str]:
    """Of the packages that this distribution requires: those missing or of another version."""
    try:
        required = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        return []  # run from its sources
    unmet = []
    for requirement in required:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            unmet.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{requirement.name} is {version}, not {requirement.specifier}")
    return unmet


def warnings(model: PlannedModel) -> Iterator[str]:
    """What will work, but less well than it could; each with the remedy."""
    plan = model.plan
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if model.config.device == "cuda" and resource.RLIM_INFINITY != soft < plan.records_bytes:
        yield (
            f"The memlock limit is {format_bytes(soft)} and {format_bytes(plan.records_bytes)} of "
            "host memory are to be pinned: raise it (LimitMEMLOCK=infinity, ulimit -l unlimited)."
        )
    buffered = [file for file in _files(model) if not takes_o_direct(file)]
    if buffered:
        size = format_bytes(sum(file.stat().st_size for file in buffered))
        yield (
            f"{len(buffered)} of the checkpoint's files ({size}), for example {buffered[0]}, refuse"
            " O_DIRECT: what is read also fills the page cache, which a memory cgroup counts. Keep "
            "them on ext4 or xfs."
        )
    setting = model.config.warmup.hot_set
    if setting != OFF and model.checkpoint.experts:
        free = _free_bytes(setting)
        if free is not None and free < LOW_DISK_BYTES:
            yield (
                f"Only {format_bytes(free)} are free where the hot set is to be kept: make room, "
                "or set warmup.hot_set to a file elsewhere."
            )


def _free_bytes(setting: str) -> int | None:
    """Where the hot set is to be kept; None where that is nowhere, as its keeper will say."""
    try:
        folder = folder_of(setting, os.environ)
        existing = next(one for one in (folder, *folder.parents) if one.is_dir())
        return shutil.disk_usage(existing).free
    except (OSError, RuntimeError):
        return None


def takes_o_direct(file: Path) -> bool:
    """Whether reads of a file can pass the page cache by."""
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def _files(model: PlannedModel) -> list[Path]:
    return sorted(model.config.model_path.glob("*.safetensors"))


async def wait(prepare: Callable[[], T], startups: Sequence[Startup]) -> T:
    """Tries, again with backoff, until `prepare` returns.

    Args:
        prepare: The preflight, run on a thread of its own: a volume can be slow, or hang.
        startups: Where it is told what is waited for.

    Raises:
        MoeServerError: `prepare` raised for a cause that does not pass.
    """
    backoff_s = FIRST_BACKOFF_S
    while True:
        try:
            return await asyncio.wrap_future(_on_a_thread(prepare))
        except MoeServerError as error:
            if error.reason is not Reason.UNAVAILABLE:
                raise
            lacking = error
        log.warning("waiting", lacking=lacking.message, remedy=lacking.remedy, again_s=backoff_s)
        for startup in startups:
            startup.stages.fail(str(lacking))
            startup.stages.doing = f"looking again in {backoff_s:g} s: {lacking}"
        await asyncio.sleep(backoff_s)
        backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)


def _on_a_thread(work: Callable[[], T]) -> "Future[T]":
    """Begins `work`; a process that ends does not wait for it."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  whoever awaits the future gets it
            future.set_exception(error)

    threading.Thread(target=run, name="preflight", daemon=True).start()
    return future
