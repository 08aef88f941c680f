"""The listeners and everything behind them: ports, services, models.

The port opens first, so that probes and operators are answered while engines load. Called by
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
from moe_server.service import admin, generation, health, models, scoring, tokenizer
from moe_server.service.metrics import Metrics
from moe_server.service.registration import add_service, methods_of
from moe_server.service.registry import Registry
from moe_server.startup import Startup

log = structlog.get_logger(__name__)

MAX_SEND_BYTES = 64 * 2**20
"""A gathered completion with 20 alternatives per token stays far below."""
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
    """One front door. `open` it and start its `models`; then `shut_down`.

    Args:
        config: Resolved.
        startups: Of the models, in the order of the configuration.

    Raises:
        MoeServerError: An address cannot be listened at.
    """

    def __init__(self, config: Config, startups: Sequence[Startup]) -> None:
        self._listeners: list[grpc.aio.Server] = []
        options = (
            *CHANNEL_OPTIONS,
            ("grpc.max_receive_message_length", config.service.max_message_bytes),
        )
        main, self.address = self._listen(config.listen, "listen", options)
        self.admin_address = ""
        probe_secret = secrets.token_hex(16)
        self.models = Registry(
            startups, dialable(self.address), ((generation.PROBE_METADATA_KEY, probe_secret),)
        )
        self._metrics = Metrics(self.models)
        generation_service = generation.GenerationService(
            self.models, probe_secret, self._metrics.requests
        )
        add_service(
            main,
            generation.SERVICE.full_name,
            methods_of(generation_service, generation.SERVICE),
        )
        add_service(
            main,
            models.SERVICE.full_name,
            methods_of(models.ModelService(self.models), models.SERVICE),
        )
        add_service(
            main,
            tokenizer.SERVICE.full_name,
            methods_of(tokenizer.TokenizerService(self.models), tokenizer.SERVICE),
        )
        add_service(
            main,
            scoring.SERVICE.full_name,
            methods_of(
                scoring.ScoringService(self.models, self._metrics.requests), scoring.SERVICE
            ),
        )
        self._add_operator_services(
            main,
            tuple(room.SERVICE.full_name for room in (generation, models, scoring, tokenizer)),
            trusts_all_peers=False,
        )
        if config.admin_listen:
            admin_only, self.admin_address = self._listen(
                config.admin_listen, "admin_listen", options
            )
            self._add_operator_services(admin_only, (), trusts_all_peers=True)
        self.metrics_address = ""
        if config.metrics_listen:
            self.metrics_address = self._metrics.listen(config.metrics_listen)

    async def open(self) -> None:
        """Answers from here on."""
        for listener in self._listeners:
            await listener.start()
        log.info("listening", address=self.address)
        if self.admin_address:
            log.info("listening for operators", address=self.admin_address)
        if self.metrics_address:
            log.info("listening for Prometheus", address=self.metrics_address)

    async def shut_down(self, grace_s: float) -> None:
        """Refuses new requests, lets the accepted ones finish for `grace_s`, ends the engines."""
        remaining = await self.models.drain(grace_s, for_good=True)
        if remaining:
            log.warning("cutting off requests after the grace period", remaining=remaining)
        await self.models.close()
        await asyncio.gather(*(listener.stop(CLOSE_GRACE_S) for listener in self._listeners))
        await self._metrics.close()

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
        other_services: Sequence[str],
        *,
        trusts_all_peers: bool,
    ) -> None:
        admin_service = admin.AdminService(
            self.models, __version__, trusts_all_peers=trusts_all_peers
        )
        add_service(listener, admin.SERVICE.full_name, methods_of(admin_service, admin.SERVICE))
        health_service = health.HealthService(self.models)
        add_service(listener, health.SERVICE_NAME, health_service.methods())
        names = (*other_services, admin.SERVICE.full_name, health.SERVICE_NAME)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), listener)


def dialable(address: str) -> str:
    """The address with which this machine reaches a listener bound to all interfaces."""
    host, _, port = address.rpartition(":")
    wildcards = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104
    return f"{wildcards[host]}:{port}" if host in wildcards else address
