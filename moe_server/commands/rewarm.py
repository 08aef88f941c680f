"""`moe-server rewarm`: a live server's experts brought back into memory, beside its requests."""

import click
import structlog

from moe_server.client import Client
from moe_server.commands.format import format_bytes

log = structlog.get_logger(__name__)


@click.command(epilog="Example: moe-server rewarm --target 127.0.0.1:50051")
@click.option("--target", default="127.0.0.1:50051", show_default=True, metavar="HOST:PORT")
@click.option("--model", default="", help="Which one; default: the first.")
def rewarm(target: str, model: str) -> None:
    """Bring the experts that were wanted most back into memory, beside running requests.

    After a burst of other traffic, say. Reads come behind those of requests, and the server stays
    ready.
    """
    with Client(target) as client:
        for told in client.run_warmup(model):
            log.info(
                "rewarming",
                model=told.model,
                experts=f"{told.experts_done} of {told.experts_total}",
                left_out=told.experts_left_out,
                bytes=format_bytes(told.bytes_done),
            )
