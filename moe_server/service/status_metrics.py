"""What supervisors and engines say about themselves, as metrics read at the moment of a scrape.

The same objects that the admin service answers from, so that nothing is counted twice. Counters of
an engine begin at 0 again with its next life, as Prometheus expects of a restart. Read on the
thread of the HTTP server: facts are replaced whole there, never changed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moe_server import __version__
from moe_server.service.registry import Registry
from moe_server.service.running_model import RunningModel
from moe_server.startup import Startup
from moe_server.state import ServerState
from moe_server.warmup.stages import STAGES


class Named(Protocol):
    """A model, or its start."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)
Read = Callable[[T], float | None]
"""None: there is nothing to tell now, and no sample."""


@dataclass(frozen=True, slots=True)
class Family(Generic[T]):
    """One metric: a sample for each model, or for each model and value of `label`."""

    kind: type[GaugeMetricFamily | CounterMetricFamily]
    name: str
    help: str
    label: str
    reads: dict[str, Read[T]]

    def collect(self, models: Sequence[T]) -> Metric:
        """Its samples now."""
        labels = ["model", self.label] if self.label else ["model"]
        metric = self.kind(f"moe_server_{self.name}", self.help, labels=labels)
        for model in models:
            for value, read in self.reads.items():
                amount = read(model)
                if amount is not None:
                    metric.add_metric([model.name, value] if self.label else [model.name], amount)
        return metric


def gauge(name: str, help_text: str, read: Read[T]) -> Family[T]:
    """A number that goes up and down."""
    return Family(GaugeMetricFamily, name, help_text, "", {"": read})


def gauges(name: str, help_text: str, label: str, reads: dict[str, Read[T]]) -> Family[T]:
    """One for each value of a label."""
    return Family(GaugeMetricFamily, name, help_text, label, reads)


def counter(name: str, help_text: str, read: Read[T]) -> Family[T]:
    """A number that grows; its name gets `_total`."""
    return Family(CounterMetricFamily, name, help_text, "", {"": read})


def counters(name: str, help_text: str, label: str, reads: dict[str, Read[T]]) -> Family[T]:
    """One for each value of a label."""
    return Family(CounterMetricFamily, name, help_text, label, reads)


def _is_in(state: ServerState) -> Read[Startup]:
    return lambda startup: startup.state is state


def _last_probe_ttft(running: RunningModel) -> float | None:
    probes = running.warm_up.probes
    return probes[-1].ttft_s if probes else None


def _last_probe_tpot(running: RunningModel) -> float | None:
    probes = running.warm_up.probes
    return probes[-1].tpot_s if probes else None


OF_STARTS: tuple[Family[Startup], ...] = (
    gauges(
        "state",
        "1 for the state the model is in, 0 for all others.",
        "state",
        {state.value: _is_in(state) for state in ServerState},
    ),
    gauge(
        "startup_seconds",
        "From the process's start to the first READY, or until now.",
        lambda s: s.stages.elapsed_s,
    ),
    gauge(
        "startup_stage",
        "The stage of the start in progress, from 1; 0: none.",
        lambda s: s.stages.position,
    ),
    gauge("startup_stages", "Stages of a start.", lambda _: len(STAGES)),
    gauge(
        "startup_done_bytes",
        "Bytes that the stage in progress has read.",
        lambda s: stage.bytes_done if (stage := s.stages.running) else 0,
    ),
    gauge(
        "startup_size_bytes",
        "Bytes that the stage in progress reads in all.",
        lambda s: stage.bytes_total if (stage := s.stages.running) else 0,
    ),
    gauge(
        "startup_bytes_per_second",
        "What the stage in progress reads, over the last seconds.",
        lambda s: s.stages.bytes_per_s,
    ),
    gauge(
        "startup_remaining_seconds",
        "Until the stage in progress has its bytes, at that rate; absent: unknown.",
        lambda s: s.stages.eta_s,
    ),
)
"""Told from the first moment on."""

