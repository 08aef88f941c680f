"""Watching a server become ready, with a bar on a terminal and lines otherwise."""

import sys
import time
from collections.abc import Callable
from typing import Self

import structlog
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from moe_server.client import Client, UnreachableError
from moe_server.commands.format import format_bytes
from moe_server.errors import MoeServerError, Reason
from moe_server.proto.moe_server.v1 import admin_pb2 as pb

log = structlog.get_logger(__name__)

POLL_S = 0.25


class NotReadyError(MoeServerError):
    """The server did not become ready in time, or FAILED: nobody waits for its next try."""


def state_name(state: pb.ServerState) -> str:
    """For example "ready"."""
    return pb.ServerState.Name(state).removeprefix("SERVER_STATE_").lower()


def least_ready(status: pb.GetServerStatusResponse) -> pb.ModelStatus:
    """The model that the server's state is that of; the first one of several."""
    return next(model for model in status.models if model.state == status.state)


def wait_ready(
    client: Client,
    timeout_s: float,
    told: Callable[[pb.GetServerStatusResponse], None] = lambda _: None,
) -> pb.GetServerStatusResponse:
    """Waits until the server is READY, showing how far it is.

    Args:
        client: Of the server.
        timeout_s: How long.
        told: Called with everything that it says.

    Raises:
        NotReadyError: It FAILED, or was not READY in time.
        UnreachableError: It could not be reached in all that time, or at its end.
    """
    deadline = time.monotonic() + timeout_s
    late: MoeServerError
    with _Display() as display:
        while True:
            try:
                status = client.status()
            except UnreachableError as error:
                late = error
            else:
                late = _still(status, timeout_s)
                told(status)
                display.show(status)
                if status.state == pb.SERVER_STATE_READY:
                    return status
                if status.state == pb.SERVER_STATE_FAILED:
                    raise NotReadyError(
                        f"The server failed to start: {status.reason}", reason=Reason.UNAVAILABLE
                    )
            if time.monotonic() >= deadline:
                raise late
            time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))


def _still(status: pb.GetServerStatusResponse, timeout_s: float) -> NotReadyError:
    remedy = "Wait longer with --timeout; `moe-server status` says how far it is."
    if status.state == pb.SERVER_STATE_DRAINING:
        remedy = "`moe-server undrain`, if nobody meant it: it does not end by itself."
    return NotReadyError(
        f"The server was still {state_name(status.state)} ({least_ready(status).startup.stage}) "
        f"after {timeout_s:g} s.",
        remedy,
        reason=Reason.UNAVAILABLE,
    )


class _Display:
    """A progress bar on a terminal, one log line for each new stage otherwise."""

    def __init__(self) -> None:
        self._last = ""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TextColumn("{task.fields[pace]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("connecting", total=None, pace="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, status: pb.GetServerStatusResponse) -> None:
        model = least_ready(status)
        startup, state = model.startup, state_name(status.state)
        name = f"{model.name} " if len(status.models) > 1 else ""
        description = f"{name}{state}: {startup.stage}".rstrip(": ")
        self._progress.update(
            self._task,
            description=description,
            completed=startup.bytes_done,
            total=startup.bytes_total or None,
            pace=_pace(startup),
        )
        if self._progress.disable and description != self._last:
            log.info("startup", model=model.name, state=state, stage=startup.stage)
        self._last = description


def _pace(startup: pb.Startup) -> str:
    """For example "1.95 GiB/s, 4 s left"; empty while nobody can tell."""
    if not startup.bytes_per_second:
        return ""
    left = f", {startup.eta.ToSeconds()} s left" if startup.HasField("eta") else ""
    return f"{format_bytes(round(startup.bytes_per_second))}/s{left}"
