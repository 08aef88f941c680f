"""What state a model is in, and the server, and who wants to know.

Supervisors publish; health watchers, the admin service and shutdown read. Knows neither gRPC
nor processes. Everything here belongs to one asyncio loop.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum

MAX_UNREAD_CHANGES = 64
"""A watcher that lags further behind than this misses the oldest changes, never the newest."""


class ServerState(Enum):
    """How far the server is from answering requests."""

    STARTING = "starting"
    """No engine process yet, or it is being started again."""
    LOADING = "loading"
    WARMING = "warming"
    """Loaded; proving that it keeps its limits."""
    READY = "ready"
    DRAINING = "draining"
    """Accepted requests finish, new ones are refused."""
    FAILED = "failed"
    """Cannot serve: the proof failed, which is tried again, or what does not pass by itself."""


LEAST_READY_FIRST = (
    ServerState.FAILED,
    ServerState.STARTING,
    ServerState.LOADING,
    ServerState.WARMING,
    ServerState.DRAINING,
    ServerState.READY,
)
"""Of several models' states the first of these is the server's."""


class StateWatcher:
    """One reader's queue of state changes; bounded, and independent of every other reader's."""

    def __init__(self, current: ServerState) -> None:
        self._unread = deque([current], maxlen=MAX_UNREAD_CHANGES)
        self._arrived = asyncio.Event()
        self._arrived.set()

    def push(self, state: ServerState) -> None:
        """Queues a change and wakes the reader."""
        self._unread.append(state)
        self._arrived.set()

    async def next(self) -> ServerState:
        """The current state first, then every change in order."""
        await self._arrived.wait()
        state = self._unread.popleft()
        if not self._unread:
            self._arrived.clear()
        return state


class StateFeed:
    """The current state, told to any number of watchers."""

    def __init__(self) -> None:
        self._current = ServerState.STARTING
        self._watchers: set[StateWatcher] = set()
        self._listeners: list[Callable[[], None]] = []

    @property
    def current(self) -> ServerState:
        return self._current

    @property
    def num_watchers(self) -> int:
        return len(self._watchers)

    def publish(self, state: ServerState) -> None:
        """Tells every watcher, unless nothing changed."""
        if state is self._current:
            return
        self._current = state
        for watcher in self._watchers:
            watcher.push(state)
        for listener in self._listeners:
            listener()

    def on_change(self, listener: Callable[[], None]) -> None:
        """Calls `listener` at once after every change, as long as the feed exists."""
        self._listeners.append(listener)

    @contextmanager
    def watch(self) -> Iterator[StateWatcher]:
        """A watcher for the duration of a `with` block; leaving it disturbs nobody else."""
        watcher = StateWatcher(self._current)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    async def wait_for(self, *states: ServerState) -> ServerState:
        """Returns as soon as one of `states` is reached."""
        with self.watch() as watcher:
            while (state := await watcher.next()) not in states:
                pass
        return state


def least_ready(states: Iterable[ServerState]) -> ServerState:
    """The state of a server whose models are in `states`."""
    return min(states, key=LEAST_READY_FIRST.index)


def joint_feed(feeds: Sequence[StateFeed]) -> StateFeed:
    """Tells the least ready of the feeds' states, and every change of that."""
    joint = StateFeed()

    def publish() -> None:
        joint.publish(least_ready(feed.current for feed in feeds))

    for feed in feeds:
        feed.on_change(publish)
    publish()
    return joint
