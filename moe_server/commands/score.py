"""`moe-server score` and `classify`: how likely given texts are after another one."""

import json

import click
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from moe_server.client import Client
from moe_server.commands.finite import POSITIVE_SECONDS
from moe_server.commands.format import print_table
from moe_server.commands.text import checked

TARGET = click.option("--target", default="127.0.0.1:50051", show_default=True, metavar="HOST:PORT")
MODEL = click.option("--model", default="", metavar="NAME", help="Default: the server's first.")
TIMEOUT = click.option(
    "--timeout", type=POSITIVE_SECONDS, metavar="SECONDS", help="The request's deadline."
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print the response as JSON.")


@click.command(epilog="Example: moe-server score 'The sky is' ' blue' ' green'")
@click.argument("text")
@click.argument("continuations", nargs=-1, required=True)
@TARGET
@MODEL
@TIMEOUT
@AS_JSON
def score(
    text: str,
    continuations: tuple[str, ...],
    target: str,
    model: str,
    timeout: float | None,
    *,
    as_json: bool,
) -> None:
    """Print the log-likelihood of each of CONTINUATIONS after TEXT.

    Each is taken as it is written: most begin with a space.
    """
    with Client(target) as client:
        response = client.score(
            checked(text, "TEXT"),
            [checked(continuation, "A continuation") for continuation in continuations],
            model=model,
            timeout_s=timeout,
        )
    if as_json:
        _print_json(response)
        return
    rows = [
        (
            repr(continuation),
            f"{found.logprob:10.4f}  {found.num_tokens} tokens{'  greedy' * found.is_greedy}",
        )
        for continuation, found in zip(continuations, response.scores, strict=True)
    ]
    print_table(rows, to_stdout=True)


@click.command(
    epilog="Example: moe-server classify 'Review: I slept well. It was' ' good' ' bad' "
    "--content-free 'Review: N/A. It was'"
)
@click.argument("text")
@click.argument("labels", nargs=-1, required=True)
@click.option("--per-token", is_flag=True, help="Compare log-likelihoods per token.")
@click.option(
    "--content-free",
    multiple=True,
    metavar="TEXT",
    help="TEXT without its content, to calibrate with; repeatable.",
)
@TARGET
@MODEL
@TIMEOUT
@AS_JSON
def classify(
    text: str,
    labels: tuple[str, ...],
    content_free: tuple[str, ...],
    target: str,
    model: str,
    timeout: float | None,
    *,
    per_token: bool,
    as_json: bool,
) -> None:
    """Print the probability of each of LABELS after TEXT.

    Each is taken as it is written: most begin with a space.
    """
    with Client(target) as client:
        response = client.classify(
            checked(text, "TEXT"),
            [checked(label, "A label") for label in labels],
            model=model,
            normalizes_length=per_token,
            content_free_prompts=[checked(one, "--content-free") for one in content_free],
            timeout_s=timeout,
        )
    if as_json:
        _print_json(response)
        return
    likely_first = sorted(response.labels, key=lambda found: -found.probability)
    print_table(
        [(repr(found.label), f"{found.probability:.4f}") for found in likely_first], to_stdout=True
    )


def _print_json(response: Message) -> None:
    fields = MessageToDict(
        response, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    click.echo(json.dumps(fields))
