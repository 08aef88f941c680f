"""Tells the service manager how the server is: systemd's sd_notify protocol, without libsystemd.

A datagram of `NAME=value` lines to the socket that NOTIFY_SOCKET names; without it nobody is told.
READY=1 is sent once, when the server's state is READY for the first time: on proof. Until then the
start's time limit is extended for as long as a supervisor is at work, who ends an engine that does
not get on; so a slow disk ends no start, and a front door that hangs does. WATCHDOG=1 says that
this loop runs and every engine is watched over, whatever state it is in.

Ours, because the small library for it (sdnotify, of 2017) drops a status that is not Latin-1
without a word and can block, and the others bring a compiled binding to libsystemd for one `send`.
`commands.serve` uses it.
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import structlog

from moe_server.budget import format_bytes
from moe_server.service.registry import Registry
from moe_server.state import ServerState

log = structlog.get_logger(__name__)

LOOK_S = 1.0
"""Between two looks at the state, where the watchdog asks for none sooner."""
START_STALL_S = 360.0
"""How long a start may go without a word of ours: the front door itself can stand still while the
disk does, from which its own program comes. Longer than the 300 s that a stage may take."""
STOP_MARGIN_S = 30.0
"""Beyond the grace period: the engines end in order, the listeners after them."""


class ServiceManager:
    """The end of the socket that we send to.

    Args:
        address: A path, or a name in Linux' abstract namespace after "@".
        watchdog_s: How often it wants to hear WATCHDOG=1 at least; None: never.
    """

    def __init__(self, address: str, watchdog_s: float | None) -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self.watchdog_s = watchdog_s
        # Nobody waits for a service manager that does not read.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._is_reached = True

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "ServiceManager | None":
        """The one that started this process; None where none wants to be told."""
        address = environ.get("NOTIFY_SOCKET", "")
        if not address:
            return None
        if not address.startswith(("/", "@")):
            log.warning("unusable NOTIFY_SOCKET", address=address, expected="/PATH or @NAME")
            return None
        is_ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        interval_us = environ.get("WATCHDOG_USEC", "") if is_ours else ""
        return cls(address, int(interval_us) / 1e6 if interval_us.isdigit() else None)

    def send(self, fields: Mapping[str, str]) -> bool:
        """Whether it was handed over; a failure is logged once, and the next try tells anew."""
        lines = (f"{name}={' '.join(value.split())}\n" for name, value in fields.items())
        try:
            self._socket.sendto("".join(lines).encode(errors="replace"), self._address)
        except OSError as error:
            if self._is_reached:
                log.warning("the service manager cannot be told", error=str(error))
            self._is_reached = False
            return False
        self._is_reached = True
        return True

    def close(self) -> None:
        """Nothing is sent after this."""
        self._socket.close()


@asynccontextmanager
async def notifying(models: Registry, grace_s: float) -> AsyncIterator[None]:
    """Tells the service manager, if there is one, for as long as the block serves; then STOPPING=1.

    Args:
        models: Started.
        grace_s: What accepted requests get after the block.
    """
    manager = ServiceManager.of(os.environ)
    if manager is None:
        yield
        return
    told = _Told(manager, models)
    models.feed.on_change(told.tell)
    ticking = asyncio.create_task(_tick(told, manager.watchdog_s), name="service manager")
    try:
        yield
    finally:
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)
        told.tell_stopping(grace_s)
        manager.close()


async def _tick(told: "_Told", watchdog_s: float | None) -> None:
    while True:
        told.tell()
        await asyncio.sleep(LOOK_S if watchdog_s is None else min(LOOK_S, watchdog_s / 2))


class _Told:
    """What the service manager knows, and what it should."""

    def __init__(self, manager: ServiceManager, models: Registry) -> None:
        self._manager = manager
        self._models = models
        self._is_ready = False
        self._is_stopping = False
        self._status = ""

    def tell(self) -> None:
        """Sends what is new or due."""
        if self._is_stopping:
            return  # a change of state on the way down
        fields = {}
        becomes_ready = not self._is_ready and self._models.feed.current is ServerState.READY
        if becomes_ready:
            fields["READY"] = "1"
        elif not self._is_ready and self._gets_on():
            fields["EXTEND_TIMEOUT_USEC"] = _microseconds(START_STALL_S)
        if self._manager.watchdog_s is not None and self._is_watched_over():
            fields["WATCHDOG"] = "1"
        status = status_of(self._models)
        if status != self._status:
            fields["STATUS"] = status
        if fields and self._manager.send(fields):
            self._is_ready = self._is_ready or becomes_ready
            self._status = status

    def tell_stopping(self, grace_s: float) -> None:
        """Its limit for stopping is not to end before what the configuration allows."""
        self._is_stopping = True
        self._manager.send(
            {
                "STOPPING": "1",
                "STATUS": "shutting down: accepted requests finish",
                "EXTEND_TIMEOUT_USEC": _microseconds(grace_s + STOP_MARGIN_S),
            }
        )

    def _gets_on(self) -> bool:
        """Whether any model serves or may yet."""
        return self._is_watched_over() and any(
            startup.state is not ServerState.FAILED for startup in self._models.startups
        )

    def _is_watched_over(self) -> bool:
        return all(running.supervisor.is_on_watch for running in self._models)


def status_of(models: Registry) -> str:
    """One line for people: "loading: experts, 45 % at 1.95 GiB/s, 12 s left"."""
    state = models.feed.current
    if state is ServerState.FAILED:
        return f"failed: {models.reason}"
    startup = models.least_ready
    name = f"{startup.name} " if len(models.startups) > 1 else ""
    if state in (ServerState.READY, ServerState.DRAINING):
        open_requests = sum(one.supervisor.num_open_requests for one in models)
        return state.value if state is ServerState.READY else f"draining: {open_requests} requests"
    stage = startup.stages.running
    if stage is None:
        return f"{name}{state.value}: {startup.stages.doing}"
    told = [f"{name}{state.value}: {stage.name}"]
    if stage.bytes_total:
        told.append(f"{100 * stage.bytes_done // stage.bytes_total} %")
    if rate := stage.bytes_per_s():
        told[-1] += f" at {format_bytes(round(rate))}/s"
    if (eta_s := stage.eta_s()) is not None:
        told.append(f"{eta_s:.0f} s left")
    return ", ".join(told)


def _microseconds(seconds: float) -> str:
    return str(round(seconds * 1e6))
