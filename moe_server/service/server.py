"""The listeners and everything behind them: ports, services, warm-up, engine.

The port opens first, so that probes and operators are answered while the engine loads. Called by
`moe-server serve` and by tests.
"""

import asyncio
import secrets
from collections.abc import Sequence

import grpc
import structlog
from grpc_reflection.v1alpha import reflection

from moe_server import __version__
from moe_server.config import Config
from moe_server.errors import MoeServerError
from moe_server.patience import Patience
from moe_server.service import admin, generation, health, models, scoring, tokenizer
from moe_server.service.prompts import Prompts
from moe_server.service.registration import add_service, methods_of
from moe_server.service.served_model import ServedModel
from moe_server.supervisor import ENGINE_COMMAND, Supervisor
from moe_server.warmup.probe import ProbeShape, WarmUp

log = structlog.get_logger(__name__)

MAX_SEND_BYTES = 64 * 2**20
"""A gathered completion with 20 alternatives per token stays far below."""
MAX_TOKENISING = 2
"""Long prompts tokenised at a time: one of 1 MB takes a core for a second and 100 MB meanwhile."""
CLOSE_GRACE_S = 1.0
"""For RPCs that outlive the drain: watches, and requests past the grace period."""

CHANNEL_OPTIONS = (
    # Otherwise a second server on the same port would start and take half of the connections.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A long prefill sends nothing for minutes, and clients ping meanwhile. The defaults would end
    # their connection with "too_many_pings".
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.max_concurrent_streams", 1_000),
    # A connection that lives for ever keeps a load balancer from moving it.
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", 600_000),
    ("grpc.max_send_message_length", MAX_SEND_BYTES),
)


class Server:
    """One front door. `open` it, then `shut_down`.

    Args:
        config: Resolved.
        model: What is served.
        patience: As in Supervisor.
        engine_command: As in Supervisor.
    """

    def __init__(
        self,
        config: Config,
        model: ServedModel,
        patience: Patience,
        engine_command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self._config = config
        self._listeners: list[grpc.aio.Server] = []
        options = (
            *CHANNEL_OPTIONS,
            ("grpc.max_receive_message_length", config.service.max_message_bytes),
        )
        main, self.address = self._listen(config.listen, "listen", options)
        self.admin_address = ""
        probe_secret = secrets.token_hex(16)
        self.warm_up = WarmUp(
            config.warmup,
            ProbeShape.fitting(
                config.warmup.prompt_tokens,
                config.warmup.new_tokens,
                vocab_size=model.vocab_size,
                max_request_tokens=model.max_request_tokens,
            ),
            target=dialable(self.address),
            batch=min(config.warmup.batch, config.scheduler.max_running),
            metadata=((generation.PROBE_METADATA_KEY, probe_secret),),
        )
        vocabulary = model.vocabulary
        introduction = () if vocabulary is None else (vocabulary,)
        self.supervisor = Supervisor(
            config, self.warm_up.prove, engine_command, patience, introduction
        )
        self._prompts = Prompts(model, MAX_TOKENISING)
        generation_service = generation.GenerationService(
            self.supervisor, model, self._prompts, probe_secret
        )
        self._generation = generation_service
        add_service(
            main,
            generation.SERVICE.full_name,
            methods_of(generation_service, generation.SERVICE),
        )
        add_service(
            main,
            models.SERVICE.full_name,
            methods_of(models.ModelService(model), models.SERVICE),
        )
        add_service(
            main,
            tokenizer.SERVICE.full_name,
            methods_of(tokenizer.TokenizerService(model), tokenizer.SERVICE),
        )
        add_service(
            main,
            scoring.SERVICE.full_name,
            methods_of(
                scoring.ScoringService(self.supervisor, model, self._prompts), scoring.SERVICE
            ),
        )
        self._add_operator_services(
            main,
            model,
            tuple(room.SERVICE.full_name for room in (generation, models, scoring, tokenizer)),
            trusts_all_peers=False,
        )
        if config.admin_listen:
            admin_only, self.admin_address = self._listen(
                config.admin_listen, "admin_listen", options
            )
            self._add_operator_services(admin_only, model, (), trusts_all_peers=True)

    async def open(self) -> None:
        """Answers from here on; loading goes on behind."""
        for listener in self._listeners:
            await listener.start()
        log.info("listening", address=self.address)
        if self.admin_address:
            log.info("listening for operators", address=self.admin_address)
        self.supervisor.start()
        self._prompts.prepare()

    async def shut_down(self, grace_s: float) -> None:
        """Refuses new requests, lets the accepted ones finish for `grace_s`, ends the engine."""
        remaining = await self.supervisor.drain(grace_s, for_good=True)
        if remaining:
            log.warning("cutting off requests after the grace period", remaining=remaining)
        await self.supervisor.stop()
        await self._generation.close()
        await asyncio.gather(*(listener.stop(CLOSE_GRACE_S) for listener in self._listeners))

    def _listen(
        self, address: str, key: str, options: Sequence[tuple[str, int]]
    ) -> tuple[grpc.aio.Server, str]:
        listener = grpc.aio.server(options=options)
        try:
            port = listener.add_insecure_port(address)
        except RuntimeError:
            raise MoeServerError(
                f"Cannot listen on {address!r}: the port is taken or the address is not ours.",
                f"Set {key} to HOST:PORT with a free port, or port 0 for any.",
                field=key,
            ) from None
        self._listeners.append(listener)
        host, separator, _ = address.rpartition(":")
        is_unix = address.startswith("unix")
        return listener, address if is_unix or not separator else f"{host}:{port}"

    def _add_operator_services(
        self,
        listener: grpc.aio.Server,
        model: ServedModel,
        other_services: Sequence[str],
        *,
        trusts_all_peers: bool,
    ) -> None:
        admin_service = admin.AdminService(
            self.supervisor, model, self.warm_up, __version__, trusts_all_peers=trusts_all_peers
        )
        add_service(listener, admin.SERVICE.full_name, methods_of(admin_service, admin.SERVICE))
        health_service = health.HealthService(self.supervisor.feed)
        add_service(listener, health.SERVICE_NAME, health_service.methods())
        names = (*other_services, admin.SERVICE.full_name, health.SERVICE_NAME)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), listener)


def dialable(address: str) -> str:
    """The address with which this machine reaches a listener bound to all interfaces."""
    host, _, port = address.rpartition(":")
    wildcards = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104
    return f"{wildcards[host]}:{port}" if host in wildcards else address
