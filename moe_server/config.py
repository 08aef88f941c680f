"""Configuration: frozen, composed, resolved once. Of ours it imports the error and the address.

Sources, strongest first: command-line flags, environment (`MOE_SERVER_DEVICE_MEMORY`, nested keys
with a double underscore: `MOE_SERVER_WARMUP__MAX_TTFT_MS`; empty means unset), the file given by
`--config` (TOML, YAML or JSON), defaults. An unknown key is an error that names a near known one.
"""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from moe_server.address import UNIX, check_address
from moe_server.errors import MoeServerError, Reason

ENV_PREFIX = "MOE_SERVER_"
SERVICE_LINK = re.compile(r"PORT(_.*)?|SERVICE_HOST|SERVICE_PORT(_.*)?")
"""What Kubernetes sets in every pod for a Service called moe-server, after the prefix."""
MAX_SIZE_BYTES = 2**60
NEAR = 0.7
"""Similarity (difflib) from which a known key is suggested for an unknown one."""
ALL_KEYS = "Run `moe-server check-config --help` for keys and units."
UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}


def parse_bytes(value: object) -> object:
    """Turns "24GiB", "1.5 GB" or a number of bytes into an int; "min" is left as it is."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() == "min":
        return "min"
    text = value.strip().upper().replace("_", "")
    number = text.rstrip("KMGTIB ")
    unit = text[len(number) :].strip()
    try:
        return int(float(number) * UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(
            "expected a number and one of B, KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB "
            "(of 1024), for example 24GiB"
        ) from None


def _not_empty(text: str) -> str:
    if not text:
        raise ValueError('expected a directory, or "demo" for the embedded model')
    return text


def _a_path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError('expected a path, "auto" or "off"')
    return text


def _not_unix(address: str) -> str:
    if address.startswith(UNIX):
        raise ValueError("expected HOST:PORT or [IPV6]:PORT")
    return address


Size: TypeAlias = Annotated[int, Field(ge=0, le=MAX_SIZE_BYTES)]
ByteSize: TypeAlias = Annotated[Size, BeforeValidator(parse_bytes)]
DeviceMemory: TypeAlias = Annotated[Size | Literal["min"], BeforeValidator(parse_bytes)]
Address: TypeAlias = Annotated[str, AfterValidator(check_address)]
TcpAddress: TypeAlias = Annotated[Address, AfterValidator(_not_unix)]


class Section(BaseModel):
    """A group of keys: frozen, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SchedulerConfig(Section):
    """How requests share the engine."""

    max_batch_tokens: int = Field(512, ge=1)
    """Tokens one step may process. More: faster prefill, more workspace, longer decode stalls."""
    max_running: int = Field(32, ge=1)
    """Requests decoding side by side."""
    max_waiting: int = Field(256, ge=1)
    """Requests accepted but not running; the next one is refused with RESOURCE_EXHAUSTED."""
    block_tokens: int = Field(16, ge=1)
    """Tokens in one KV cache block."""
    reuse_prefixes: bool = True
    """Keep KV blocks of prompts for others that begin the same way, until their memory is needed. A
    client can tell by the time it takes whether somebody sent the same beginning lately."""
    max_wait_s: float = Field(5.0, ge=0, allow_inf_nan=False)
    """Seconds that a request may wait for its start. Who would wait for longer is refused, at once
    where it can be foreseen, with RESOURCE_EXHAUSTED and when to come again. Never less than two
    steps take. 0: as long as its deadline allows."""
    priority_s: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Seconds of waiting that one level of a request's priority is worth: nobody is passed by those
    that come later by more than this for each level of difference. 0: priorities count nothing.
    More than max_wait_s: under overload a higher level leaves nothing to a lower one."""
    default_max_new_tokens: int = Field(256, ge=1)
    """Used when a request does not set max_new_tokens."""


class ServiceConfig(Section):
    """The gRPC side."""

    max_message_bytes: ByteSize = 4 * 2**20
    """Largest request that is read. gRPC itself refuses larger ones, RESOURCE_EXHAUSTED, "larger
    than max" and no details: there is no RetryInfo, as trying again does not help."""
    shutdown_grace_s: float = Field(30.0, ge=0)
    """After SIGTERM: how long accepted requests may finish before they are cut off."""


