"""One life of the engine process, and the socket to it.

Spawns the process and speaks messages.py over a private ipc socket. Leaves neither a process nor a
file behind, and once the two have met not even when it is killed. Knows no states, restarts or
requests: that is its only user, the supervisor.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import msgspec
import structlog
import zmq
import zmq.asyncio

from moe_server.messages import FromEngine, Shutdown, ToEngine
from moe_server.pulse import Pulse

log = structlog.get_logger(__name__)

PREFIX, SOCKET = "moe-server-", "engine"
NUM_RANDOM_CHARS = 8
"""What TemporaryDirectory appends."""
KILLED_S = 10.0
"""After SIGKILL: the kernel takes seconds to free tens of gigabytes."""

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended, as subprocess has it: negative is a signal."""

    code: int

    @property
    def by_signal(self) -> bool:
        return self.code < 0

    @property
    def was_killed(self) -> bool:
        """From outside, at an innocent moment: nothing inside it went wrong."""
        return self.code == -signal.SIGKILL

    def __str__(self) -> str:
        if not self.by_signal:
            return f"exit code {self.code}"
        hint = " (out of memory?)" if self.code == -signal.SIGKILL else ""
        return f"signal {signal.Signals(-self.code).name}{hint}"


class EngineLink:
    """A running engine process. Made by `open_link`."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        socket: zmq.asyncio.Socket,
        folder: TemporaryDirectory[str],
        pulse: Pulse,
    ) -> None:
        self._process = process
        self._folder = folder
        self._socket = socket
        self._pulse = pulse
        self._is_connected = False
        self._last_heard = time.monotonic()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def silent_s(self) -> float:
        """Seconds since the engine said anything or its work advanced, or since it was spawned."""
        return time.monotonic() - max(self._last_heard, self._pulse.advanced_at)

    @property
    def lifeless_s(self) -> float:
        """Seconds since the engine's last pulse; 0 before the first."""
        beaten_at = self._pulse.beaten_at
        return time.monotonic() - beaten_at if beaten_at else 0.0

    async def send_config(self, config_json: bytes) -> None:
        """The first frame; waits until the engine has connected."""
        await self._socket.send(config_json)
        # A connection outlives the name it was made by. Without the name this process can be killed
        # and leave nothing. (A name in Linux's abstract namespace would leave nothing either, but
        # every local user can read it in /proc/net/unix and connect before the engine does.)
        self._folder.cleanup()
        self._is_connected = True

    def send(self, message: ToEngine) -> None:
        """Sends without waiting.

        An engine that has left thousands of messages unread is killed: it hangs, and dropping a
        message would leave it with requests that nobody waits for.
        """
        sending = asyncio.ensure_future(self._socket.send(_encoder.encode(message), zmq.NOBLOCK))
        if isinstance(sending.exception(), zmq.Again):
            log.warning("engine takes no messages any more; killing it", pid=self.pid)
            self.kill()

    async def receive(self) -> FromEngine:
        """The engine's next message.

        Raises:
            msgspec.DecodeError: What came is not a message of ours.
        """
        frame = await self._socket.recv()
        self._last_heard = time.monotonic()
        return _decoder.decode(frame)

    async def wait_exit(self) -> "Exit":
        """Waits for the process to end."""
        return Exit(await self._process.wait())

    def kill(self) -> None:
        """Ends it at once; also works on a stopped process."""
        self._is_connected = False
        if self._process.returncode is None:
            self._process.kill()

    async def shut_down(self, within_s: float) -> None:
        """Asks it to end in order and kills it when it does not."""
        if self._is_connected and self._process.returncode is None:
            self.send(Shutdown())
        else:
            self.kill()
        try:
            # Not `wait_for`: in Python 3.11 it loses a cancellation that comes as the process ends.
            async with asyncio.timeout(within_s):
                await self._process.wait()
        except TimeoutError:
            log.warning("engine did not end in time; killing it", pid=self.pid)
        finally:
            self.kill()
            await self._wait_killed()

    async def _wait_killed(self) -> None:
        """Not for ever: a process whose disk stands still dies only when that goes on."""
        try:
            async with asyncio.timeout(KILLED_S):
                await self._process.wait()
        except TimeoutError:
            log.warning("engine cannot die, it waits for a device; leaving it", pid=self.pid)


@asynccontextmanager
async def open_link(
    command: Sequence[str], memory: int, *, max_unread_messages: int, shutdown_s: float
) -> AsyncIterator[EngineLink]:
    """Spawns `command ADDRESS MEMORY PULSE SUPERVISOR`; on leaving, process and socket are gone.

    Args:
        command: The engine's command line, without the address that we listen at, the
            descriptors that it inherits and our process id.
        memory: The descriptor of the file that engines keep experts in.
        max_unread_messages: More than this and the engine counts as hung.
        shutdown_s: How long it may take to end in order.
    """
    context = zmq.asyncio.Context()
    # The directory is created with mode 0700: no other user can speak to the engine.
    folder = TemporaryDirectory(prefix=PREFIX, dir=_short_folder())
    with folder as path, _unnamed_file(Pulse.NBYTES) as pulse:
        try:
            socket = context.socket(zmq.PAIR)
            socket.setsockopt(zmq.SNDHWM, max_unread_messages)
            address = f"ipc://{Path(path) / SOCKET}"
            socket.bind(address)
            process = await asyncio.create_subprocess_exec(
                *(*command, address, str(memory), str(pulse), str(os.getpid())),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[memory, pulse],
            )
            link = EngineLink(process, socket, folder, Pulse(pulse))
            try:
                yield link
            finally:
                await link.shut_down(shutdown_s)
        finally:
            context.destroy(linger=0)


@contextmanager
def _unnamed_file(nbytes: int) -> Iterator[int]:
    descriptor = os.memfd_create("moe-server-pulse")
    try:
        os.ftruncate(descriptor, nbytes)
        yield descriptor
    finally:
        os.close(descriptor)


def _short_folder() -> str:
    """The user's TMPDIR, unless a socket's path in it would be longer than the kernel takes."""
    folder = gettempdir()
    below = f"/{PREFIX}{'_' * NUM_RANDOM_CHARS}/{SOCKET}"
    fits = len(os.fsencode(folder)) + len(below) <= zmq.IPC_PATH_MAX_LEN
    return folder if fits else "/tmp"  # noqa: S108  # a private directory is made in it
