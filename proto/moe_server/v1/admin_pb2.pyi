import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ServerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SERVER_STATE_UNSPECIFIED: _ClassVar[ServerState]
    SERVER_STATE_STARTING: _ClassVar[ServerState]
    SERVER_STATE_LOADING: _ClassVar[ServerState]
    SERVER_STATE_WARMING: _ClassVar[ServerState]
    SERVER_STATE_READY: _ClassVar[ServerState]
    SERVER_STATE_DRAINING: _ClassVar[ServerState]
    SERVER_STATE_FAILED: _ClassVar[ServerState]

class StageState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAGE_STATE_UNSPECIFIED: _ClassVar[StageState]
    STAGE_STATE_RUNNING: _ClassVar[StageState]
    STAGE_STATE_DONE: _ClassVar[StageState]
    STAGE_STATE_FAILED: _ClassVar[StageState]
SERVER_STATE_UNSPECIFIED: ServerState
SERVER_STATE_STARTING: ServerState
SERVER_STATE_LOADING: ServerState
SERVER_STATE_WARMING: ServerState
SERVER_STATE_READY: ServerState
SERVER_STATE_DRAINING: ServerState
SERVER_STATE_FAILED: ServerState
STAGE_STATE_UNSPECIFIED: StageState
STAGE_STATE_RUNNING: StageState
STAGE_STATE_DONE: StageState
STAGE_STATE_FAILED: StageState

class Startup(_message.Message):
    __slots__ = ("stage", "stage_index", "stage_count", "bytes_done", "bytes_total", "elapsed", "probes", "bytes_per_second", "eta", "stages", "max_ttft", "max_tpot", "degraded")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    STAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
    STAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    ETA_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    MAX_TTFT_FIELD_NUMBER: _ClassVar[int]
    MAX_TPOT_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    stage: str
    stage_index: int
    stage_count: int
    bytes_done: int
    bytes_total: int
    elapsed: _duration_pb2.Duration
    probes: _containers.RepeatedCompositeFieldContainer[Probe]
    bytes_per_second: float
    eta: _duration_pb2.Duration
    stages: _containers.RepeatedCompositeFieldContainer[Stage]
    max_ttft: _duration_pb2.Duration
    max_tpot: _duration_pb2.Duration
    degraded: str
    def __init__(self, stage: _Optional[str] = ..., stage_index: _Optional[int] = ..., stage_count: _Optional[int] = ..., bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ..., elapsed: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., probes: _Optional[_Iterable[_Union[Probe, _Mapping]]] = ..., bytes_per_second: _Optional[float] = ..., eta: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., stages: _Optional[_Iterable[_Union[Stage, _Mapping]]] = ..., max_ttft: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., max_tpot: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., degraded: _Optional[str] = ...) -> None: ...

class Stage(_message.Message):
    __slots__ = ("name", "state", "attempts", "elapsed", "bytes_done", "bytes_total", "failure", "warnings")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: StageState
    attempts: int
    elapsed: _duration_pb2.Duration
    bytes_done: int
    bytes_total: int
    failure: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[StageState, str]] = ..., attempts: _Optional[int] = ..., elapsed: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ..., failure: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "ttft", "tpot")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TTFT_FIELD_NUMBER: _ClassVar[int]
    TPOT_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    ttft: _duration_pb2.Duration
    tpot: _duration_pb2.Duration
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., ttft: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., tpot: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Memory(_message.Message):
    __slots__ = ("device_budget_bytes", "dense_bytes", "kv_bytes", "workspace_bytes", "expert_slots_bytes", "expert_slots", "host_budget_bytes", "host_records", "host_records_bytes", "expert_bytes", "experts", "embedding_on_disk_bytes")
    DEVICE_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    DENSE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    WORKSPACE_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXPERT_SLOTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXPERT_SLOTS_FIELD_NUMBER: _ClassVar[int]
    HOST_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_RECORDS_FIELD_NUMBER: _ClassVar[int]
    HOST_RECORDS_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXPERT_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_ON_DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    device_budget_bytes: int
    dense_bytes: int
    kv_bytes: int
    workspace_bytes: int
    expert_slots_bytes: int
    expert_slots: int
    host_budget_bytes: int
    host_records: int
    host_records_bytes: int
    expert_bytes: int
    experts: int
    embedding_on_disk_bytes: int
    def __init__(self, device_budget_bytes: _Optional[int] = ..., dense_bytes: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., workspace_bytes: _Optional[int] = ..., expert_slots_bytes: _Optional[int] = ..., expert_slots: _Optional[int] = ..., host_budget_bytes: _Optional[int] = ..., host_records: _Optional[int] = ..., host_records_bytes: _Optional[int] = ..., expert_bytes: _Optional[int] = ..., experts: _Optional[int] = ..., embedding_on_disk_bytes: _Optional[int] = ...) -> None: ...

