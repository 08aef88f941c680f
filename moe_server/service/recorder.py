"""Real requests for those who record them: only where the configuration consents, only meanwhile.

`generation` offers every accepted request; `AdminService.RecordRequests` listens. Nothing is kept
for a time when nobody does.
"""

import asyncio
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from moe_server.config import WarmupConfig
from moe_server.errors import MoeServerError, Reason
from moe_server.proto.moe_server.v1 import generation_pb2
from moe_server.service.validation import AnyGenerateRequest

MAX_LISTENERS = 4
MAX_UNREAD = 256
"""Requests that a slow listener has not read; further ones pass it by."""

Unread = asyncio.Queue[generation_pb2.RecordedRequest]


class Recorder:
    """Of one model.

    Args:
        config: Says what may be recorded.
        name: The model's, for requests that name none.
    """

    def __init__(self, config: WarmupConfig, name: str) -> None:
        self._recording = config.recording
        self._name = name
        self._listeners: set[Unread] = set()

    def offer(self, request: AnyGenerateRequest, num_prompt_tokens: int) -> None:
        """A request was accepted."""
        if not self._listeners:
            return
        recorded = self._recorded(request, num_prompt_tokens)
        for unread in self._listeners:
            if not unread.full():
                unread.put_nowait(recorded)

    @contextmanager
    def listen(self) -> Iterator[Unread]:
        """What is accepted from now on, as long as the block lasts.

        Raises:
            MoeServerError: Nothing may be recorded, or too many listen already.
        """
        if self._recording == "off":
            raise MoeServerError(
                "This server's configuration does not let requests be recorded.",
                'Set warmup.recording to "shapes" (lengths, no words) or "text".',
                reason=Reason.UNSUPPORTED,
            )
        if len(self._listeners) >= MAX_LISTENERS:
            raise MoeServerError(
                f"{MAX_LISTENERS} clients record already.",
                "End one of them.",
                reason=Reason.EXHAUSTED,
            )
        unread: Unread = asyncio.Queue(MAX_UNREAD)
        self._listeners.add(unread)
        try:
            yield unread
        finally:
            self._listeners.discard(unread)

    def _recorded(
        self, request: AnyGenerateRequest, num_prompt_tokens: int
    ) -> generation_pb2.RecordedRequest:
        # Both kinds of request have the same fields.
        copy = generation_pb2.GenerateStreamRequest.FromString(request.SerializeToString())
        copy.model = self._name
        if self._recording == "text":
            return generation_pb2.RecordedRequest(request=copy)
        # A field that is added to requests later is left out as well, until somebody has thought
        # about it; `sampling` has numbers only, and is to keep to them.
        shape = generation_pb2.GenerateStreamRequest(
            model=copy.model, sampling=copy.sampling, priority=copy.priority
        )
        shape.stopping.max_new_tokens = copy.stopping.max_new_tokens
        shape.stopping.ignore_eos = copy.stopping.ignore_eos
        prompt = generation_pb2.RandomPrompt(tokens=num_prompt_tokens, seed=secrets.randbits(32))
        return generation_pb2.RecordedRequest(request=shape, random_prompt=prompt)
