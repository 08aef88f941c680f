"""What the front door and the engine process say to each other.

Plain facts as msgspec structs, encoded as MessagePack. Neither gRPC nor torch appears here; times
are `time.monotonic()` seconds, which Linux shares between processes.
"""

import hashlib
from enum import Enum
from typing import TypeAlias

import msgspec

from moe_server.errors import MoeServerError, Reason


class FinishReason(Enum):
    """Why a request ended well."""

    END_OF_SEQUENCE = "end_of_sequence"
    STOP_SEQUENCE = "stop_sequence"
    LENGTH = "length"
    STOP_TOKEN = "stop_token"  # noqa: S105  # no secret


class Sampling(msgspec.Struct, frozen=True):
    """How the next token is chosen; the defaults are greedy decoding."""

    temperature: float = 0.0
    top_k: int = 0
    """0 keeps all tokens."""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    """Unsigned 64-bit. Tokens depend on it and on nothing else that is random."""
    repetition_penalty: float = 1.0
    """Of tokens in prompt and completion."""
    presence_penalty: float = 0.0
    """Of tokens in the completion, as the next one."""
    frequency_penalty: float = 0.0
    sample_index: int = 0
    """Which of several completions of one prompt and seed this is."""


class ConstraintKind(Enum):
    """What a constraint is written in; the value is the protocol's field."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    GRAMMAR = "grammar"
    CHOICES = "choices"


class Constraint(msgspec.Struct, frozen=True):
    """What the text of a completion must be."""

    kind: ConstraintKind
    texts: tuple[str, ...]
    """The choices; of the other kinds the one text."""

    @property
    def digest(self) -> bytes:
        """What it is remembered by: the texts can be long, and many are remembered."""
        return hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=16).digest()


class Vocabulary(msgspec.Struct, frozen=True, tag=True):
    """What tokens stand for in a text, which constraints are made of. Sent once, before them."""

    tokens: bytes
    """MessagePack of a list of bytes, one for each id: read when the first constraint comes."""
    vocab_size: int
    """The model's; it may have more ids than the tokenizer, or fewer."""
    eos_token_ids: list[int]


class HotSet(msgspec.Struct, frozen=True, tag=True):
    """How often experts were wanted of late; see `offload.uses`.

    The second message that an engine gets; comes again when its warm-up is over, which was no
    traffic to learn from. The engine sends its own now and then.
    """

    visits: list[float]
    """By layer; empty where nothing is known."""
    shares: list[list[float]]
    """Of each layer's visits, those that wanted each expert."""


NO_HOT_SET = HotSet([], [])


class TellHotSet(msgspec.Struct, frozen=True, tag=True):
    """Answer with a HotSet, after the step."""


class Rewarm(msgspec.Struct, frozen=True, tag=True):
    """Bring back into memory what was wanted most; progress follows, the last with an outcome."""

    rewarm_id: int


class StopRewarm(msgspec.Struct, frozen=True, tag=True):
    """End that rewarming, if it is going on."""

    rewarm_id: int


class RewarmOutcome(Enum):
    """How a rewarming ended."""

    DONE = "done"
    STOPPED = "stopped"


class RewarmProgress(msgspec.Struct, frozen=True, tag=True):
    """How far a rewarming is."""

    rewarm_id: int
    experts_done: int
    experts_total: int
    """Those of the hot set that were not in memory when it began."""
    experts_left_out: int
    """For which there was no colder one, that had to give way to requests, or that could not be
    read; of a stopped rewarming also those that were still to come."""
    bytes_done: int
    bytes_total: int
    outcome: RewarmOutcome | None = None
    """None: it goes on."""


class Submit(msgspec.Struct, frozen=True, tag=True):
    """A validated request; the engine answers with token events that carry its id."""

    request_id: int
    token_ids: list[int]
    """The prompt, at least one token, every id below the vocabulary size."""
    max_new_tokens: int
    """At least 1; prompt and completion together fit the model's context."""
    eos_token_ids: list[int]
    """Generation ends after any of these; empty where the request ignores them."""
    sampling: Sampling = Sampling()
    logprobs: int = -1
    """-1: none; 0: of the chosen token; n: also of the n most likely ones."""
    stop_token_ids: list[int] = []
    """Generation ends after any of these, too."""
    constraint: Constraint | None = None
    targets: list[int] = []
    """Tokens to be scored instead of generating. The logits of as many last tokens of the prompt
    predict them: it ends with all of them but the last."""
    pools: bool = False
    """The mean of the last hidden states is wanted instead of a completion."""
    deadline: float | None = None
    """`time.monotonic()` after which nobody waits for the answer."""
    priority: int = 0
    """Higher goes first; see `scheduler.priority_s`."""
    fewest_new_tokens: int = 1
    """It cannot be complete with fewer: max_new_tokens where nothing may end it before."""
    is_patient: bool = False
    """Not refused for its wait: it follows others of the same call, or is the warm-up's."""


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Forget a request: no event for it follows once the engine has read this."""

    request_id: int


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End the engine process in order."""


