"""The command-line flags that set configuration keys, with their help taken from the keys."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from moe_server.config import Config, Section, load_config

FLAGS = {
    "--model": "model",
    "--model-name": "model_name",
    "--listen": "listen",
    "--admin-listen": "admin_listen",
    "--metrics-listen": "metrics_listen",
    "--device": "device",
    "--device-memory": "device_memory",
    "--host-memory": "host_memory",
    "--max-total-tokens": "max_total_tokens",
    "--expert-format": "expert_format",
    "--dense-backend": "dense_backend",
    "--zero3-config": "zero3_config",
    "--threads": "threads",
    "--max-ttft-ms": "warmup.max_ttft_ms",
    "--hot-set": "warmup.hot_set",
}

Command = TypeVar("Command", bound=Callable[..., Any])


def description(key: str) -> str:
    """What the configuration says about a key, on one line."""
    section: type[Section] = Config
    *outer, name = key.split(".")
    for part in outer:
        annotation = section.model_fields[part].annotation
        assert isinstance(annotation, type), f"{part} is not a section"
        section = annotation
    return " ".join((section.model_fields[name].description or "").split())


def with_config(command: Command) -> Callable[..., Any]:
    """Adds `--config` and the flags, and calls the command with the resolved Config first."""

    @wraps(command)
    def run(*args: Any, config_file: Path | None, **kwargs: Any) -> Any:
        given = {key: kwargs.pop(_parameter(key)) for key in FLAGS.values()}
        flags = {key: value for key, value in given.items() if value is not None}
        return command(load_config(config_file, flags), *args, **kwargs)

    decorated: Callable[..., Any] = run
    for flag, key in reversed(FLAGS.items()):
        decorated = click.option(
            flag, _parameter(key), metavar=_metavar(key), help=description(key)
        )(decorated)
    return click.option(
        "--config",
        "config_file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="A TOML, YAML or JSON file with configuration keys; flags win over it.",
    )(decorated)


def _parameter(key: str) -> str:
    return key.replace(".", "__")


def _metavar(key: str) -> str:
    metavars = {
        "model": "DIR|demo",
        "listen": "HOST:PORT",
        "admin_listen": "HOST:PORT",
        "metrics_listen": "HOST:PORT",
        "device": "cpu|cuda",
        "device_memory": "BYTES|24GiB|min",
        "host_memory": "BYTES|64GiB",
        "dense_backend": "zero3|resident",
        "zero3_config": "FILE",
        "expert_format": "checkpoint|bf16|int8|int4",
        "model_name": "NAME",
        "warmup.hot_set": "FILE|auto|off",
    }
    return metavars.get(key, "N")
