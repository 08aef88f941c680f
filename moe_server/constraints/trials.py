"""The front door's side of trial compilation: finds out whether a constraint can be used.

One process compiles one constraint at a time; it starts with the first one and again after a death.
Verdicts are kept, so that a service that sends the same schema with every request waits once.
"""

import asyncio
import os
import signal
import sys
from collections import OrderedDict
from dataclasses import dataclass

import msgspec

from moe_server.constraints.bounds import COMPILE_S, TOO_LARGE, TOO_SLOW
from moe_server.constraints.frames import HEADER_BYTES, length_of, pack
from moe_server.constraints.grammar import refusal
from moe_server.errors import MoeServerError, Reason
from moe_server.messages import Constraint, Vocabulary

MAX_VERDICTS = 512
MAX_PENDING = 32
"""Constraints that may wait for their turn; the last of them waits a minute, or gives up before."""
PATIENCE_S = 5 * COMPILE_S
"""Of the clock's time, for a process that may not get the processor; also for its start."""

BLAMED = {
    signal.SIGPROF: TOO_SLOW,
    signal.SIGXCPU: TOO_SLOW,
    signal.SIGSEGV: TOO_LARGE,
    signal.SIGABRT: TOO_LARGE,
}
"""What a process that dies of a constraint dies of. Other deaths are not the constraint's fault."""
ATTEMPTS = 2


@dataclass(slots=True)
class _Pending:
    """A trial under way, and how many requests wait for it."""

    task: asyncio.Task[str]
    num_waiting: int = 0
    has_turn: bool = False


class Trials:
    """Whether constraints compile, with this vocabulary and within bounds.

    Args:
        vocabulary: Of the served model.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._pending: dict[bytes, _Pending] = {}
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()

    async def check(self, constraint: Constraint) -> None:
        """Returns if the engine can use it.

        Raises:
            MoeServerError: INVALID, says why; EXHAUSTED where too many wait; UNSUPPORTED where the
                model's tokenizer is at fault; UNAVAILABLE where the process cannot be had.
        """
        digest = constraint.digest
        message = self._verdicts.get(digest)
        if message is None:
            message = await self._wait(self._trial(constraint, digest), digest)
        else:
            self._verdicts.move_to_end(digest)
        if message:
            raise MoeServerError(message, field=constraint.kind.value)

    async def close(self) -> None:
        """Ends the process."""
        tasks = [pending.task for pending in self._pending.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._end()

    async def _wait(self, pending: _Pending, digest: bytes) -> str:
        pending.num_waiting += 1
        try:
            # Not the caller's own: who gives up does not take the verdict from those beside.
            return await asyncio.shield(pending.task)
        finally:
            pending.num_waiting -= 1
            if not (pending.num_waiting or pending.has_turn):
                # Nobody wants to know any more, and others wait behind it.
                pending.task.cancel()
                self._forget(digest, pending.task)

    def _trial(self, constraint: Constraint, digest: bytes) -> _Pending:
        pending = self._pending.get(digest)
        if pending is None:
            if len(self._pending) >= MAX_PENDING:
                raise MoeServerError(
                    f"{MAX_PENDING} new constraints wait to be compiled, which is the bound.",
                    "Try again later.",
                    reason=Reason.EXHAUSTED,
                    retry_s=COMPILE_S,  # Then the one that has its turn has left.
                )
            task = asyncio.create_task(self._try(constraint, digest), name="constraint trial")
            pending = self._pending[digest] = _Pending(task)
            task.add_done_callback(lambda task: self._forget(digest, task))
        return pending

    def _forget(self, digest: bytes, task: asyncio.Task[str]) -> None:
        if digest in self._pending and self._pending[digest].task is task:
            del self._pending[digest]
        if task.done() and not task.cancelled():
            # Looked at, for nobody may be waiting for it any more.
            task.exception()

    async def _try(self, constraint: Constraint, digest: bytes) -> str:
        async with self._turn:
            self._pending[digest].has_turn = True
            try:
                async with asyncio.timeout(PATIENCE_S):
                    message = await self._judge(constraint)
            except TimeoutError:
                # Of a machine this busy nothing can be said about the constraint.
                await self._end()
                raise MoeServerError(
                    f"The constraint did not get compiled within {PATIENCE_S:g} s.",
                    "Try again later.",
                    reason=Reason.EXHAUSTED,
                    retry_s=PATIENCE_S,
                ) from None
        self._verdicts[digest] = message
        if len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)
        return message

    async def _judge(self, constraint: Constraint) -> str:
        frame = msgspec.msgpack.encode(constraint)
        ended = ""
        for _ in range(ATTEMPTS):
            is_tried = False
            try:
                if self._process is None:
                    await self._start()
                await self._exchange(frame)
                is_tried = True
                return await self._receive()
            except (asyncio.IncompleteReadError, OSError) as error:
                code = await self._end()
                if is_tried and -code in BLAMED:
                    return refusal(constraint, BLAMED[signal.Signals(-code)]).message
                ended = f"ended with {code}" if code else f"cannot be had: {error}"
        raise MoeServerError(
            f"The process that tries constraints {ended}.",
            "Try again later; if that does not help, see what ends processes on the server's "
            "machine, such as a lack of memory.",
            reason=Reason.UNAVAILABLE,
        )

    async def _start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "moe_server.constraints.trial",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # The last words of those that die.
            # One arena: a thread's own reserves memory that the limit would count.
            env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        )
        message = await self._exchange(msgspec.msgpack.encode(self._vocabulary))
        if message:
            await self._end()
            raise MoeServerError(
                f"This model's tokenizer cannot be constrained: {message}.",
                "Leave the constraint away.",
                reason=Reason.UNSUPPORTED,
            )

    async def _exchange(self, frame: bytes) -> str:
        assert self._process is not None
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(pack(frame))
        await stdin.drain()
        return await self._receive()

    async def _receive(self) -> str:
        assert self._process is not None
        stdout = self._process.stdout
        assert stdout is not None
        length = length_of(await stdout.readexactly(HEADER_BYTES))
        return (await stdout.readexactly(length)).decode()

    async def _end(self) -> int:
        """Makes sure that the process is gone; returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        if process.returncode is None and not process.stdout.at_eof():  # type: ignore[union-attr]
            process.kill()
        return await process.wait()
