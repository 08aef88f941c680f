"""The dense weights under DeepSpeed ZeRO-3, for inference, in one process, without a launcher.

ZeRO-3 partitions the parameters it is given and gathers each layer around its forward pass; with
one process on the same device gathering is a view and costs no copy. Experts never come here: given
them, ZeRO-3 would gather whole layers of them (measured: 704 MB a token where top-2 needs 176).

DeepSpeed is imported inside `wrap`, after the environment it reads has been set.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_server.errors import MoeServerError


def wrap(
    module: nn.Module, dtype: torch.dtype, device: torch.device, config_file: Path | None
) -> Callable[..., Any]:
    """Puts a loaded module's parameters under ZeRO-3.

    Must be called, and its result used, by one thread only: DeepSpeed's hooks keep state.

    Args:
        module: Dense weights only, in `dtype`, in evaluation mode.
        dtype: What it computes in.
        device: Where gathered parameters live.
        config_file: A DeepSpeed JSON of the user's, stage 3; None: ours.

    Returns:
        The engine's forward: same arguments and result as the module's.

    Raises:
        MoeServerError: A user's JSON that is not stage 3 or contradicts the checkpoint.
    """
    settings = _settings(module, dtype, config_file)
    # Without these DeepSpeed asks for MPI, or compiles a C++ collective for one process.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    with _without_compiler():
        return _wrapped(module, device, settings, config_file)


def _wrapped(
    module: nn.Module, device: torch.device, settings: dict[str, Any], config_file: Path | None
) -> Callable[..., Any]:
    import deepspeed  # noqa: PLC0415
    from deepspeed.accelerator import get_accelerator  # noqa: PLC0415
    from deepspeed.utils import logger  # noqa: PLC0415

    _log_like_everyone(logger)
    # None of its own operators. Asked which it could have, it runs a compiler to find out.
    deepspeed.ops.__compatible_ops__ = {}
    if device.type == "cpu":
        # It asks oneDNN, which has float16 on some CPUs only; torch computes it on all of them.
        get_accelerator().is_fp16_supported = lambda: True
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        engine, *_ = deepspeed.initialize(model=module, config=settings)
    except (ValueError, TypeError, AssertionError) as error:
        if config_file is None:
            raise
        raise MoeServerError(
            f"{config_file}: DeepSpeed does not accept it: {error!r}.",
            "Correct the file; see deepspeed.ai/docs/config-json.",
            field="zero3_config",
        ) from error
    engine.eval()
    return engine  # type: ignore[no-any-return]


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Nothing is marked as not to be compiled, where nothing ever is.

    The first such mark imports torch's compiler: 1.1 of 1.4 s that the engine took, and 70 MB.
    """
    torch_module: Any = torch
    marks = ((torch.compiler, "disable"), (torch_module, "_disable_dynamo"))  # it uses both
    before = [getattr(owner, name) for owner, name in marks]
    for owner, name in marks:
        setattr(owner, name, _unmarked)
    try:
        yield
    finally:
        for (owner, name), mark in zip(marks, before, strict=True):
            setattr(owner, name, mark)


def _unmarked(function: Any = None, *_args: Any, **_options: Any) -> Any:
    """A decorator, with or without arguments, that leaves a function as it is."""
    return _unmarked if function is None else function


def _settings(module: nn.Module, dtype: torch.dtype, config_file: Path | None) -> dict[str, Any]:
    settings = {} if config_file is None else _read(config_file)
    for name in ("optimizer", "scheduler"):
        if name in settings:
            raise MoeServerError(
                f"{config_file}: {name} is for training, and there is none here.",
                f"Remove {name} from the file.",
                field="zero3_config",
            )
    settings.setdefault("train_micro_batch_size_per_gpu", 1)
    zero = _section(settings, "zero_optimization", {"stage": 3}, config_file)
    if zero.get("stage") != 3:
        raise MoeServerError(
            f"{config_file}: zero_optimization.stage is {zero.get('stage')!r}, expected 3.",
            "Set it to 3, or use dense_backend = resident.",
            field="zero3_config",
        )
    offload = _section(dict(zero), "offload_param", {}, config_file)
    if offload.get("device") == "nvme" and dtype == torch.float32:
        raise MoeServerError(
            f"{config_file}: DeepSpeed's NVMe offload silently casts float32 to bfloat16.",
            "Use offload_param.device cpu or none for this checkpoint.",
            field="zero3_config",
        )
    for name, its_dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        wanted = dtype == its_dtype
        section = _section(settings, name, {"enabled": wanted}, config_file)
        if section.setdefault("enabled", wanted) != wanted:
            raise MoeServerError(
                f"{config_file}: {name}.enabled contradicts the checkpoint's dtype {dtype}.",
                f"Remove {name} from the file.",
                field="zero3_config",
            )
    # True would replace torch.nn.functional.linear in the whole process.
    zero["memory_efficient_linear"] = False
    layers: Any = module.get_submodule("model.layers")
    # Hooks cost 145 us a hooked module and step; with the layer as the leaf only it has them.
    zero.setdefault("leaf_module", {"classes": [_qualified_name(type(layers[0]))]})
    return settings


def _section(
    settings: dict[str, Any], name: str, default: dict[str, Any], config_file: Path | None
) -> dict[str, Any]:
    """A group of keys; sets it to `default` where it is missing."""
    section = settings.setdefault(name, default)
    if not isinstance(section, dict):
        raise MoeServerError(
            f"{config_file}: {name} is {section!r}, expected an object.",
            "Write its keys in braces, or remove it.",
            field="zero3_config",
        )
    return section


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    """Drops every "auto", which leaves a choice to whoever runs DeepSpeed: defaults do."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value != "auto"
    }


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _read(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MoeServerError(
            f"Cannot use {file} as a DeepSpeed configuration: {error}.",
            "Give a readable JSON file.",
            field="zero3_config",
        ) from None
    if not isinstance(settings, dict):
        raise MoeServerError(f"{file} does not hold a JSON object.", field="zero3_config")
    return _without_auto(settings)


def _log_like_everyone(logger: logging.Logger) -> None:
    """DeepSpeed logs to stdout, past the root logger; stdout is the command's own output."""
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)