class Timings(msgspec.Struct):
    """Seconds and bytes of the steps that one request took part in."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    router_s: float = 0.0
    transfer_s: float = 0.0
    read_s: float = 0.0
    transfer_bytes: int = 0
    read_bytes: int = 0


class TargetScore(msgspec.Struct, frozen=True, array_like=True):
    """What the model thinks of one given token."""

    logprob: float
    is_greedy: bool
    """True where it is the most likely one."""


class TokenEvent(msgspec.Struct, frozen=True):
    """One generated token; the last one of a request carries its finish reason."""

    request_id: int
    token_id: int
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] = []
    """(token id, log-probability), most likely first."""
    finish: FinishReason | None = None
    cached_tokens: int = 0
    """Prompt tokens that an earlier request's computation stood for."""
    target_scores: list[TargetScore] = []
    """Of the request's targets."""
    embedding: list[float] = []
    """The pooled hidden states, of length 1."""
    timings: Timings = msgspec.field(default_factory=Timings)
    """So far: the front door ends a request at a stop string, which the engine does not know."""


class RequestFailed(msgspec.Struct, frozen=True):
    """A request that ended without finishing; nothing of it is left in the engine."""

    request_id: int
    reason: Reason
    message: str
    remedy: str = ""
    field: str = ""
    retry_s: float = 0.0
    """As in `MoeServerError`."""


class ExpertCounters(msgspec.Struct):
    """Where the experts that steps needed were found, since the engine started."""

    device_hits: int = 0
    host_hits: int = 0
    disk_reads: int = 0
    transfer_bytes: int = 0
    read_bytes: int = 0
    prefetches: int = 0
    prefetch_hits: int = 0
    cancelled_reads: int = 0


class Offload(msgspec.Struct):
    """What moving experts costs, and what was chosen because of it; see `offload.cost`."""

    disk_bytes_per_second: float = 0.0
    copy_bytes_per_second: float = 0.0
    read_block_bytes: int = 0
    read_depth: int = 0
    copied: int = 0
    computed_in_place: int = 0
    demoted: int = 0
    forgotten: int = 0
    demotion_reuse: float = 0.0
    read_retries: int = 0
    checksum_mismatches: int = 0
    read_failures: int = 0
    """Blocks that could not be read at all."""
    buffered_files: int = 0
    host_memory_pinned: bool = False


class EngineLoad(msgspec.Struct, frozen=True):
    """What the engine is busy with after a step."""

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    blocks_kept: int = 0
    """Blocks that are not in use, but hold the beginning of an earlier prompt."""
    preemptions: int = 0
    hopeless: int = 0
    """Requests that were refused because they could not make their deadline."""
    overdue: int = 0
    """Requests that were refused because they waited for too long, or would have."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Since the start, as in `SchedulerCounters`."""
    experts: ExpertCounters = msgspec.field(default_factory=ExpertCounters)
    offload: Offload = msgspec.field(default_factory=Offload)


class StepDone(msgspec.Struct, frozen=True, tag=True):
    """Everything one engine step produced, in one message. Without events it is the heartbeat."""

    load: EngineLoad
    tokens: list[TokenEvent] = []
    failed: list[RequestFailed] = []


class Progress(msgspec.Struct, frozen=True, tag=True):
    """How far loading has come."""

    stage: str
    bytes_done: int = 0
    bytes_total: int = 0


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The engine can run steps. It has touched every expert, but proven nothing yet."""

    seconds: float
    num_kept: int
    """Experts that an earlier engine had left in memory."""
    outlasts_engine: bool
    """Whether experts will be found in memory by the engine that comes after this one."""
    expert_s: float = 0.0
    """Computing one expert that is on the device, with one row."""
    disk_bytes_per_s: float = 0.0
    """What loading has read at; 0: it has read nothing."""
    copy_bytes_per_s: float = 0.0
    """What experts come from host memory to the device at; 0: none has come."""


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot run; it ends after this."""

    reason: Reason
    message: str
    remedy: str
    retry: bool
    """True where the cause can pass (a read error, memory held by others)."""

    @classmethod
    def of(cls, error: MoeServerError) -> "Fatal":
        retry = error.reason in (Reason.EXHAUSTED, Reason.UNAVAILABLE)
        return cls(error.reason, error.message, error.remedy, retry)


ToEngine: TypeAlias = (
    Submit | Cancel | Shutdown | Vocabulary | HotSet | TellHotSet | Rewarm | StopRewarm
)
FromEngine: TypeAlias = StepDone | Progress | Loaded | Fatal | HotSet | RewarmProgress
