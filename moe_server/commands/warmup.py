"""`moe-server warmup`: for deployments; succeeds only on proof that a server keeps its limits."""

import asyncio
import json
import os
import secrets
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import grpc
import structlog

from moe_server.client import Client, UnreachableError
from moe_server.commands.finite import POSITIVE, SECONDS
from moe_server.commands.record import record
from moe_server.commands.startup import NotReadyError, state_name, wait_ready
from moe_server.config import WarmupConfig
from moe_server.errors import MoeServerError, Reason
from moe_server.proto.moe_server.v1 import admin_pb2, model_pb2
from moe_server.warmup.junit import junit_xml
from moe_server.warmup.limits import Limits
from moe_server.warmup.probe import Probe, ProbeShape, send_probe

__all__ = ["LimitMissedError", "NotReadyError", "warmup"]

log = structlog.get_logger(__name__)

NUM_PROBES = 3
PROBE_AT_LEAST_S = 10.0
"""That a probe may take, however short the wait for READY."""


class LimitMissedError(MoeServerError):
    """A probe took longer than allowed."""


@click.group(
    invoke_without_command=True,
    epilog="Example: moe-server warmup --target 127.0.0.1:50051 --max-ttft-ms 500 --timeout 900 "
    "--report warmup.json",
)
@click.option("--target", metavar="HOST:PORT", help="Required.")
@click.option(
    "--max-ttft-ms",
    type=POSITIVE,
    metavar="N",
    help="Longest time to first token a probe may take; unset: what the server holds itself to.",
)
@click.option(
    "--timeout",
    type=SECONDS,
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for READY; each probe may take as long again, or 10 s.",
)
@click.option(
    "--report", type=click.Path(path_type=Path, dir_okay=False), help="Write a JSON report here."
)
@click.option(
    "--junit",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write it as JUnit's XML here: a case for each stage and probe.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report to stdout.")
@click.pass_context
def warmup(
    ctx: click.Context,
    target: str | None,
    max_ttft_ms: float | None,
    timeout: float,
    report: Path | None,
    junit: Path | None,
    *,
    as_json: bool,
) -> None:
    """Wait until a server is READY, then prove it with real requests of our own.

    Exits with 0 only if all its models became ready within --timeout seconds and every probe, three
    to each model, kept the limit; otherwise with 2: wrong usage, or a file cannot be written;
    3: no server there; 4: not ready in time, failed, or a probe got no answer; 5: a probe missed
    the limit.
    """
    if ctx.invoked_subcommand is not None:
        return
    if target is None:
        raise click.MissingParameter(ctx=ctx, param_hint="'--target'", param_type="option")
    findings: dict[str, Any] = {
        "target": target,
        "passed": False,
        "error": "",
        "state": "unreachable",
        "ready": False,
        "startup_s": 0.0,
        "models": [],
        "degraded": {},
        "stages": [],
        "probes_per_model": NUM_PROBES,
        "max_ttft_ms": max_ttft_ms,
        "probes": [],
    }
    partials = _reserve_all(report, junit)
    try:
        _prove(target, max_ttft_ms, timeout, findings)
        findings["passed"] = True
    except MoeServerError as error:
        findings["error"] = str(error)
        raise
    finally:
        text = json.dumps(findings, indent=2)
        if as_json:
            click.echo(text)
        with ExitStack() as writing:  # the second one also where the first one cannot be written
            for file, content in ((report, text), (junit, junit_xml(findings))):
                if file is not None:
                    writing.callback(_write, partials[file], file, content)


warmup.add_command(record)


def _prove(
    target: str, max_ttft_ms: float | None, timeout_s: float, findings: dict[str, Any]
) -> None:
    with Client(target) as client:
        try:
            status = wait_ready(client, timeout_s, lambda status: _note_start(status, findings))
        except UnreachableError:
            findings["state"] = "unreachable"
            raise
        models = client.models()
    findings["ready"] = True
    own = {model.name: model.startup for model in status.models}
    for model in models:
        limit_ms = max_ttft_ms
        if limit_ms is None and own[model.name].HasField("max_ttft"):
            limit_ms = own[model.name].max_ttft.ToNanoseconds() / 1e6
        limits = Limits() if limit_ms is None else Limits(max_ttft_ms=limit_ms)
        _prove_model(target, model, limits, timeout_s, findings)


def _note_start(status: admin_pb2.GetServerStatusResponse, findings: dict[str, Any]) -> None:
    findings["state"] = state_name(status.state)
    findings["model"] = status.model
    findings["models"] = [model.name for model in status.models]
    findings["degraded"] = {
        model.name: model.startup.degraded for model in status.models if model.startup.degraded
    }
    findings["startup_s"] = max(
        model.startup.elapsed.ToNanoseconds() / 1e9 for model in status.models
    )
    findings["stages"] = [
        {
            "model": model.name,
            "name": stage.name,
            "state": admin_pb2.StageState.Name(stage.state).removeprefix("STAGE_STATE_").lower(),
            "attempts": stage.attempts,
            "seconds": stage.elapsed.ToNanoseconds() / 1e9,
            "bytes": stage.bytes_done,
            "failure": stage.failure,
        }
        for model in status.models
        for stage in model.startup.stages
    ]


def _prove_model(
    target: str,
    model: model_pb2.Model,
    limits: Limits,
    timeout_s: float,
    findings: dict[str, Any],
) -> None:
    defaults = WarmupConfig()
    shape = ProbeShape.fitting(
        defaults.prompt_tokens,
        defaults.new_tokens,
        model=model.name,
        vocab_size=model.vocab_size,
        max_request_tokens=model.max_context_tokens,
    )
    for index in range(1, NUM_PROBES + 1):
        probe = asyncio.run(_probe(target, shape, max(timeout_s, PROBE_AT_LEAST_S)))
        missed = limits.missed(probe)
        findings["probes"].append(
            {"model": model.name, "index": index, **asdict(probe), "missed": missed}
        )
        log.info(
            "probe",
            model=model.name,
            index=index,
            of=NUM_PROBES,
            ttft_ms=round(1000 * probe.ttft_s, 2),
        )
        if missed:
            raise LimitMissedError(
                f"Probe {index} of {NUM_PROBES} of model {model.name!r}: {missed}.",
                "Give the server more memory, or raise --max-ttft-ms.",
            )


async def _probe(target: str, shape: ProbeShape, timeout_s: float) -> Probe:
    async with grpc.aio.insecure_channel(target) as channel:
        try:
            # Connecting is no part of a request's time to first token.
            await asyncio.wait_for(channel.channel_ready(), timeout_s)
            # A fresh seed: a prompt that was sent before could find its experts cached.
            return await send_probe(channel, shape, secrets.randbits(32), timeout_s=timeout_s)
        except TimeoutError:
            raise UnreachableError(
                f"{target} was lost after it had become ready.", reason=Reason.UNAVAILABLE
            ) from None
        except grpc.aio.AioRpcError as error:
            raise NotReadyError(
                f"A probe failed with {error.code().name}: {error.details()}",
                reason=Reason.UNAVAILABLE,
            ) from None


def _reserve_all(*files: Path | None) -> dict[Path, Path]:
    partials: dict[Path, Path] = {}
    try:
        for file in files:
            if file in partials:
                raise MoeServerError(
                    f"--report and --junit name the same file, {file}.", "Give them two."
                )
            if file is not None:
                partials[file] = _reserve(file)
    except MoeServerError:
        for file, partial in partials.items():
            if partial != file:
                partial.unlink(missing_ok=True)
        raise
    return partials


def _reserve(report: Path) -> Path:
    """A file beside the report to write it into: a path that cannot be is refused before probing.

    A device or pipe is its own.
    """
    if report.exists() and not report.is_file():
        return report
    partial = report.with_name(f".{report.name}.{os.getpid()}")
    try:
        partial.touch()
    except OSError as error:
        raise _unwritable(report, error) from None
    return partial


def _write(partial: Path, report: Path, text: str) -> None:
    try:
        partial.write_text(f"{text}\n", encoding="utf-8")
        if partial != report:
            partial.replace(report)
    except OSError as error:
        if partial != report:
            partial.unlink(missing_ok=True)
        raise _unwritable(report, error) from None


def _unwritable(report: Path, error: OSError) -> MoeServerError:
    return MoeServerError(
        f"Cannot write the report {report}: {error.strerror}.",
        "Give --report and --junit paths that can be written.",
        field="report",
    )
