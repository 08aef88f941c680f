"""A full-size Mixtral 8x7B on one GPU with 24 GiB of its memory: int4 from disk, bf16 from RAM.

    python -m benchmarks.gpu_serving int4|bf16 --dir DIR [--rehearse]

*int4*: 26 GB are written to DIR, then a server of its own starts cold, and clients ask it over
gRPC. *bf16*: 93 GB fit on no small disk, so two layers are written and 32 are served that take
turns among their bytes, from pinned host memory, by an engine in this process; what is copied,
where and when is as with 32 different ones. Random weights route almost uniformly: hit rates are a
lower bound. `--rehearse` runs it all on a CPU with tiny sizes. Prints one JSON line.
"""

import argparse
import contextlib
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.ceilings import disk_bytes_per_s
from benchmarks.child import drop_page_cache
from benchmarks.engine_inside import loaded_engine
from benchmarks.serving import random_prompt, ready_server, side_by_side, timed_request
from moe_server.budget import plan_memory
from moe_server.checkpoint import Checkpoint, read_checkpoint
from moe_server.config import load_config
from moe_server.engine import Engine
from moe_server.messages import Submit
from moe_server.offload.layout import ExpertId

PORT = 50071
READY_TIMEOUT_S = 240
POLL_S = 0.2
BATCHES = (1, 8, 32)
SHORT_PROMPT = 16
_LAYER = re.compile(r"(?<=layers\.)\d+")


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is."""

    device: str
    device_memory: str
    host_memory: int
    layers: int
    synth: tuple[str, ...] = ()
    long_prompt: int = 2048
    new_tokens: int = 32


FULL = Scale("cuda", "24GiB", 16 * 2**30, 32)
REHEARSAL = Scale(
    "cpu", "min", 2**20, 4,
    (
        "--hidden", "64", "--intermediate", "128", "--heads", "4", "--kv-heads", "2",
        "--vocab", "512",
    ),
    long_prompt=64, new_tokens=4,
)  # fmt: skip


def main() -> int:
    """Measures one of the two and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", choices=("int4", "bf16"))
    parser.add_argument("--dir", type=Path, required=True, help="where models are made")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
    args = parser.parse_args()
    scale = REHEARSAL if args.rehearse else FULL
    serve = serve_int4 if args.work == "int4" else serve_bf16
    with peak_memory(scale.device) as peak:
        found = serve(args.dir, scale)
    found["peak_gpu_memory_gib"] = peak.mib / 1024
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))
    return 0


def serve_int4(folder: Path, scale: Scale) -> dict[str, float]:
    """A server process, from a cold start to batches of 32."""
    model = folder / "int4"
    flags = ["--expert-format", "int4", "--layers", str(scale.layers)]
    found = {"synth_s": make_model(model, [*flags, *scale.synth])}
    checkpoint = read_checkpoint(model)
    stride = checkpoint.record_layout.stride_bytes
    disk = disk_bytes_per_s(sorted(model.glob("*.safetensors")), stride)
    found["disk_gb_per_s"] = disk / 1e9
    with contextlib.suppress(OSError):  # no root: it starts warm, and disk reads tell
        drop_page_cache()
    config = load_config(flags={**config_flags(scale), "model": str(model)}, environ={})
    found["slots"] = plan_memory(config, checkpoint).num_slots
    serve_flags = [
        part for name, value in config_flags(scale).items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]  # fmt: skip
    started = time.perf_counter()
    log = folder / "server.log"
    with ready_server(model, serve_flags, PORT, READY_TIMEOUT_S, log) as client:
        found["ready_s"] = time.perf_counter() - started
        vocab = checkpoint.vocab_size
        timed_request(client, random_prompt(vocab, SHORT_PROMPT, 0), 2)
        found["start_to_first_token_s"] = time.perf_counter() - started
        found["ttft_2k_s"] = statistics.median(
            timed_request(client, random_prompt(vocab, scale.long_prompt, seed), 2).ttft_s
            for seed in range(3)
        )
        for batch in BATCHES:
            prompts = [random_prompt(vocab, SHORT_PROMPT, 100 + n) for n in range(batch)]
            before = client.status().experts
            _, found[f"b{batch}/tokens_per_s"] = side_by_side(client, prompts, scale.new_tokens)
            after = client.status().experts
            hits = after.device_hits - before.device_hits
            others = after.host_hits + after.disk_reads - before.host_hits - before.disk_reads
            found[f"b{batch}/hit_rate"] = hits / max(1, hits + others)
            read = after.read_bytes - before.read_bytes
            found[f"b{batch}/read_gb_per_token"] = read / 1e9 / (batch * scale.new_tokens)
    return found


