"""What systemd is told: a real datagram socket in its place, a front door with a fake engine."""

import asyncio
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import pytest
from structlog.testing import capture_logs

from moe_server.notify import START_STALL_S, STOP_MARGIN_S, ServiceManager, notifying
from moe_server.state import ServerState
from tests.front_door import WAIT_S, front_door, make_model, setup


@dataclass
class Systemd:
    """The service manager's end: every datagram that came, in order."""

    socket: socket.socket
    datagrams: list[dict[str, str]] = field(default_factory=list)

    async def until(self, name: str, value: str = "") -> dict[str, str]:
        """Reads on to the next datagram with a field `name` that has `value` in it."""
        loop = asyncio.get_running_loop()
        while True:
            content = await asyncio.wait_for(loop.sock_recv(self.socket, 4096), WAIT_S)
            lines = content.decode().splitlines()
            fields = dict(line.split("=", 1) for line in lines)
            assert len(fields) == len(lines), content
            self.datagrams.append(fields)
            if name in fields and value in fields[name]:
                return fields

    def num_unread(self) -> int:
        """Throws away what has come and nobody has read."""
        count = 0
        with suppress(BlockingIOError):
            while self.socket.recv(4096):
                count += 1
        return count

    def all(self, name: str) -> list[str]:
        return [fields[name] for fields in self.datagrams if name in fields]


@contextmanager
def systemd(monkeypatch, address: str, watchdog_s: float | None = None) -> Iterator[Systemd]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        listening.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        if watchdog_s is not None:
            monkeypatch.setenv("WATCHDOG_USEC", str(round(watchdog_s * 1e6)))
        yield Systemd(listening)


@pytest.fixture
def gate(tmp_path):
    os.mkfifo(tmp_path / "gate")
    return tmp_path / "gate"


def abstract_name() -> str:
    return f"@moe-server-test-{secrets.token_hex(8)}"


async def open_gate(gate) -> None:
    await asyncio.to_thread(gate.write_bytes, b"!")


async def test_ready_is_told_on_proof_and_the_start_is_extended_until_then(
    monkeypatch, tmp_path, gate
):
    with systemd(monkeypatch, str(tmp_path / "notify")) as manager:
        async with front_door("--gate", str(gate), until=ServerState.LOADING) as door:
            async with notifying(door.server.models, grace_s=7):
                for _ in range(2):  # it is said again while nothing else changes
                    said = await manager.until("EXTEND_TIMEOUT_USEC")
                    assert int(said["EXTEND_TIMEOUT_USEC"]) == START_STALL_S * 1e6
                assert "loading: weights, 0 %" in " ".join(manager.all("STATUS"))
                assert not manager.all("READY")
                await open_gate(gate)
                told = await manager.until("READY")
                assert told["READY"] == "1"
                assert door.server.models.feed.current is ServerState.READY
                assert told["STATUS"] == "ready"
            stopping = await manager.until("STOPPING")
            assert stopping["STOPPING"] == "1"
            assert int(stopping["EXTEND_TIMEOUT_USEC"]) == (7 + STOP_MARGIN_S) * 1e6
        assert manager.all("READY") == ["1"]
        assert not manager.all("WATCHDOG"), "nobody asked for it"


async def test_the_watchdog_is_fed_while_loading_and_at_half_of_its_interval(monkeypatch, gate):
    with systemd(monkeypatch, abstract_name(), watchdog_s=0.2) as manager:
        async with front_door("--gate", str(gate), until=ServerState.LOADING) as door:
            async with notifying(door.server.models, grace_s=0):
                await manager.until("WATCHDOG")
                started = time.monotonic()
                for _ in range(5):
                    await manager.until("WATCHDOG")
                assert time.monotonic() - started > 0.4
                assert door.server.models.feed.current is ServerState.LOADING
            await open_gate(gate)


async def test_a_loop_that_stands_still_feeds_no_watchdog(monkeypatch):
    with systemd(monkeypatch, abstract_name(), watchdog_s=0.1) as manager:
        async with front_door() as door, notifying(door.server.models, grace_s=0):
            await manager.until("WATCHDOG")
            time.sleep(1.0)  # noqa: ASYNC251  # that is the point
            assert manager.num_unread() <= 2, "what was sent before it stood still"


