"""Metrics for Prometheus over HTTP, from the front door only.

Holds what is counted (`request_metrics`), what is read at a scrape (`status_metrics`) and facts
about this process; serves them on a thread of its own, so that a slow scraper holds up no request.
`server` makes one, whether or not anybody is to read it.
"""

import asyncio
import threading
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

from moe_server.errors import MoeServerError
from moe_server.service.registry import Registry
from moe_server.service.request_metrics import RequestMetrics
from moe_server.service.status_metrics import StatusCollector


class Metrics:
    """A server's metrics. `listen`, then `close`."""

    def __init__(self, models: Registry) -> None:
        self._collectors = CollectorRegistry()
        self._collectors.register(StatusCollector(models))
        ProcessCollector(registry=self._collectors)
        self.requests = RequestMetrics(self._collectors)
        self._http: tuple[WSGIServer, threading.Thread] | None = None

    def listen(self, address: str) -> str:
        """Answers `GET /metrics` from here on; returns the address with its port.

        Raises:
            MoeServerError: The address cannot be listened at.
        """
        host, _, port = address.rpartition(":")
        try:
            self._http = start_http_server(int(port), host.strip("[]"), self._collectors)
        except OSError as error:
            raise MoeServerError(
                f"Cannot listen on {address!r} for metrics: {error.strerror or error}.",
                "Set metrics_listen to HOST:PORT with a free port, or port 0 for any.",
                field="metrics_listen",
            ) from None
        return f"{host}:{self._http[0].server_port}"

    async def close(self) -> None:
        """Answers no more."""
        if self._http is not None:
            (server, _), self._http = self._http, None
            # It waits for the thread's next look at its socket, half a second at most.
            await asyncio.to_thread(server.shutdown)
            server.server_close()
