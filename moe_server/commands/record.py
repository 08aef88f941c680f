"""`moe-server warmup record`: real requests into a file that a start can send again."""

from pathlib import Path

import click

from moe_server.client import Client
from moe_server.commands.finite import SECONDS
from moe_server.errors import MoeServerError, Reason
from moe_server.warmup.recorded import MAX_REQUESTS


@click.command(
    epilog="Example: moe-server warmup record --target 127.0.0.1:50051 --count 50 --out "
    "requests.jsonl"
)
@click.option("--target", required=True, metavar="HOST:PORT")
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--count",
    type=click.IntRange(1, MAX_REQUESTS),
    default=50,
    show_default=True,
    help="Requests to record.",
)
@click.option("--model", default="", help="Only those to this model; default: the first one.")
@click.option(
    "--timeout",
    type=SECONDS,
    default=3600.0,
    show_default=True,
    metavar="SECONDS",
    help="End after so long with what has come.",
)
def record(target: str, out: Path, count: int, model: str, timeout: float) -> None:
    """Record real requests as they come; `warmup.requests` has them sent again at a start.

    The server's configuration has to consent: with warmup.recording = "shapes" lengths and sampling
    are recorded and no words, with "text" the requests themselves. Ctrl-C ends it and keeps what
    has come.
    """
    try:
        file = out.open("x", encoding="utf-8")
    except FileExistsError:
        raise MoeServerError(f"{out} exists.", "Name a new file.", field="out") from None
    except OSError as error:
        raise _unwritable(out, error) from None
    recorded = 0
    try:
        with file, Client(target) as client:
            out.chmod(0o600)
            for line in client.record_requests(model, count, timeout):
                file.write(f"{line}\n")
                file.flush()
                recorded += 1
    except OSError as error:
        raise _unwritable(out, error) from None
    finally:
        if recorded:
            click.echo(f"recorded {recorded} of {count} requests: {out}")
        else:
            out.unlink(missing_ok=True)
    if not recorded:
        raise MoeServerError(
            f"No request came within {timeout:g} s.",
            "Record while there is traffic.",
            reason=Reason.UNAVAILABLE,
        )


def _unwritable(out: Path, error: OSError) -> MoeServerError:
    return MoeServerError(
        f"Cannot write {out}: {error.strerror}.", "Name a file that can be written.", field="out"
    )
