"""`moe-server status`, `drain` and `undrain`: what an operator asks of a running server."""

import json

import click
from google.protobuf.json_format import MessageToDict

from moe_server.client import Client
from moe_server.commands.finite import SECONDS
from moe_server.commands.format import format_bytes, format_seconds, print_table
from moe_server.commands.startup import state_name
from moe_server.proto.moe_server.v1 import admin_pb2 as pb

TARGET = click.option("--target", default="127.0.0.1:50051", show_default=True, metavar="HOST:PORT")


@click.command(epilog="Example: moe-server status --target 10.0.0.7:50051 --json")
@TARGET
@click.option("--json", "as_json", is_flag=True, help="Print GetServerStatusResponse as JSON.")
def status(target: str, *, as_json: bool) -> None:
    """Show state, memory and load of a running server."""
    with Client(target) as client:
        response = client.status()
    if as_json:
        fields = MessageToDict(
            response, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        click.echo(json.dumps(fields))
        return
    print_table(_rows(response), to_stdout=True)


@click.command(epilog="Example: moe-server drain --wait 60")
@TARGET
@click.option(
    "--wait",
    type=SECONDS,
    default=0.0,
    metavar="SECONDS",
    help="Wait this long for accepted requests to finish.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def drain(target: str, wait: float, *, as_json: bool) -> None:
    """Make a server refuse new requests; `moe-server undrain` ends it.

    Taken from the same machine, or on the server's admin listener.
    """
    with Client(target) as client:
        remaining = client.drain(wait)
    click.echo(
        json.dumps({"remaining_requests": remaining})
        if as_json
        else f"draining; requests still running: {remaining}"
    )


@click.command(epilog="Example: moe-server undrain")
@TARGET
def undrain(target: str) -> None:
    """Make a drained server accept requests again."""
    with Client(target) as client:
        client.undrain()
    click.echo("accepting requests")


def _rows(response: pb.GetServerStatusResponse) -> list[tuple[str, str]]:
    state = f"{state_name(response.state)}  {response.reason}".rstrip()
    rows = [
        ("state", state),
        ("version", response.version),
        ("uptime", format_seconds(response.uptime.ToNanoseconds() / 1e9)),
    ]
    for model in response.models:
        rows += _model_rows(model)
    return rows


def _limits(model: pb.ModelStatus) -> str:
    if model.state in (pb.SERVER_STATE_STARTING, pb.SERVER_STATE_LOADING):
        return "-"  # what they follow from is not measured yet
    startup = model.startup
    limits = (
        ("first token", "max_ttft", startup.max_ttft),
        ("each further", "max_tpot", startup.max_tpot),
    )
    return ", ".join(
        f"{what} {format_seconds(limit.ToNanoseconds() / 1e9)}"
        if startup.HasField(name)
        else f"{what} any time"
        for what, name, limit in limits
    )


def _stage_rows(stage: pb.Stage) -> list[tuple[str, str]]:
    rows = [(f"  {stage.name}", _stage(stage))]
    return rows + [("    warning", warning) for warning in stage.warnings]


def _stage(stage: pb.Stage) -> str:
    told = [format_seconds(stage.elapsed.ToNanoseconds() / 1e9)]
    if stage.bytes_total:
        told.append(format_bytes(stage.bytes_total))
    if stage.attempts > 1:
        told.append(f"attempt {stage.attempts}")
    if stage.state == pb.STAGE_STATE_RUNNING:
        told.append("in progress")
    if stage.failure:
        told.append(f"failed: {stage.failure}")
    return ", ".join(told)


def _model_rows(model: pb.ModelStatus) -> list[tuple[str, str]]:
    memory, experts, load, offload = model.memory, model.experts, model.load, model.offload
    needed = experts.device_hits + experts.host_hits + experts.disk_reads
    hit_rate = f"{experts.device_hits / needed:.1%}" if needed else "-"
    return [
        ("model", f"{model.name}  {state_name(model.state)}"),
        ("startup", model.startup.stage),
        *([("degraded", model.startup.degraded)] if model.startup.degraded else ()),
        ("limits of probes", _limits(model)),
        *(row for stage in model.startup.stages for row in _stage_rows(stage)),
        ("engine restarts", str(model.engine_restarts)),
        ("requests", f"{load.running_requests} running, {load.waiting_requests} waiting"),
        ("KV blocks", f"{load.kv_blocks_used} of {load.kv_blocks_total}"),
        ("  kept for reuse", str(load.kv_blocks_kept)),
        ("  requests that lost theirs", str(load.preemptions)),
        ("refused for their deadline", str(load.hopeless_requests)),
        ("refused for their wait", str(load.overdue_requests)),
        ("prompt tokens", f"{load.prompt_tokens}, {load.cached_tokens} of them not computed again"),
        ("device budget", format_bytes(memory.device_budget_bytes)),
        ("  dense weights", format_bytes(memory.dense_bytes)),
        ("  KV cache", format_bytes(memory.kv_bytes)),
        ("  workspace", format_bytes(memory.workspace_bytes)),
        ("  expert slots", format_bytes(memory.expert_slots_bytes)),
        ("  room for", f"{memory.expert_slots} of {memory.experts} experts"),
        ("host records", format_bytes(memory.host_records_bytes)),
        ("  room for", f"{memory.host_records} of {memory.experts} experts"),
        ("embedding left on disk", format_bytes(memory.embedding_on_disk_bytes)),
        ("experts found on device", hit_rate),
        ("  in host memory", str(experts.host_hits)),
        ("  on disk", str(experts.disk_reads)),
        ("moved to the device", format_bytes(experts.transfer_bytes)),
        ("read from disk", format_bytes(experts.read_bytes)),
        ("  ahead of need", f"{experts.prefetch_hits} of {experts.prefetches} experts wanted"),
        ("disk", f"{format_bytes(int(offload.disk_bytes_per_second))}/s"),
        ("  reads at once", f"{offload.read_depth} of {format_bytes(offload.read_block_bytes)}"),
        ("  repeated", f"{offload.read_retries} ({offload.checksum_mismatches} wrong checksums)"),
        ("  failed", str(offload.read_failures)),
        (
            "wanted from host memory",
            f"{offload.copied} copied, {offload.computed_in_place} computed in place",
        ),
        (
            "evicted from the device",
            f"{offload.demoted} kept in host memory, {offload.forgotten} forgotten",
        ),
    ]