class WarmupConfig(Section):
    """What READY has to prove."""

    prompt_tokens: int = Field(16, ge=1)
    """Length of the prompts that the warm-up sends (cut to what the model's context allows). 16
    tokens meet nearly all of a layer's 8 experts; longer prompts prove more and take longer."""
    new_tokens: int = Field(2, ge=2)
    """Tokens generated for each probe."""
    batch: int | None = Field(None, ge=0)
    """Requests of different shapes that are sent side by side before the probes: prompts from the
    longest down, decoded in batches from all of them down to one. Unset: none on a CPU, where the
    first batch of a size takes what later ones take; 4 on a GPU, which makes programs for it."""
    longest_prompt_tokens: int | None = Field(None, ge=1)
    """Of these requests. Unset: prompt_tokens on a CPU, which computes all sizes alike; on a GPU
    scheduler.max_batch_tokens."""
    text: bool = True
    """Beside them one with text (a conversation where the checkpoint has a chat template) and a
    constraint, which loads what those need. Only where there is a tokenizer."""
    probes: int = Field(3, ge=1)
    """Requests sent alone, one after another; all of them must keep the limits."""
    max_ttft_ms: float | None = Field(None, gt=0)
    """Longest time to first token a probe may take. Unset: 4 times what the speeds measured at the
    start say, and 1 s; any for a dense model, whose speed is not measured. inf: any."""
    max_tpot_ms: float | None = Field(None, gt=0)
    """Longest time per output token a probe may take. Unset: 4 times what the speeds measured at
    the start say, and 250 ms; any for a dense model. inf: any."""
    attempts: int = Field(5, ge=1)
    """Tries of each stage of the warm-up, with growing pauses, before it counts as failed."""
    hot_set: Annotated[str, AfterValidator(_a_path)] = "auto"
    """A file that says which experts were wanted most: read at the start, so that those are loaded
    first and stay in memory, and written while serving. "auto": a file for each checkpoint below
    $XDG_STATE_HOME (~/.local/state); "off": none."""
    hot_set_every_s: float = Field(60.0, gt=0)
    """Between two writes of that file; a drain writes it, too."""
    requests: Path | None = None
    """A file of `moe-server warmup record`, whose requests are sent before the probes."""
    recording: Literal["off", "shapes", "text"] = "off"
    """What `moe-server warmup record` may take from real requests. off: nothing; shapes: lengths,
    sampling, no words; text: the requests themselves."""
    if_missed: Literal["fail", "serve"] = "fail"
    """When no attempt kept the limits. fail: FAILED, and tried again until one does; serve: READY,
    and told as degraded in status and metrics."""


class ModelConfig(Section):
    """One model and its budgets: what its engine process gets."""

    model: Annotated[str, AfterValidator(_not_empty)] = "demo"
    """A Hugging Face checkpoint directory, or "demo" for the embedded model."""
    model_name: str = ""
    """The name clients use; empty: the directory's name."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where it computes. On a CPU the device budget is RAM."""
    device_memory: DeviceMemory | None = None
    """Bytes for everything on the device: dense weights, KV cache, expert slots, workspace. "min":
    the smallest that can run. Unset: everything resident if it fits, else most of what is free."""
    host_memory: ByteSize = 0
    """Bytes for expert records in (on CUDA: pinned) host memory; 0: experts that are not on the
    device are read from disk."""
    max_total_tokens: int = Field(16384, ge=2)
    """Tokens the KV cache holds, over all running requests; also bounds one request."""
    expert_format: Literal["checkpoint", "bf16", "int8", "int4"] = "checkpoint"
    """How `model` stores its expert weights. "checkpoint": however it does; anything else is
    refused if it differs (bf16 stands for any 16-bit float). `moe-server pack` converts."""
    dense_backend: Literal["zero3", "resident"] = "zero3"
    """zero3: the dense weights live under DeepSpeed ZeRO-3; resident: plainly on the device."""
    zero3_config: Path | None = None
    """Your own DeepSpeed JSON (stage 3); unset: one that suits inference on this device."""
    read_threads: int = Field(4, ge=1, le=64)
    """Most reads in flight at once; how many pay is measured at the start."""
    verify: bool = False
    """Hold every later read of a checkpoint's own shards to what the first one brought. (A packed
    store carries checksums, which are always verified.)"""
    expert_policy: Literal["global-lru", "layer-lru", "layer-lfu", "next-visit"] = "next-visit"
    """Who is evicted. next-visit estimates which experts their layer will want again soonest;
    `make bench-policy` compares the others on recorded traffic."""
    prefetch: bool = True
    """Read what the next layer will probably want while the disk has nothing better to do."""
    allow_pageable: bool = False
    """On CUDA: go on where host memory cannot be pinned. Copies to the device are slower then."""
    host_compute: bool = False
    """On CUDA: compute an expert in host memory where that takes less time than copying it. Sums
    are rounded in another order there, so a token may then depend on where an expert was."""
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads for computing; unset: one for each core this process may use, or that its
    container's CPU quota is worth."""

    scheduler: SchedulerConfig = SchedulerConfig()
    warmup: WarmupConfig = WarmupConfig()

    @property
    def model_path(self) -> Path:
        """The checkpoint directory; the embedded model's for "demo"."""
        return Path(__file__).parent / "demo" if self.model == "demo" else Path(self.model)

    @property
    def served_name(self) -> str:
        """The name clients see."""
        return self.model_name or (
            "demo" if self.model == "demo" else self.model_path.resolve().name
        )


