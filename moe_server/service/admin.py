"""moe_server.v1.AdminService: what the server is doing, and telling it to stop taking requests.

Anyone who reaches the port may read. Changes are taken from loopback peers, or from anyone on the
admin listener, which is bound where only operators reach it. (A proxy on this machine makes its
callers loopback peers: give it the main listener only after blocking these methods in it.)
"""

import asyncio
import math
from contextlib import aclosing

import msgspec
import structlog

from moe_server.budget import MemoryPlan
from moe_server.errors import MoeServerError, Reason
from moe_server.proto.moe_server.v1 import admin_pb2 as pb
from moe_server.service.errors import PermissionDeniedError
from moe_server.service.generation import to_duration
from moe_server.service.registration import Context
from moe_server.service.registry import Registry
from moe_server.service.running_model import RunningModel
from moe_server.startup import Startup
from moe_server.state import ServerState
from moe_server.warmup.probe import Probe
from moe_server.warmup.recorded import to_line
from moe_server.warmup.stages import STAGES, Stage, StageLog, StageState

log = structlog.get_logger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["AdminService"]
MAX_WAIT_S = 86_400
LOOK_S = 0.2
"""Between two looks at a start that is watched."""
MAX_WATCHERS = 100
SETTLED = (ServerState.READY, ServerState.DRAINING, ServerState.FAILED)
LOOPBACK_PEERS = ("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:")

STATES = {
    ServerState.STARTING: pb.SERVER_STATE_STARTING,
    ServerState.LOADING: pb.SERVER_STATE_LOADING,
    ServerState.WARMING: pb.SERVER_STATE_WARMING,
    ServerState.READY: pb.SERVER_STATE_READY,
    ServerState.DRAINING: pb.SERVER_STATE_DRAINING,
    ServerState.FAILED: pb.SERVER_STATE_FAILED,
}


STAGE_STATES = {
    StageState.RUNNING: pb.STAGE_STATE_RUNNING,
    StageState.DONE: pb.STAGE_STATE_DONE,
    StageState.FAILED: pb.STAGE_STATE_FAILED,
}


class AdminService:
    """The servicer.

    Args:
        registry: Whose states are told and changed.
        version: Of the server.
        trusts_all_peers: True on the admin listener.
    """

    def __init__(self, registry: Registry, version: str, *, trusts_all_peers: bool) -> None:
        self._registry = registry
        self._version = version
        self._trusts_all_peers = trusts_all_peers
        self._num_watchers = 0

    async def GetServerStatus(  # noqa: N802  # named by the protocol
        self, _request: pb.GetServerStatusRequest, _context: Context
    ) -> pb.GetServerStatusResponse:
        """Everything an operator asks first."""
        registry = self._registry
        models = [
            _model_status(startup, registry.running(startup)) for startup in registry.startups
        ]
        first = models[0]
        return pb.GetServerStatusResponse(
            state=STATES[self._registry.feed.current],
            reason=self._registry.reason,
            version=self._version,
            model=first.name,
            startup=first.startup,
            memory=first.memory,
            experts=first.experts,
            offload=first.offload,
            load=first.load,
            uptime=to_duration(self._registry.uptime_s),
            engine_restarts=first.engine_restarts,
            models=models,
        )

    async def WatchStartup(  # noqa: N802  # named by the protocol
        self, request: pb.WatchStartupRequest, context: Context
    ) -> None:
        """A start from now to its end, a message for each change."""
        named = self._registry.find_startup(request.model)
        if self._num_watchers >= MAX_WATCHERS:
            raise MoeServerError(
                f"{MAX_WATCHERS} clients watch already.",
                "Ask GetServerStatus now and then.",
                reason=Reason.EXHAUSTED,
            )
        self._num_watchers += 1
        try:
            last = None
            while True:
                startup = named if request.model else self._registry.least_ready
                told = pb.WatchStartupResponse(
                    model=startup.name,
                    state=STATES[startup.state],
                    reason=startup.reason,
                    startup=_startup(startup, self._registry.running(startup)),
                )
                news = _without_clocks(told)
                if news != last:
                    await context.write(told)
                last = news
                if startup.state in SETTLED:
                    return
                await asyncio.sleep(LOOK_S)
        finally:
            self._num_watchers -= 1

    async def Drain(  # noqa: N802  # named by the protocol
        self, request: pb.DrainRequest, context: Context
    ) -> pb.DrainResponse:
        """Refuses new requests; waits for the accepted ones as long as the caller says."""
        self._refuse_strangers(context)
        wait_s = request.wait.ToNanoseconds() / 1e9
        if not 0 <= wait_s <= MAX_WAIT_S:
            raise MoeServerError(
                f"wait is {wait_s:g} s; expected 0 to {MAX_WAIT_S} (a day).", field="wait"
            )
        log.info("drain", peer=context.peer(), wait_s=wait_s)
        return pb.DrainResponse(remaining_requests=await self._registry.drain(wait_s))

    async def Undrain(  # noqa: N802  # named by the protocol
        self, _request: pb.UndrainRequest, context: Context
    ) -> pb.UndrainResponse:
        """Ends a drain."""
        self._refuse_strangers(context)
        log.info("undrain", peer=context.peer())
        self._registry.undrain()
        return pb.UndrainResponse()

    async def RunWarmup(  # noqa: N802  # named by the protocol
        self, request: pb.RunWarmupRequest, context: Context
    ) -> None:
        """Rewarms a live model."""
        self._refuse_strangers(context)
        running = self._registry.find(request.model)
        if running.supervisor.state is not ServerState.READY:
            raise MoeServerError(
                f"Model {running.name!r} is {running.supervisor.state.value}.",
                "Try again when it is ready.",
                reason=Reason.UNAVAILABLE,
            )
        log.info("rewarming", peer=context.peer(), model=running.name)
        told = pb.RunWarmupResponse(model=running.name)
        async with aclosing(running.supervisor.rewarm()) as rewarming:
            async for progress in rewarming:
                told.experts_done = progress.experts_done
                told.experts_total = progress.experts_total
                told.experts_left_out = progress.experts_left_out
                told.bytes_done = progress.bytes_done
                told.bytes_total = progress.bytes_total
                await context.write(told)
        log.info(
            "rewarmed",
            model=running.name,
            experts=told.experts_done,
            left_out=told.experts_left_out,
        )

    async def RecordRequests(  # noqa: N802  # named by the protocol
        self, request: pb.RecordRequestsRequest, context: Context
    ) -> None:
        """Real requests, where the configuration lets them be recorded."""
        self._refuse_strangers(context)
        running = self._registry.find(request.model)
        if request.count < 1:
            raise MoeServerError("count is 0; expected at least 1.", field="count")
        log.info("recording requests", peer=context.peer(), model=running.name)
        with running.recorder.listen() as unread:
            # The caller knows that it misses none from here on.
            await context.send_initial_metadata(())
            for _ in range(request.count):
                await context.write(pb.RecordRequestsResponse(line=to_line(await unread.get())))

    def _refuse_strangers(self, context: Context) -> None:
        peer: str = context.peer()
        if not self._trusts_all_peers and not peer.startswith(LOOPBACK_PEERS):
            raise PermissionDeniedError(
                f"Peer {peer} may not change this server.",
                "Call from the same machine, or set admin_listen and call there.",
            )


