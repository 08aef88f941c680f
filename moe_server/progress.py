"""How far a long command is: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

LOG_INTERVAL_S = 5.0


@contextmanager
def progress(name: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A function that takes the bytes of each part as it is done; writes to stderr.

    Args:
        name: What is being done, one word.
        total_bytes: All of it.
    """
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(name, total=total_bytes)
            yield lambda size_bytes: bar.advance(task, size_bytes)
        return
    started = logged = time.monotonic()
    done_bytes = 0

    def log(size_bytes: int) -> None:
        nonlocal logged, done_bytes
        done_bytes += size_bytes
        now = time.monotonic()
        if now - logged >= LOG_INTERVAL_S:
            logged = now
            done, total = done_bytes / 1e9, total_bytes / 1e9
            rate = done / (now - started)
            click.echo(f"{name}: {done:.1f} of {total:.1f} GB, {rate:.2f} GB/s", err=True)

    yield log