def serve_bf16(folder: Path, scale: Scale) -> dict[str, float]:
    """An engine in this process, its experts in host memory where they are not on the GPU."""
    model = folder / "bf16"
    found = {"synth_s": make_model(model, ["--layers", "2", *scale.synth])}
    checkpoint = tiled(read_checkpoint(model), scale.layers)
    stride = checkpoint.record_layout.stride_bytes
    host_memory = (len(checkpoint.experts) + 2) * stride
    flags = {**config_flags(scale), "model": str(model), "host_memory": host_memory}
    config = load_config(flags=flags, environ={})
    plan = plan_memory(config, checkpoint)
    found["slots"], found["host_records"] = plan.num_slots, plan.num_records
    started = time.perf_counter()
    engine = loaded_engine(config, checkpoint)
    found["loaded_s"] = time.perf_counter() - started
    long_prompt = random_prompt(checkpoint.vocab_size, scale.long_prompt, 1)
    run_load(engine, [long_prompt], 2)
    found["ttft_2k_s"] = run_load(engine, [long_prompt], 2)["ttft_s"]
    prices = engine.cache.tiers.cost
    for in_place in (False, True):
        prices.computes_in_place = in_place or scale.device == "cpu"
        suffix = "/host_compute" if in_place else ""
        for batch in BATCHES:
            prompts = [
                random_prompt(checkpoint.vocab_size, SHORT_PROMPT, 100 + n) for n in range(batch)
            ]
            for name, value in run_load(engine, prompts, scale.new_tokens).items():
                found[f"b{batch}{suffix}/{name}"] = value
    found["copy_gb_per_s"] = (prices.copy.bytes_per_s or 0.0) / 1e9
    engine.close()
    return found


def run_load(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, float]:
    """All requests at once; rates are of the steps in which all of them decode."""
    counters, moves = engine.cache.counters, engine.cache.tiers.counters
    for number, prompt in enumerate(prompts):
        engine.submit(Submit(number, list(prompt), new_tokens, []))
    begun, started = False, time.perf_counter()
    first_s = hits = wanted = moved = tokens = 0.0
    decoding = ended = started
    while not engine.idle:
        before = counters.device_hits, counters.host_hits + counters.disk_reads
        moved_before = moves.transfer_bytes
        done = engine.step()
        now = time.perf_counter()
        if done.tokens and not first_s:
            first_s = now - started
        if begun and len(done.tokens) == len(prompts):
            found = counters.device_hits - before[0]
            hits += found
            wanted += found + counters.host_hits + counters.disk_reads - before[1]
            moved += moves.transfer_bytes - moved_before
            tokens += len(prompts)
            ended = now
        elif len(done.tokens) == len(prompts):
            begun, decoding = True, now
    return {
        "ttft_s": first_s,
        "tokens_per_s": tokens / (ended - decoding) if tokens else 0.0,
        "hit_rate": hits / max(1.0, wanted),
        "copied_gb_per_token": moved / 1e9 / max(1.0, tokens),
    }


def config_flags(scale: Scale) -> dict[str, Any]:
    """What the server is told."""
    return {
        "device": scale.device,
        "device_memory": scale.device_memory,
        "host_memory": scale.host_memory,
        "dense_backend": "resident",
    }


def tiled(checkpoint: Checkpoint, num_layers: int) -> Checkpoint:
    """A checkpoint of more layers, which take turns among the files' layers."""
    held = checkpoint.num_layers

    def of_layer(name: str, layer: int) -> str:
        return _LAYER.sub(str(layer), name)

    dense: Mapping[str, Any] = {
        of_layer(name, layer): tensor
        for name, tensor in checkpoint.dense.items()
        for layer in (_copies(name, held, num_layers))
    }
    experts = {
        ExpertId(layer, expert): checkpoint.experts[ExpertId(layer % held, expert)]
        for layer in range(num_layers)
        for expert in range(checkpoint.num_experts)
    }
    return replace(checkpoint, num_layers=num_layers, dense=dense, experts=experts)


def _copies(name: str, held: int, num_layers: int) -> range:
    """The layers that a tensor serves; one, of no importance, where it belongs to none."""
    found = _LAYER.search(name)
    return range(int(found.group()), num_layers, held) if found else range(1)


def make_model(path: Path, flags: Sequence[str]) -> float:
    """Writes a checkpoint with random weights, unless it is there; seconds."""
    started = time.perf_counter()
    if not path.exists():
        command = [sys.executable, "-m", "moe_server", "synth", str(path), *flags]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return time.perf_counter() - started


@dataclass(slots=True)
class Peak:
    """The most memory of the GPU that was seen in use, by any process."""

    mib: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self.done.wait(POLL_S):
            with contextlib.suppress(OSError, ValueError):
                said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
                self.mib = max(self.mib, float(said.split()[0]) if said.split() else 0.0)


@contextmanager
def peak_memory(device: str) -> Iterator[Peak]:
    """Watches while it is open; without a GPU there is nothing to see."""
    peak = Peak()
    if device != "cuda":
        yield peak
        return
    watcher = threading.Thread(target=peak.watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        peak.done.set()
        watcher.join()


if __name__ == "__main__":
    sys.exit(main())
