"""The front door's side of trial compilation: finds out whether a constraint can be used.

One process compiles one constraint at a time; it starts with the first one and again after a death.
Verdicts are kept, so that a service that sends the same schema with every request waits once.
"""

import asyncio
import os
import signal
import sys
from collections import OrderedDict

import msgspec

from moe_server.constraints.bounds import COMPILE_S, MEMORY_BYTES
from moe_server.constraints.frames import HEADER_BYTES, length_of, pack
from moe_server.constraints.grammar import refusal
from moe_server.errors import MoeServerError, Reason
from moe_server.messages import Constraint, Vocabulary

MAX_VERDICTS = 512
MAX_PENDING = 32
"""Constraints that may wait for their turn; the last of them waits a minute at worst."""
PATIENCE_S = 10 * COMPILE_S
"""Of the clock's time, for a process that may not get the processor; also for its start."""

_TOO_SLOW = f"it takes more than {COMPILE_S:g} s of processor time to compile"
_TOO_LARGE = f"it needs more than {MEMORY_BYTES // 2**20} MiB to compile, or nests too deeply"


class Trials:
    """Whether constraints compile, with this vocabulary and within bounds.

    Args:
        vocabulary: Of the served model.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._pending: dict[bytes, asyncio.Task[str]] = {}
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()

    async def check(self, constraint: Constraint) -> None:
        """Returns if the engine can use it.

        Raises:
            MoeServerError: INVALID, says why; EXHAUSTED where too many wait; UNSUPPORTED where the
                model's tokenizer is at fault.
        """
        digest = constraint.digest
        message = self._verdicts.get(digest)
        if message is None:
            # Not the caller's own: who gives up does not take the verdict from those beside.
            message = await asyncio.shield(self._trial(constraint, digest))
        else:
            self._verdicts.move_to_end(digest)
        if message:
            raise MoeServerError(message, field=constraint.kind.value)

    async def close(self) -> None:
        """Ends the process."""
        for task in self._pending.values():
            task.cancel()
        await asyncio.gather(*self._pending.values(), return_exceptions=True)
        await self._end()

    def _trial(self, constraint: Constraint, digest: bytes) -> asyncio.Task[str]:
        task = self._pending.get(digest)
        if task is None:
            if len(self._pending) >= MAX_PENDING:
                raise MoeServerError(
                    f"{MAX_PENDING} new constraints wait to be compiled, which is the bound.",
                    "Try again later.",
                    reason=Reason.EXHAUSTED,
                )
            task = asyncio.create_task(self._try(constraint, digest), name="constraint trial")
            self._pending[digest] = task
            task.add_done_callback(lambda task: self._forget(digest, task))
        return task

    def _forget(self, digest: bytes, task: asyncio.Task[str]) -> None:
        del self._pending[digest]
        if not task.cancelled():
            # Looked at, for nobody may be waiting for it any more.
            task.exception()

    async def _try(self, constraint: Constraint, digest: bytes) -> str:
        async with self._turn:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    message = await self._ask(constraint)
            except TimeoutError:
                # Of a machine this busy nothing can be said about the constraint.
                await self._end()
                raise MoeServerError(
                    f"The constraint did not get compiled within {PATIENCE_S:g} s.",
                    "Try again later.",
                    reason=Reason.EXHAUSTED,
                ) from None
            except (asyncio.IncompleteReadError, ConnectionError):
                problem = _TOO_SLOW if await self._end() == -signal.SIGPROF else _TOO_LARGE
                message = refusal(constraint, problem).message
        self._verdicts[digest] = message
        if len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)
        return message

    async def _ask(self, constraint: Constraint) -> str:
        if self._process is None:
            await self._start()
        return await self._exchange(msgspec.msgpack.encode(constraint))

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
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(pack(frame))
        await stdin.drain()
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