async def test_a_supervisor_that_is_gone_feeds_no_watchdog(monkeypatch):
    with systemd(monkeypatch, abstract_name(), watchdog_s=0.1) as manager:
        async with front_door() as door:
            async with notifying(door.server.models, grace_s=0):
                await manager.until("WATCHDOG")
                door.server.supervisor._task.cancel()
                await asyncio.gather(door.server.supervisor._task, return_exceptions=True)
                manager.datagrams.clear()
                await asyncio.sleep(0.5)
            await manager.until("STOPPING")
            # One may have been on its way.
            assert len(manager.all("WATCHDOG")) <= 1
            door.server.supervisor._task = None


async def test_a_failed_start_is_not_extended_but_the_process_lives(monkeypatch):
    with systemd(monkeypatch, abstract_name(), watchdog_s=0.1) as manager:
        async with front_door("--fatal", "final", until=ServerState.FAILED) as door:
            async with notifying(door.server.models, grace_s=0):
                said = await manager.until("STATUS", "failed")
                assert said["STATUS"] == "failed: No memory. Buy some."
                for _ in range(3):
                    await manager.until("WATCHDOG")
            assert not manager.all("EXTEND_TIMEOUT_USEC")
            assert not manager.all("READY")


async def test_one_failed_model_does_not_end_the_start_of_another(monkeypatch):
    beside = [setup("--fatal", "final", model=make_model(name="other"))]
    with systemd(monkeypatch, abstract_name()) as manager:
        failed = front_door(until=ServerState.FAILED, beside=beside)
        async with failed as door, notifying(door.server.models, grace_s=0):
            await manager.until("EXTEND_TIMEOUT_USEC")
            assert "Model 'other': No memory." in manager.all("STATUS")[-1]


async def test_a_drain_is_no_end_and_the_way_back_is_not_ready_again(monkeypatch):
    with systemd(monkeypatch, abstract_name()) as manager:
        async with front_door() as door, notifying(door.server.models, grace_s=0):
            await manager.until("READY")
            await door.server.models.drain()
            await manager.until("STATUS", "draining: 0 requests")
            door.server.models.undrain()
            await manager.until("STATUS", "ready")
            assert not manager.all("STOPPING"), "systemd would kill a server that may come back"
        assert manager.all("READY") == ["1"]


async def test_a_service_manager_that_does_not_read_holds_nothing_up(monkeypatch):
    with systemd(monkeypatch, abstract_name()):
        manager = ServiceManager.of(os.environ)
        with capture_logs() as logs:
            sent = [manager.send({"STATUS": "x" * 1000}) for _ in range(2000)]
        manager.close()
        assert not all(sent)
        assert len(logs) == 1, "said once"


async def test_one_line_stays_one_line_in_any_script(monkeypatch):
    with systemd(monkeypatch, abstract_name()) as manager:
        ServiceManager.of(os.environ).send({"STATUS": "a\nREADY=1\n… \udc80"})
        assert (await manager.until("STATUS"))["STATUS"] == "a READY=1 … ?"


@pytest.mark.parametrize(
    ("environ", "watchdog_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_ours_or_nobodys(environ, watchdog_s):
    manager = ServiceManager.of({"NOTIFY_SOCKET": "@nobody", **environ})
    assert manager.watchdog_s == watchdog_s
    manager.close()


def test_without_a_service_manager_nobody_is_told():
    assert ServiceManager.of({}) is None
    with capture_logs() as logs:
        assert ServiceManager.of({"NOTIFY_SOCKET": "vsock:2:1234"}) is None
    assert logs[0]["log_level"] == "warning"


async def test_serve_tells_of_its_life(monkeypatch, tmp_path):
    with systemd(monkeypatch, str(tmp_path / "notify"), watchdog_s=0.5) as manager:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "moe_server", "serve", "--listen", "127.0.0.1:0",
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            ready = await manager.until("READY")
            assert ready["STATUS"] == "ready"
            assert any("loading: " in status for status in manager.all("STATUS"))
            await manager.until("WATCHDOG")
            process.send_signal(signal.SIGTERM)
            await manager.until("STOPPING")
            assert await asyncio.wait_for(process.wait(), WAIT_S) == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
