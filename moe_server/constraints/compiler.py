"""Compiles constraints beside the engine's steps, on one thread.

What comes here has passed its trial in the front door, so it is bounded in time and memory. A
request waits here until its matcher is ready and is queued then; `engine` is the only user.
"""

from collections import OrderedDict
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from moe_server.constraints.matcher import Compiled, Matcher, compile_constraint
from moe_server.constraints.vocabulary import build_tokenizer
from moe_server.errors import MoeServerError, Reason
from moe_server.messages import Constraint, Submit, Vocabulary
from moe_server.sequence import Sequence

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_COMPILED = 32
"""Constraints kept for the next request that has one of them."""


class Compiler:
    """Requests whose constraint is being compiled, and the compiled ones. Used by one thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="constraints")
        self._vocabulary: Vocabulary | None = None
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[bytes, Compiled] = OrderedDict()
        self._futures: dict[int, tuple[Sequence, Future[Matcher]]] = {}

    @property
    def waiting(self) -> list[Sequence]:
        """Those whose constraint is not compiled yet."""
        return [sequence for sequence, _ in self._futures.values()]

    def use(self, vocabulary: Vocabulary) -> None:
        """What tokens stand for. Comes before the first constraint."""
        self._vocabulary = vocabulary

    def begin(self, sequence: Sequence) -> None:
        """Starts to make the matcher of a request that has a constraint."""
        future = self._thread.submit(self._make, sequence.request)
        self._futures[sequence.request.request_id] = sequence, future

    def begin_alone(self, sequence: Sequence) -> None:
        """Starts to make a matcher, shared with nobody, for the text that a request has so far."""
        future = self._thread.submit(self._make_alone, sequence)
        self._futures[sequence.request.request_id] = sequence, future

    def forget(self, request_id: int) -> None:
        """The request is of no interest any more; unknown ones never were."""
        if request_id in self._futures:
            _, future = self._futures.pop(request_id)
            future.cancel()

    def take_ready(self, wait_s: float) -> list[tuple[Sequence, MoeServerError | None]]:
        """Requests that have their matcher now, or an error because there is none for them.

        Args:
            wait_s: How long to wait for the first where none is ready.
        """
        if not self._futures:
            return []
        wait([future for _, future in self._futures.values()], wait_s, FIRST_COMPLETED)
        ready: list[tuple[Sequence, MoeServerError | None]] = []
        for request_id, (sequence, future) in list(self._futures.items()):
            if not future.done():
                continue
            del self._futures[request_id]
            try:
                sequence.matcher = future.result()
            except MoeServerError as error:
                ready.append((sequence, error))
            else:
                ready.append((sequence, None))
        return ready

    def close(self) -> None:
        """Ends the thread after what it is compiling."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, request: Submit) -> Matcher:
        constraint, vocabulary = request.constraint, self._vocabulary
        assert constraint is not None
        if vocabulary is None:
            raise MoeServerError(
                "The engine does not know what this model's tokens stand for.",
                "Leave the constraint away.",
                reason=Reason.UNSUPPORTED,
            )
        digest = constraint.digest
        compiled = self._compiled.get(digest)
        if compiled is None or compiled.is_spent:
            compiled = self._compile(constraint, vocabulary)
            self._compiled[digest] = compiled
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(digest)
        return compiled.fork(_never(request, vocabulary))

    def _make_alone(self, sequence: Sequence) -> Matcher:
        request, vocabulary = sequence.request, self._vocabulary
        assert request.constraint is not None
        assert vocabulary is not None
        matcher = self._compile(request.constraint, vocabulary).fork(_never(request, vocabulary))
        for token_id in sequence.token_ids[sequence.num_prompt_tokens :]:
            matcher.accept(token_id, look=False)
        matcher.look()
        return matcher

    def _compile(self, constraint: Constraint, vocabulary: Vocabulary) -> Compiled:
        if self._tokenizer is None:
            self._tokenizer = build_tokenizer(vocabulary)
        return compile_constraint(constraint, self._tokenizer, vocabulary.vocab_size)


def _never(request: Submit, vocabulary: Vocabulary) -> list[int]:
    """A request that ends at no end-of-sequence token never gets one."""
    return [] if request.eos_token_ids else vocabulary.eos_token_ids
