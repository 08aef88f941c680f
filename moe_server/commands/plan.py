"""`moe-server plan` and `check-config`: what a configuration means, without starting anything."""

import json
from dataclasses import asdict
from typing import Any

import click

from moe_server.budget import available_memory_bytes
from moe_server.commands.config_flags import description, with_config
from moe_server.commands.format import format_bytes, print_table
from moe_server.config import Config, known_keys
from moe_server.planned_models import PlannedModel, plan_models


@click.command(epilog="Example: moe-server plan --model /models/Mixtral-8x7B --device-memory 24GiB")
@with_config
@click.option("--json", "as_json", is_flag=True, help="Print the plan's figures as JSON.")
def plan(config: Config, *, as_json: bool) -> None:
    """Show how the memory budgets would be divided; reads headers only."""
    planned = plan_models(config)
    if as_json:
        figures = [_figures(model) for model in planned]
        # The first model's stand at the top, as with one model.
        available = {"available_memory_bytes": available_memory_bytes()}
        click.echo(json.dumps({**figures[0], "models": figures, **available}))
        return
    rows = [row for model in planned for row in _rows(model)]
    if len(planned) > 1:
        rows.append(("memory of all", format_bytes(sum(model.memory_bytes for model in planned))))
    rows.append(("available here", format_bytes(available_memory_bytes())))
    print_table(rows, to_stdout=True)


def _rows(model: PlannedModel) -> list[tuple[str, str]]:
    checkpoint = model.checkpoint
    return [
        ("model", f"{model.name}: {checkpoint.architecture}, {checkpoint.dtype}"),
        ("experts stored in", checkpoint.stored.experts_text),
        ("dense stored in", "int8" if checkpoint.stored.dense_int8 else checkpoint.dtype),
        ("parameters", f"{checkpoint.num_parameters:,}"),
        *model.plan.table(),
        ("memory in all", format_bytes(model.memory_bytes)),
    ]


def _figures(model: PlannedModel) -> dict[str, Any]:
    plan, checkpoint = model.plan, model.checkpoint
    return {
        **asdict(plan),
        "slots_bytes": plan.slots_bytes,
        "records_bytes": plan.records_bytes,
        "memory_bytes": model.memory_bytes,
        "name": model.name,
        "architecture": checkpoint.architecture,
        **checkpoint.stored.names,
        "num_parameters": checkpoint.num_parameters,
        "num_active_parameters": checkpoint.num_active_parameters,
    }


def _key_help() -> str:
    """Every key with what it does, one paragraph each."""
    sections = {key.partition(".")[0] for key in known_keys() if "." in key}
    keys = sorted(known_keys() - sections)
    return "\n\n".join(f"{key}: {description(key)}" for key in keys)


@click.command(
    help="Print the resolved configuration, or say what is wrong with it.\n\n"
    "Flags win over MOE_SERVER_* environment variables, those over the file. The keys:\n\n"
    f"{_key_help()}",
    epilog="Example: moe-server check-config --config moe-server.toml",
)
@with_config
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check_config(config: Config, *, as_json: bool) -> None:
    """Resolve and print the configuration."""
    resolved = config.model_dump(mode="json")
    if as_json:
        click.echo(json.dumps(resolved))
        return
    print_table(list(_flat(resolved)), to_stdout=True)


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                rows += _flat(item, f"{prefix}{name}[{index}].")
        else:
            rows.append((f"{prefix}{name}", "-" if value is None else str(value)))
    return rows