def _model_status(startup: Startup, running: RunningModel | None) -> pb.ModelStatus:
    """Without a running model only how its start is."""
    status = pb.ModelStatus(
        name=startup.name,
        state=STATES[startup.state],
        reason=startup.reason,
        startup=_startup(startup, running),
    )
    if running is None:
        return status
    load = running.supervisor.load
    status.MergeFrom(
        pb.ModelStatus(
            memory=_memory(running.model.memory),
            experts=pb.ExpertCounters(**msgspec.structs.asdict(load.experts)),
            offload=pb.Offload(**msgspec.structs.asdict(load.offload)),
            load=pb.Load(
                running_requests=load.running,
                waiting_requests=load.waiting,
                kv_blocks_used=load.blocks_used,
                kv_blocks_total=load.blocks_total,
                kv_blocks_kept=load.blocks_kept,
                preemptions=load.preemptions,
                prompt_tokens=load.prompt_tokens,
                cached_tokens=load.cached_tokens,
                hopeless_requests=load.hopeless,
                overdue_requests=load.overdue,
            ),
            engine_restarts=running.supervisor.num_restarts,
        )
    )
    return status


def _startup(startup: Startup, running: RunningModel | None) -> pb.Startup:
    log = startup.stages
    stage, eta_s = log.running, log.eta_s
    told = pb.Startup(
        stage=log.doing,
        stage_index=log.position,
        stage_count=len(STAGES),
        bytes_done=stage.bytes_done if stage else 0,
        bytes_total=stage.bytes_total if stage else 0,
        elapsed=to_duration(log.elapsed_s),
        bytes_per_second=log.bytes_per_s,
        eta=None if eta_s is None else to_duration(eta_s),
        stages=[_stage(one, log) for one in log.stages],
    )
    if running is not None:
        warm_up = running.warm_up
        told.probes.extend(map(_probe, warm_up.probes))
        told.degraded = running.degraded
        limits = warm_up.limits
        if math.isfinite(limits.max_ttft_ms):
            told.max_ttft.CopyFrom(to_duration(limits.max_ttft_ms / 1000))
        if math.isfinite(limits.max_tpot_ms):
            told.max_tpot.CopyFrom(to_duration(limits.max_tpot_ms / 1000))
    return told


def _without_clocks(told: pb.WatchStartupResponse) -> pb.WatchStartupResponse:
    """What makes a message worth sending: it does not change by time passing alone."""
    kept = pb.WatchStartupResponse()
    kept.CopyFrom(told)
    for name in ("elapsed", "bytes_per_second", "eta"):
        kept.startup.ClearField(name)
    for stage in kept.startup.stages:
        stage.ClearField("elapsed")
    return kept


def _stage(stage: Stage, log: StageLog) -> pb.Stage:
    return pb.Stage(
        name=stage.name,
        state=STAGE_STATES[stage.state],
        attempts=stage.attempts,
        elapsed=to_duration(log.seconds(stage)),
        bytes_done=stage.bytes_done,
        bytes_total=stage.bytes_total,
        failure=stage.failure,
        warnings=stage.warnings,
    )


def _memory(plan: MemoryPlan) -> pb.Memory:
    return pb.Memory(
        device_budget_bytes=plan.device_budget_bytes,
        dense_bytes=plan.dense_bytes,
        kv_bytes=plan.kv_bytes,
        workspace_bytes=plan.workspace_bytes,
        expert_slots_bytes=plan.slots_bytes,
        expert_slots=plan.num_slots,
        host_budget_bytes=plan.host_budget_bytes,
        host_records=plan.num_records,
        host_records_bytes=plan.records_bytes,
        expert_bytes=plan.expert_bytes,
        experts=plan.num_experts_total,
        embedding_on_disk_bytes=plan.embedding_on_disk_bytes,
    )


def _probe(probe: Probe) -> pb.Probe:
    return pb.Probe(
        prompt_tokens=probe.prompt_tokens,
        completion_tokens=probe.completion_tokens,
        ttft=to_duration(probe.ttft_s),
        tpot=to_duration(probe.tpot_s),
    )
