"""Compiles constraints beside the engine's steps, on one thread.

What comes here has passed its trial in the front door, so it is bounded in time and memory. A
request waits here until its matcher is ready and is queued then; one whose constraint is compiled
already waits for nobody. `engine` is the only user.
"""

import traceback
from collections import OrderedDict
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_server.constraints.bounds import KEPT_BYTES, MEMORY_BYTES
from moe_server.constraints.heap import used_bytes
from moe_server.constraints.matcher import Compiled, Matcher, compile_constraint
from moe_server.constraints.vocabulary import build_tokenizer
from moe_server.errors import MoeServerError, Reason
from moe_server.messages import Constraint, Vocabulary
from moe_server.sequence import Sequence

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_COMPILED = 32
"""Constraints kept for the next request that has one of them, if all fit `KEPT_BYTES`."""
LEAST_BYTES = 256 * 2**10
"""What a small one is taken for, for its first states come when it is used."""
MAX_COMPILING = 32
"""Constraints that may wait for the thread; each takes at most 2 s of processor time."""


@dataclass(slots=True)
class _Waiting:
    """A request and what it waits for: what it shares, or a matcher for it alone."""

    sequence: Sequence
    future: "Future[Compiled] | Future[Matcher]"


class Compiler:
    """Requests whose constraint is being compiled, and the compiled ones. Used by one thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="constraints")
        self._vocabulary: Vocabulary | None = None
        self._tokenizer: LLTokenizer | None = None
        """Of the thread; everything else is of the engine's."""
        self._compiled: OrderedDict[bytes, Compiled] = OrderedDict()
        self._compiling: dict[bytes, Future[Compiled]] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._ready: dict[int, tuple[Sequence, MoeServerError | None]] = {}

    @property
    def waiting(self) -> list[Sequence]:
        """Those that were not taken yet."""
        ready = [sequence for sequence, _ in self._ready.values()]
        return ready + [waiting.sequence for waiting in self._waiting.values()]

    def use(self, vocabulary: Vocabulary) -> None:
        """What tokens stand for. Comes before the first constraint."""
        self._vocabulary = vocabulary

    def begin(self, sequence: Sequence) -> None:
        """Makes the matcher of a request that has a constraint, or starts to."""
        constraint, vocabulary = sequence.request.constraint, self._vocabulary
        assert constraint is not None
        if vocabulary is None:
            error = MoeServerError(
                "The engine does not know what this model's tokens stand for.",
                "Leave the constraint away.",
                reason=Reason.UNSUPPORTED,
            )
            self._settle(sequence, error)
            return
        digest = constraint.digest
        compiled = self._compiled.get(digest)
        if compiled is not None and not compiled.is_spent:
            self._compiled.move_to_end(digest)
            self._fork(sequence, compiled)
            return
        future = self._compiling.get(digest)
        if future is None:
            if self._is_full(sequence):
                return
            future = self._thread.submit(self._compile, constraint, vocabulary)
            self._compiling[digest] = future
        self._waiting[sequence.request.request_id] = _Waiting(sequence, future)

    def begin_alone(self, sequence: Sequence) -> None:
        """Starts to make a matcher, shared with nobody, for the text that a request has so far."""
        assert self._vocabulary is not None
        future = self._thread.submit(self._make_alone, sequence, self._vocabulary)
        self._waiting[sequence.request.request_id] = _Waiting(sequence, future)

    def forget(self, request_id: int) -> None:
        """The request is of no interest any more; unknown ones never were."""
        self._ready.pop(request_id, None)
        left = self._waiting.pop(request_id, None)
        if left is None or any(left.future is other.future for other in self._waiting.values()):
            return
        left.future.cancel()
        self._compiling = {
            digest: future
            for digest, future in self._compiling.items()
            if future is not left.future or not future.cancelled()
        }

    def take_ready(self, wait_s: float) -> list[tuple[Sequence, MoeServerError | None]]:
        """Requests that have their matcher now, or an error because there is none for them.

        Args:
            wait_s: How long to wait for the first where none is ready.
        """
        if self._waiting:
            futures: set[Future[Any]] = {waiting.future for waiting in self._waiting.values()}
            wait(futures, 0.0 if self._ready else wait_s, FIRST_COMPLETED)
            self._keep_compiled()
            for request_id, waiting in list(self._waiting.items()):
                if waiting.future.done():
                    del self._waiting[request_id]
                    self._take(waiting)
        ready, self._ready = list(self._ready.values()), {}
        return ready

    def close(self) -> None:
        """Ends the thread after what it is compiling."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _is_full(self, sequence: Sequence) -> bool:
        if len(self._compiling) < MAX_COMPILING:
            return False
        error = MoeServerError(
            f"{MAX_COMPILING} constraints wait to be compiled, which is the bound.",
            "Try again later.",
            reason=Reason.EXHAUSTED,
        )
        self._settle(sequence, error)
        return True

    def _keep_compiled(self) -> None:
        for digest, future in list(self._compiling.items()):
            if future.done():
                del self._compiling[digest]
                if not future.cancelled() and future.exception() is None:
                    self._compiled[digest] = future.result()
                    self._compiled.move_to_end(digest)
        while self._compiled and (
            len(self._compiled) > MAX_COMPILED or self._kept_bytes > KEPT_BYTES
        ):
            self._compiled.popitem(last=False)

    @property
    def _kept_bytes(self) -> int:
        return sum(compiled.num_bytes for compiled in self._compiled.values())

    def _take(self, waiting: _Waiting) -> None:
        try:
            made = waiting.future.result()
        except BaseException as error:  # noqa: BLE001  a panic of llguidance's is no Exception
            self._settle(waiting.sequence, _told(error))
            return
        if isinstance(made, Matcher):
            waiting.sequence.matcher = made
            self._settle(waiting.sequence, None)
        elif made.is_spent:  # By others that waited for the same.
            self.begin(waiting.sequence)
        else:
            self._fork(waiting.sequence, made)

    def _fork(self, sequence: Sequence, compiled: Compiled) -> None:
        assert self._vocabulary is not None
        try:
            sequence.matcher = compiled.fork(_never(sequence, self._vocabulary))
        except BaseException as error:  # noqa: BLE001  as above
            self._settle(sequence, _told(error))
        else:
            self._settle(sequence, None)

    def _settle(self, sequence: Sequence, error: MoeServerError | None) -> None:
        self._ready[sequence.request.request_id] = sequence, error

    def _make_alone(self, sequence: Sequence, vocabulary: Vocabulary) -> Matcher:
        assert sequence.request.constraint is not None
        compiled = self._compile(sequence.request.constraint, vocabulary)
        matcher = compiled.fork(_never(sequence, vocabulary))
        for token_id in sequence.token_ids[sequence.num_prompt_tokens :]:
            matcher.accept(token_id, look=False)
        matcher.look()
        return matcher

    def _compile(self, constraint: Constraint, vocabulary: Vocabulary) -> Compiled:
        if self._tokenizer is None:
            self._tokenizer = build_tokenizer(vocabulary)
        before = used_bytes()
        compiled = compile_constraint(constraint, self._tokenizer, vocabulary.vocab_size)
        after = used_bytes()
        if before is not None and after is not None:
            # The engine's steps allocate meanwhile: near enough, within what can be.
            compiled.num_bytes = min(max(LEAST_BYTES, after - before), MEMORY_BYTES)
        return compiled


def _never(sequence: Sequence, vocabulary: Vocabulary) -> list[int]:
    """A request that ends at no end-of-sequence token never gets one."""
    return [] if sequence.request.eos_token_ids else vocabulary.eos_token_ids


def _told(error: BaseException) -> MoeServerError:
    """What a request is told of what its compilation ended with; the log hears of surprises."""
    if isinstance(error, MoeServerError):
        return error
    traceback.print_exception(error)
    return MoeServerError(
        f"The constraint could not be compiled: {type(error).__name__} in the engine.",
        "The server's log says more.",
        reason=Reason.UNAVAILABLE,
    )
