"""The requests between the front door and the engine: a bounded table of mailboxes.

The supervisor's reader delivers into it and never waits; each RPC handler drains its own mailbox. A
handler that lags, as its client does not read, finds its events coalesced; one that lags too far
loses its request. Knows neither gRPC nor the engine's socket.
"""

import asyncio
from collections.abc import AsyncIterator

from moe_server.errors import MoeServerError, Reason
from moe_server.messages import RequestFailed, TokenEvent

MAX_UNREAD = 50_000
"""Tokens that a mailbox holds, each alternative with a log-probability counted as one more: up to
500 bytes each, so that a stream whose client does not read takes 25 MB at most. Few completions are
so long: by default all of a server's KV cache is a third of it."""


class OpenRequest:
    """One request's mailbox. Iterating gives every token event, in batches, until the last one."""

    def __init__(self, request_id: int) -> None:
        self.request_id = request_id
        self.submitted = False
        """The engine knows it and would have to be told of its end."""
        self._events: list[TokenEvent] = []
        self._num_unread = 0
        self._error: MoeServerError | None = None
        self._finished = False
        self._arrived = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Nothing more will be delivered."""
        return self._finished or self._error is not None

    def deliver(self, event: TokenEvent) -> bool:
        """Called by the supervisor's reader; never blocks.

        Returns:
            False where it is one too many: the request failed, and the engine must be told.
        """
        if self._error is not None:
            return True  # it was on its way when the request failed
        self._num_unread += 1 + len(event.top_logprobs)
        if self._num_unread > MAX_UNREAD:
            self._events.clear()
            self.fail(
                MoeServerError(
                    f"The client has left more than {MAX_UNREAD} tokens and alternatives unread.",
                    "Read the stream as it comes, or ask for fewer tokens or alternatives.",
                    reason=Reason.EXHAUSTED,
                )
            )
            return False
        self._events.append(event)
        self._finished = event.finish is not None
        self._arrived.set()
        return True

    def fail(self, error: MoeServerError) -> None:
        """Ends the iteration with `error`, after the events already delivered."""
        self._error = error
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        while True:
            if self._events:
                batch, self._events, self._num_unread = self._events, [], 0
                yield batch  # More can arrive meanwhile, the last event among them.
            elif self._error is not None:
                raise self._error
            elif self._finished:
                return
            else:
                self._arrived.clear()
                await self._arrived.wait()


class OpenRequests:
    """Every request that is not yet closed by its handler; at most `limit`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._requests: dict[int, OpenRequest] = {}
        self._next_id = 1
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._requests)

    def open(self) -> OpenRequest:
        """Takes a place.

        Raises:
            MoeServerError: EXHAUSTED where all places are taken.
        """
        if len(self._requests) >= self._limit:
            raise MoeServerError(
                f"{self._limit} requests are already running or waiting, which is the bound.",
                "Try again later, or raise scheduler.max_waiting.",
                reason=Reason.EXHAUSTED,
            )
        request = OpenRequest(self._next_id)
        self._next_id += 1
        self._requests[request.request_id] = request
        self._empty.clear()
        return request

    def close(self, request: OpenRequest) -> None:
        """Gives the place back; what still arrives for it is dropped."""
        self._requests.pop(request.request_id, None)
        if not self._requests:
            self._empty.set()

    def deliver(self, event: TokenEvent) -> bool:
        """As `OpenRequest.deliver`.

        An unknown id is a request that was cancelled while its events were on their way.
        """
        request = self._requests.get(event.request_id)
        return request is None or request.deliver(event)

    def fail(self, failure: RequestFailed) -> None:
        """Fails one request with the engine's reason."""
        if request := self._requests.get(failure.request_id):
            error = MoeServerError(
                failure.message,
                failure.remedy,
                reason=failure.reason,
                field=failure.field,
                retry_s=failure.retry_s,
            )
            request.fail(error)

    def fail_all(self, message: str, remedy: str) -> None:
        """Fails every request that has not already ended, as retryable."""
        for request in self._requests.values():
            if not request.ended:
                request.fail(MoeServerError(message, remedy, reason=Reason.UNAVAILABLE))

    @property
    def num_pending(self) -> int:
        """Requests the engine still owes something."""
        return sum(request.submitted and not request.ended for request in self._requests.values())

    async def wait_empty(self) -> None:
        """Returns when no request is open."""
        await self._empty.wait()