class Config(ModelConfig):
    """The whole configuration: a model's keys stand at the top, as there is one model mostly."""

    models: tuple[ModelConfig, ...] = ()
    """Further models beside the one that the keys outside of this list describe: a list of tables,
    in the file only. Each has `model`, and any key but admin_listen, listen, metrics_listen, models
    and service, with budgets and defaults of its own."""

    listen: Address = "127.0.0.1:50051"
    """HOST:PORT, [IPV6]:PORT or unix:PATH for clients; port 0 takes a free one."""
    admin_listen: Address | Literal[""] = ""
    """HOST:PORT of a second listener, where AdminService takes changes from anyone who reaches it.
    On `listen`, changes are taken from loopback peers only."""
    metrics_listen: TcpAddress | Literal[""] = ""
    """HOST:PORT where Prometheus reads metrics, over plain HTTP from anyone; empty: nowhere."""
    service: ServiceConfig = ServiceConfig()

    @property
    def all_models(self) -> tuple[ModelConfig, ...]:
        """Every model's own keys; first the one at the top."""
        at_the_top = {name: getattr(self, name) for name in ModelConfig.model_fields}
        return (ModelConfig.model_validate(at_the_top), *self.models)


def load_config(
    file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Merges flags over environment over file over defaults.

    Args:
        file: TOML (`.toml`), YAML (`.yaml`, `.yml`) or JSON (`.json`).
        flags: Keys given on the command line; nested keys are dotted (`warmup.max_ttft_ms`).
        environ: Where `MOE_SERVER_*` is looked up; `os.environ` if None.

    Raises:
        MoeServerError: An unreadable file, an unknown key or a bad value; `field` names the key.
    """
    merged: dict[str, Any] = {}
    if file is not None:
        _merge(merged, _read_file(file))
    environ = os.environ if environ is None else environ
    for name, text in environ.items():
        key = name.removeprefix(ENV_PREFIX)
        if key != name and text and not SERVICE_LINK.fullmatch(key):
            _merge(merged, _nested(key.lower().replace("__", "."), text))
    for key, value in (flags or {}).items():
        _merge(merged, _nested(key, value))
    _refuse_unknown(merged)
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = _dotted(first["loc"])
        problems = {
            "model_type": "expected a table of keys",
            "dict_type": "expected a table of keys",
            "tuple_type": "expected a list of tables, in the file given by --config",
        }
        problem = problems.get(first["type"], first["msg"])
        raise MoeServerError(
            f"{key} = {first['input']!r} is not usable: {problem.removeprefix('Value error, ')}.",
            ALL_KEYS,
            field=key,
        ) from None
    _check_models(config, merged.get("models", ()))
    return config


def _check_models(config: Config, given: Sequence[Mapping[str, Any]]) -> None:
    """What one model's keys alone do not say."""
    names: set[str] = set()
    hot_sets: set[str] = set()
    for index, model in enumerate(config.all_models):
        prefix = f"models[{index - 1}]." if index else ""
        if index and "model" not in given[index - 1]:
            raise MoeServerError(
                f"{prefix}model is missing.",
                'Give the checkpoint\'s directory, or "demo".',
                field=f"{prefix}model",
            )
        if model.served_name in names:
            raise MoeServerError(
                f"Two models are called {model.served_name!r}; clients could not tell them apart.",
                f"Give one of them another {prefix}model_name.",
                field=f"{prefix}model_name",
            )
        names.add(model.served_name)
        hot_set = model.warmup.hot_set
        if hot_set in hot_sets - {"auto", "off"}:
            raise MoeServerError(
                f"Two models have the hot set {hot_set!r}; each would overwrite the other's.",
                f'Give one of them another {prefix}warmup.hot_set, or "auto".',
                field=f"{prefix}warmup.hot_set",
            )
        hot_sets.add(hot_set)
        if model.zero3_config is not None:
            _check_json(model.zero3_config, f"{prefix}zero3_config")


def _check_json(zero3_config: Path, key: str) -> None:
    """The engine reads it, much later; what DeepSpeed makes of its keys is known only there."""
    try:
        settings = json.loads(zero3_config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problem = error.strerror if isinstance(error, OSError) else f"it is no JSON: {error}"
        raise MoeServerError(
            f"{key} = {str(zero3_config)!r} is not usable: {problem}.",
            "Give a DeepSpeed configuration in JSON, or none.",
            field=key,
        ) from None
    if not isinstance(settings, dict):
        raise MoeServerError(
            f"{key} = {str(zero3_config)!r} holds a {type(settings).__name__}, expected an object.",
            "Give a DeepSpeed configuration in JSON, or none.",
            field=key,
        )


def known_keys(section: type[Section] = Config) -> frozenset[str]:
    """Every key of the configuration, or of a part of it; nested ones dotted."""
    keys: set[str] = set()
    for name, field in section.model_fields.items():
        keys.add(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys.update(f"{name}.{inner}" for inner in field.annotation.model_fields)
    return frozenset(keys)


def _dotted(location: tuple[int | str, ...]) -> str:
    """The longest known key a pydantic error location starts with; it also names union branches."""
    match location:
        case ("models", int(index), *inner):
            prefix, section = f"models[{index}]", ModelConfig
            location = tuple(inner)
        case _:
            prefix, section = "", Config
    parts, known = [str(part) for part in location], known_keys(section)
    ends = range(len(parts), 0, -1)
    key = next((".".join(parts[:end]) for end in ends if ".".join(parts[:end]) in known), "")
    return f"{prefix}.{key}".strip(".")


def _read_file(path: Path) -> dict[str, Any]:
    readers: dict[str, Callable[[str], Any]] = {
        ".toml": tomllib.loads,
        ".json": json.loads,
        ".yaml": yaml.safe_load,
        ".yml": yaml.safe_load,
    }
    if path.suffix not in readers:
        raise MoeServerError(f"{path}: unknown kind of file.", f"Use one of {', '.join(readers)}.")
    try:
        content = readers[path.suffix](path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MoeServerError(
            f"Cannot read {path}: {error.strerror}.",
            "Give --config a file that can be read.",
            reason=Reason.NOT_FOUND,
        ) from None
    except (ValueError, yaml.YAMLError) as error:
        raise MoeServerError(f"{path} does not parse: {error}.") from None
    if content is None:  # an empty YAML file, or one of comments
        content = {}
    if not isinstance(content, dict):
        raise MoeServerError(f"{path} holds a {type(content).__name__}, expected a table of keys.")
    return _with_text_keys(content)


def _with_text_keys(table: Mapping[Any, Any]) -> dict[str, Any]:
    """Keys as they are spelled here: text, with underscores for hyphens."""

    def spelled(value: object) -> object:
        if isinstance(value, list):
            return [spelled(item) for item in value]
        return _with_text_keys(value) if isinstance(value, dict) else value

    return {str(key).replace("-", "_"): spelled(value) for key, value in table.items()}


def _nested(dotted: str, value: object) -> dict[str, Any]:
    outer, _, inner = dotted.partition(".")
    return {outer: _nested(inner, value) if inner else value}


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, dict) else value


def _refuse_unknown(
    table: Mapping[str, Any], outer: str = "", section: type[Section] = Config, path: str = ""
) -> None:
    """Refuses keys that `section` does not have.

    Args:
        table: Keys and values.
        outer: Where in the section the table is, with a dot at its end.
        section: What the table belongs to.
        path: Where in the configuration the section is, with a dot at its end.
    """
    known = known_keys(section)
    for name, value in table.items():
        key = outer + name
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=NEAR)
            remedy = f"Did you mean {path + near[0]!r}?" if near else ALL_KEYS
            if path and key in known_keys():
                remedy = f"It is a key of the whole server: set {key} outside of models."
            raise MoeServerError(
                f"Unknown configuration key {path + key!r}.", remedy, field=path + key
            )
        if isinstance(value, dict):
            _refuse_unknown(value, f"{key}.", section, path)
        elif key == "models" and isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    _refuse_unknown(item, "", ModelConfig, f"models[{index}].")
