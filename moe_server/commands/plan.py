"""`moe-server plan` and `check-config`: what a configuration means, without starting anything."""

import json
from dataclasses import asdict
from typing import Any

import click

from moe_server.budget import plan_memory
from moe_server.checkpoint import read_checkpoint
from moe_server.commands.config_flags import description, with_config
from moe_server.commands.format import print_table
from moe_server.config import Config, known_keys


@click.command(epilog="Example: moe-server plan --model /models/Mixtral-8x7B --device-memory 24GiB")
@with_config
@click.option("--json", "as_json", is_flag=True, help="Print the plan's figures as JSON.")
def plan(config: Config, *, as_json: bool) -> None:
    """Show how the memory budgets would be divided; reads headers only."""
    checkpoint = read_checkpoint(config.model_path)
    memory = plan_memory(config, checkpoint)
    if not as_json:
        print_table(
            [
                ("model", f"{checkpoint.architecture}, {checkpoint.dtype}"),
                ("experts stored in", checkpoint.stored.experts_text),
                ("dense stored in", "int8" if checkpoint.stored.dense_int8 else checkpoint.dtype),
                ("parameters", f"{checkpoint.num_parameters:,}"),
                *memory.table(),
            ],
            to_stdout=True,
        )
        return
    figures = {
        **asdict(memory),
        "slots_bytes": memory.slots_bytes,
        "records_bytes": memory.records_bytes,
        "architecture": checkpoint.architecture,
        **checkpoint.stored.names,
        "num_parameters": checkpoint.num_parameters,
        "num_active_parameters": checkpoint.num_active_parameters,
    }
    click.echo(json.dumps(figures))


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
        else:
            rows.append((f"{prefix}{name}", "-" if value is None else str(value)))
    return rows
