"""Who is measured, and how each is set up for a load: the engine's own best settings.

llama.cpp maps its file and lets the kernel page. Repacking Q4_0 for its faster kernels copies the
weights into memory of its own, which no cap below the model's size survives: it is on only where
everything fits, and there both ways of loading are measured. transformers with accelerate keeps the
layers that fit; DeepSpeed keeps none. Neither of the two has a 4-bit format on a CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environments import ACCELERATE, DEEPSPEED, LLAMA_CPP, Environment

OURS = "moe-server"
ACCELERATE_MARGIN_BYTES = 2_300 * 10**6
"""Of a cap: the runtime, and the pages of the layers that accelerate maps."""
DEEPSPEED_BUFFER_ELEMENTS = 2 * 10**9
"""One Mixtral layer has 1.4 billion weights, its larger fused tensor 0.94 billion."""


@dataclass(frozen=True)
class Contender:
    """One way to run one model."""

    name: str
    script: str
    """In `peers/`."""
    model: str
    environment: Environment | None
    """None: ours."""
    options: Callable[[int | None, Path], dict[str, Any]]
    """(cap in bytes, a scratch folder) -> what the script is told."""
    fills_scratch: bool = False
    """Whether it writes the model into the scratch folder once more."""

    @property
    def is_ours(self) -> bool:
        return self.environment is None


def contenders(format_: str, size: str, *, capped: bool) -> list[Contender]:
    """All that run a format, ours first.

    Args:
        format_: bf16 | int4.
        size: The models' suffix: 4 | 32 | small. The small one is for a quick answer, which the
            slow peers would not let it be.
        capped: Whether the model does not fit.
    """
    ours = Contender(OURS, "run_ours.py", f"{format_}-{size}", None, _ours)
    gguf = f"bf16-{size}.gguf" if format_ == "bf16" else f"q4_0-{size}.gguf"
    if format_ == "int4":
        if capped:
            return [ours, _llama_cpp("llama.cpp", gguf, "AUTO", repack=False)]
        return [
            ours,
            _llama_cpp("llama.cpp", gguf, "AUTO", repack=True),
            _llama_cpp("llama.cpp, not mapped", gguf, "NONE", repack=True),
        ]
    peers = [_llama_cpp("llama.cpp", gguf, "AUTO", repack=True)]
    if size != "small":
        script = "run_accelerate.py"
        peers.append(Contender("accelerate", script, ours.model, ACCELERATE, _accelerate, capped))
        if capped:
            script = "run_deepspeed.py"
            peers.append(Contender("deepspeed", script, ours.model, DEEPSPEED, _deepspeed, True))
    return [ours, *peers]


def _llama_cpp(name: str, model: str, load_mode: str, *, repack: bool) -> Contender:
    options = {"load_mode": load_mode, "repack": repack}
    return Contender(name, "run_llama_cpp.py", model, LLAMA_CPP, lambda _cap, _scratch: options)


def _ours(cap_bytes: int | None, _scratch: Path) -> dict[str, Any]:
    """The whole cap, of which the runner takes the runtime off: what `serve` accepts in a cgroup.

    No margin beside: at half of the model's size 0.35 GB of a cap of 1.73 GB were never used.
    """
    return {"memory_bytes": cap_bytes}


def _accelerate(cap_bytes: int | None, scratch: Path) -> dict[str, Any]:
    if cap_bytes is None:
        return {"memory_bytes": None}
    kept = max(0, cap_bytes - ACCELERATE_MARGIN_BYTES)
    return {"memory_bytes": kept, "offload_folder": str(scratch)}


def _deepspeed(_cap_bytes: int | None, scratch: Path) -> dict[str, Any]:
    return {"offload_folder": str(scratch), "buffer_elements": DEEPSPEED_BUFFER_ELEMENTS}
