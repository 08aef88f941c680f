"""moe_server.v1.AdminService: what the server is doing, and telling it to stop taking requests.

Anyone who reaches the port may read. Changes are taken from loopback peers, or from anyone on the
admin listener, which is bound where only operators reach it. (A proxy on this machine makes its
callers loopback peers: give it the main listener only after blocking these methods in it.)
"""

import asyncio

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
from moe_server.state import ServerState
from moe_server.warmup.probe import Probe
from moe_server.warmup.stages import Stage, StageLog, StageState

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
        models = [_model_status(running) for running in self._registry]
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
            uptime=to_duration(self._registry.first.supervisor.uptime_s),
            engine_restarts=first.engine_restarts,
            models=models,
        )

    async def WatchStartup(  # noqa: N802  # named by the protocol
        self, request: pb.WatchStartupRequest, context: Context
    ) -> None:
        """A start from now to its end, a message for each change."""
        named = self._registry.find(request.model)
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
                running = named if request.model else self._registry.least_ready
                told = pb.WatchStartupResponse(
                    model=running.name,
                    state=STATES[running.supervisor.state],
                    reason=running.supervisor.reason,
                    startup=_startup(running),
                )
                news = _without_clocks(told)
                if news != last:
                    await context.write(told)
                last = news
                if running.supervisor.state in SETTLED:
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

    def _refuse_strangers(self, context: Context) -> None:
        peer: str = context.peer()
        if not self._trusts_all_peers and not peer.startswith(LOOPBACK_PEERS):
            raise PermissionDeniedError(
                f"Peer {peer} may not change this server.",
                "Call from the same machine, or set admin_listen and call there.",
            )


def _model_status(running: RunningModel) -> pb.ModelStatus:
    supervisor = running.supervisor
    load = supervisor.load
    return pb.ModelStatus(
        name=running.name,
        state=STATES[supervisor.state],
        reason=supervisor.reason,
        startup=_startup(running),
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
        ),
        engine_restarts=supervisor.num_restarts,
    )


def _startup(running: RunningModel) -> pb.Startup:
    supervisor, warm_up = running.supervisor, running.warm_up
    progress, eta_s = supervisor.progress, running.stages.eta_s
    is_proving = supervisor.phase in (ServerState.WARMING, ServerState.READY)
    return pb.Startup(
        stage=warm_up.stage if is_proving else progress.stage,
        stage_index=progress.stage_index,
        stage_count=progress.stage_count,
        bytes_done=progress.bytes_done,
        bytes_total=progress.bytes_total,
        elapsed=to_duration(supervisor.startup_s),
        probes=[_probe(probe) for probe in warm_up.probes],
        bytes_per_second=running.stages.bytes_per_s,
        eta=None if eta_s is None else to_duration(eta_s),
        stages=[_stage(one, running.stages) for one in running.stages.stages],
    )


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