class ExpertCounters(_message.Message):
    __slots__ = ("device_hits", "host_hits", "disk_reads", "transfer_bytes", "read_bytes", "prefetches", "prefetch_hits", "cancelled_reads")
    DEVICE_HITS_FIELD_NUMBER: _ClassVar[int]
    HOST_HITS_FIELD_NUMBER: _ClassVar[int]
    DISK_READS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFETCHES_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_HITS_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_READS_FIELD_NUMBER: _ClassVar[int]
    device_hits: int
    host_hits: int
    disk_reads: int
    transfer_bytes: int
    read_bytes: int
    prefetches: int
    prefetch_hits: int
    cancelled_reads: int
    def __init__(self, device_hits: _Optional[int] = ..., host_hits: _Optional[int] = ..., disk_reads: _Optional[int] = ..., transfer_bytes: _Optional[int] = ..., read_bytes: _Optional[int] = ..., prefetches: _Optional[int] = ..., prefetch_hits: _Optional[int] = ..., cancelled_reads: _Optional[int] = ...) -> None: ...

class Offload(_message.Message):
    __slots__ = ("disk_bytes_per_second", "copy_bytes_per_second", "read_block_bytes", "read_depth", "copied", "computed_in_place", "demoted", "forgotten", "demotion_reuse", "read_retries", "checksum_mismatches", "buffered_files", "host_memory_pinned", "read_failures")
    DISK_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    COPY_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    READ_BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_DEPTH_FIELD_NUMBER: _ClassVar[int]
    COPIED_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_IN_PLACE_FIELD_NUMBER: _ClassVar[int]
    DEMOTED_FIELD_NUMBER: _ClassVar[int]
    FORGOTTEN_FIELD_NUMBER: _ClassVar[int]
    DEMOTION_REUSE_FIELD_NUMBER: _ClassVar[int]
    READ_RETRIES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_MISMATCHES_FIELD_NUMBER: _ClassVar[int]
    BUFFERED_FILES_FIELD_NUMBER: _ClassVar[int]
    HOST_MEMORY_PINNED_FIELD_NUMBER: _ClassVar[int]
    READ_FAILURES_FIELD_NUMBER: _ClassVar[int]
    disk_bytes_per_second: float
    copy_bytes_per_second: float
    read_block_bytes: int
    read_depth: int
    copied: int
    computed_in_place: int
    demoted: int
    forgotten: int
    demotion_reuse: float
    read_retries: int
    checksum_mismatches: int
    buffered_files: int
    host_memory_pinned: bool
    read_failures: int
    def __init__(self, disk_bytes_per_second: _Optional[float] = ..., copy_bytes_per_second: _Optional[float] = ..., read_block_bytes: _Optional[int] = ..., read_depth: _Optional[int] = ..., copied: _Optional[int] = ..., computed_in_place: _Optional[int] = ..., demoted: _Optional[int] = ..., forgotten: _Optional[int] = ..., demotion_reuse: _Optional[float] = ..., read_retries: _Optional[int] = ..., checksum_mismatches: _Optional[int] = ..., buffered_files: _Optional[int] = ..., host_memory_pinned: bool = ..., read_failures: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("running_requests", "waiting_requests", "kv_blocks_used", "kv_blocks_total", "kv_blocks_kept", "preemptions", "prompt_tokens", "cached_tokens", "hopeless_requests", "overdue_requests")
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_KEPT_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HOPELESS_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    OVERDUE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    running_requests: int
    waiting_requests: int
    kv_blocks_used: int
    kv_blocks_total: int
    kv_blocks_kept: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    hopeless_requests: int
    overdue_requests: int
    def __init__(self, running_requests: _Optional[int] = ..., waiting_requests: _Optional[int] = ..., kv_blocks_used: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., kv_blocks_kept: _Optional[int] = ..., preemptions: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., hopeless_requests: _Optional[int] = ..., overdue_requests: _Optional[int] = ...) -> None: ...

class GetServerStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelStatus(_message.Message):
    __slots__ = ("name", "state", "reason", "startup", "memory", "experts", "offload", "load", "engine_restarts")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STARTUP_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    OFFLOAD_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    ENGINE_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: ServerState
    reason: str
    startup: Startup
    memory: Memory
    experts: ExpertCounters
    offload: Offload
    load: Load
    engine_restarts: int
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[ServerState, str]] = ..., reason: _Optional[str] = ..., startup: _Optional[_Union[Startup, _Mapping]] = ..., memory: _Optional[_Union[Memory, _Mapping]] = ..., experts: _Optional[_Union[ExpertCounters, _Mapping]] = ..., offload: _Optional[_Union[Offload, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., engine_restarts: _Optional[int] = ...) -> None: ...

class GetServerStatusResponse(_message.Message):
    __slots__ = ("state", "reason", "version", "model", "startup", "memory", "experts", "load", "uptime", "engine_restarts", "offload", "models")
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STARTUP_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    ENGINE_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    OFFLOAD_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    state: ServerState
    reason: str
    version: str
    model: str
    startup: Startup
    memory: Memory
    experts: ExpertCounters
    load: Load
    uptime: _duration_pb2.Duration
    engine_restarts: int
    offload: Offload
    models: _containers.RepeatedCompositeFieldContainer[ModelStatus]
    def __init__(self, state: _Optional[_Union[ServerState, str]] = ..., reason: _Optional[str] = ..., version: _Optional[str] = ..., model: _Optional[str] = ..., startup: _Optional[_Union[Startup, _Mapping]] = ..., memory: _Optional[_Union[Memory, _Mapping]] = ..., experts: _Optional[_Union[ExpertCounters, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., uptime: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., engine_restarts: _Optional[int] = ..., offload: _Optional[_Union[Offload, _Mapping]] = ..., models: _Optional[_Iterable[_Union[ModelStatus, _Mapping]]] = ...) -> None: ...

class WatchStartupRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class WatchStartupResponse(_message.Message):
    __slots__ = ("model", "state", "reason", "startup")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STARTUP_FIELD_NUMBER: _ClassVar[int]
    model: str
    state: ServerState
    reason: str
    startup: Startup
    def __init__(self, model: _Optional[str] = ..., state: _Optional[_Union[ServerState, str]] = ..., reason: _Optional[str] = ..., startup: _Optional[_Union[Startup, _Mapping]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("wait",)
    WAIT_FIELD_NUMBER: _ClassVar[int]
    wait: _duration_pb2.Duration
    def __init__(self, wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("remaining_requests",)
    REMAINING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    remaining_requests: int
    def __init__(self, remaining_requests: _Optional[int] = ...) -> None: ...

class UndrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UndrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RunWarmupRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class RunWarmupResponse(_message.Message):
    __slots__ = ("model", "experts_done", "experts_total", "experts_left_out", "bytes_done", "bytes_total")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_DONE_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    model: str
    experts_done: int
    experts_total: int
    experts_left_out: int
    bytes_done: int
    bytes_total: int
    def __init__(self, model: _Optional[str] = ..., experts_done: _Optional[int] = ..., experts_total: _Optional[int] = ..., experts_left_out: _Optional[int] = ..., bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ...) -> None: ...

class RecordRequestsRequest(_message.Message):
    __slots__ = ("model", "count")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    model: str
    count: int
    def __init__(self, model: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class RecordRequestsResponse(_message.Message):
    __slots__ = ("line",)
    LINE_FIELD_NUMBER: _ClassVar[int]
    line: str
    def __init__(self, line: _Optional[str] = ...) -> None: ...
