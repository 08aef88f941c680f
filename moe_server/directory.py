"""A directory that appears under its name only when it is complete.

It is filled under the name `OUT.partial`, which one process owns at a time, and renamed at the end.
Decides what may be replaced and whether there is room. Knows nothing of what is written; `synth`
and `pack` call it.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_server.errors import MoeServerError, Reason


@contextmanager
def complete_or_absent(
    out: Path, *, marker: str, what: str, force: bool, resumable: bool = False
) -> Iterator[Path]:
    """A directory beside `out` that takes its place on success.

    Args:
        out: The directory to make.
        marker: The file that says a directory is ours to replace. Of a resumable one it says that
            there is something to go on with, and it goes when `out` is in its place.
        what: What such a directory is, for messages: "a synthetic checkpoint".
        force: Replace whatever else is there, too.
        resumable: After a failure the directory stays, and the next run finds what is in it. Else
            it is removed, and what a killed run left is cleared.

    Raises:
        MoeServerError: Something else is there, another process is writing it, or the disk failed.
    """
    _refuse_foreign(out, marker, what, force=force)
    partial = out.with_name(f"{out.name}.partial")
    _refuse_foreign(partial, marker, what, force=force)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        directory = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _lock(directory, partial)
            try:
                if not resumable:
                    clear(partial)
                yield partial
                os.fsync(directory)
            except BaseException:
                if not resumable:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            _publish(partial, out)
            if resumable:
                (out / marker).unlink(missing_ok=True)
        finally:
            os.close(directory)
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        remedy = (
            "Free some space or take another disk." if full else "Check the path and permissions."
        )
        if resumable:
            remedy += " Run the same command again to go on from where it stopped."
        raise MoeServerError(
            f"Cannot write {error.filename or out}: {error.strerror}.",
            remedy,
            reason=Reason.EXHAUSTED if full else Reason.INVALID,
        ) from error


def refuse_small_disk(directory: Path, needed_bytes: int, what: str, remedy: str) -> None:
    """Refuses before anything is written.

    Args:
        directory: Where `needed_bytes` are to be written.
        needed_bytes: How many there must be.
        what: What needs them: "The checkpoint".
        remedy: What would need less.

    Raises:
        MoeServerError: There is less room; says how much is missing.
    """
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        needed, free = needed_bytes / 1e9, free_bytes / 1e9
        raise MoeServerError(
            f"{what} needs {needed:.2f} GB and the disk of {directory} has {free:.2f} GB free: "
            f"{needed - free:.2f} GB are missing.",
            f"Free that much, take another disk, or {remedy}.",
            reason=Reason.EXHAUSTED,
        )


def clear(directory: Path) -> None:
    """Removes everything in it."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _lock(directory: int, path: Path) -> None:
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise MoeServerError(
            f"Another process is writing {path}.",
            "Wait until it is done, or name another directory.",
            reason=Reason.UNAVAILABLE,
        ) from None


def _refuse_foreign(directory: Path, marker: str, what: str, *, force: bool) -> None:
    """Refuses what is neither absent, nor empty, nor ours."""
    if not directory.exists():
        return
    if directory.is_mount() or not directory.is_dir():
        raise MoeServerError(
            f"{directory} is a file or a mount point, which cannot be replaced.",
            "Name a directory that does not exist, for example one below it.",
        )
    if not force and any(directory.iterdir()) and not (directory / marker).is_file():
        raise MoeServerError(
            f"{directory} is not empty and not {what}.",
            "Name another directory, or add --force to delete what is in it.",
        )


def _publish(partial: Path, out: Path) -> None:
    """Renames `partial` to `out`; what was there goes only when its successor is in place."""
    replaced = "replaced"
    if out.exists():
        out.rename(partial / replaced)
    partial.rename(out)
    parent = os.open(out.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
    shutil.rmtree(out / replaced, ignore_errors=True)