OF_MODELS: tuple[Family[RunningModel], ...] = (
    gauge(
        "probe_time_to_first_token_seconds",
        "Of the warm-up's last probe, measured through gRPC.",
        _last_probe_ttft,
    ),
    gauge(
        "probe_time_per_output_token_seconds",
        "Of the warm-up's last probe, measured through gRPC.",
        _last_probe_tpot,
    ),
    counter(
        "engine_restarts",
        "Engines that were started in the place of one that was lost.",
        lambda m: m.supervisor.num_restarts,
    ),
    gauge("requests_running", "Requests in the batch.", lambda m: m.supervisor.load.running),
    gauge(
        "requests_waiting",
        "Requests that wait for a place in the batch.",
        lambda m: m.supervisor.load.waiting,
    ),
    gauge(
        "requests_open",
        "Requests that hold a place in the front door, running and waiting ones included.",
        lambda m: m.supervisor.num_open_requests,
    ),
    gauges(
        "kv_blocks",
        "Blocks of the KV cache: in use, holding the beginning of an earlier prompt, in all.",
        "kind",
        {
            "used": lambda m: m.supervisor.load.blocks_used,
            "kept": lambda m: m.supervisor.load.blocks_kept,
            "all": lambda m: m.supervisor.load.blocks_total,
        },
    ),
    counter(
        "preemptions",
        "Times that a running request lost its KV blocks to another one.",
        lambda m: m.supervisor.load.preemptions,
    ),
    counter(
        "deadline_refusals",
        "Requests refused because they could not make their deadline.",
        lambda m: m.supervisor.load.hopeless,
    ),
    counter(
        "wait_refusals",
        "Requests refused because they waited for longer than scheduler.max_wait_s, or would have.",
        lambda m: m.supervisor.load.overdue,
    ),
    counter(
        "prompt_tokens",
        "Tokens of prompts that were accepted.",
        lambda m: m.supervisor.load.prompt_tokens,
    ),
    counter(
        "cached_prompt_tokens",
        "Those of them that an earlier prompt's computation stood for.",
        lambda m: m.supervisor.load.cached_tokens,
    ),
    counters(
        "expert_lookups",
        "Experts that steps needed, by the tier where they were.",
        "tier",
        {
            "device": lambda m: m.supervisor.load.experts.device_hits,
            "host": lambda m: m.supervisor.load.experts.host_hits,
            "disk": lambda m: m.supervisor.load.experts.disk_reads,
        },
    ),
    counter(
        "expert_read_bytes",
        "Bytes of experts read from disk.",
        lambda m: m.supervisor.load.experts.read_bytes,
    ),
    counter(
        "expert_transfer_bytes",
        "Bytes of experts copied from host memory to the device.",
        lambda m: m.supervisor.load.experts.transfer_bytes,
    ),
    counter(
        "expert_prefetches",
        "Experts read ahead of need.",
        lambda m: m.supervisor.load.experts.prefetches,
    ),
    counter(
        "expert_prefetch_hits",
        "Experts read ahead of need that were needed.",
        lambda m: m.supervisor.load.experts.prefetch_hits,
    ),
    gauge(
        "disk_bytes_per_second",
        "The disk's speed as the engine measures it.",
        lambda m: m.supervisor.load.offload.disk_bytes_per_second,
    ),
    counter(
        "disk_read_retries",
        "Reads that failed and were repeated.",
        lambda m: m.supervisor.load.offload.read_retries,
    ),
    counter(
        "disk_checksum_mismatches",
        "Reads that brought something else than was written.",
        lambda m: m.supervisor.load.offload.checksum_mismatches,
    ),
    counter(
        "disk_read_failures",
        "Reads that failed however often they were repeated.",
        lambda m: m.supervisor.load.offload.read_failures,
    ),
    gauge(
        "expert_slots",
        "Experts that the device has room for.",
        lambda m: m.model.memory.num_slots,
    ),
    gauges(
        "memory_planned_bytes",
        "How the budgets are divided, by purpose.",
        "purpose",
        {
            "dense": lambda m: m.model.memory.dense_bytes,
            "kv": lambda m: m.model.memory.kv_bytes,
            "workspace": lambda m: m.model.memory.workspace_bytes,
            "expert_slots": lambda m: m.model.memory.slots_bytes,
            "host_records": lambda m: m.model.memory.records_bytes,
            "runtime": lambda m: m.model.memory.runtime_bytes,
        },
    ),
    gauge(
        "requests_waiting_limit",
        "Requests that may wait: scheduler.max_waiting.",
        lambda m: m.config.scheduler.max_waiting,
    ),
    gauge(
        "time_to_first_token_limit_seconds",
        "What probes may take; absent: any.",
        lambda m: _seconds(m.warm_up.limits.max_ttft_ms),
    ),
    gauge(
        "time_per_output_token_limit_seconds",
        "What probes may take; absent: any.",
        lambda m: _seconds(m.warm_up.limits.max_tpot_ms),
    ),
    gauge(
        "degraded",
        "1: READY although the proof missed a limit (warmup.if_missed is serve).",
        lambda m: bool(m.degraded),
    ),
)


def _seconds(milliseconds: float) -> float | None:
    return milliseconds / 1000 if math.isfinite(milliseconds) else None


class StatusCollector(Collector):
    """All families of all models of a registry, and the server's version."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """Called at every scrape."""
        build = GaugeMetricFamily("moe_server_build_info", "1.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        for of_start in OF_STARTS:
            yield of_start.collect(self._registry.startups)
        for of_model in OF_MODELS:
            yield of_model.collect(list(self._registry))
