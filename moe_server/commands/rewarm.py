"""`moe-server rewarm`: a live server's experts brought back into memory, beside its requests."""

import click
import structlog

from moe_server.client import Client
from moe_server.commands.format import format_bytes, format_seconds
from moe_server.commands.warmup import LimitMissedError
from moe_server.proto.moe_server.v1 import admin_pb2 as pb

log = structlog.get_logger(__name__)


@click.command(epilog="Example: moe-server rewarm --target 127.0.0.1:50051")
@click.option("--target", default="127.0.0.1:50051", show_default=True, metavar="HOST:PORT")
@click.option("--model", default="", help="Which one; default: the first.")
def rewarm(target: str, model: str) -> None:
    """Bring the experts that were wanted most back into memory, beside running requests.

    After a burst of other traffic, say. Reads come behind those of requests; then probes at the
    lowest priority tell how fast the model is. The server stays ready. Exits with 5 where a probe
    missed the server's limits.
    """
    last = pb.RunWarmupResponse()
    with Client(target) as client:
        for last in client.run_warmup(model):
            log.info(
                "rewarming",
                model=last.model,
                experts=f"{last.experts_done} of {last.experts_total}",
                left_out=last.experts_left_out,
                bytes=format_bytes(last.bytes_done),
            )
    for probe in last.probes:
        ttft, tpot = (one.ToNanoseconds() / 1e9 for one in (probe.ttft, probe.tpot))
        click.echo(f"first token {format_seconds(ttft)}, each further {format_seconds(tpot)}")
    if last.missed:
        raise LimitMissedError(
            f"A probe of model {last.model!r} missed: {last.missed}.",
            "Requests that run meanwhile slow it down; otherwise give the server more memory.",
        )
