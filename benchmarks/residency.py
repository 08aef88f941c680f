"""What a smaller device budget costs: tokens/s and bytes read, by share of resident experts.

The physics: a token of top-k routing needs k experts a layer. With random weights routing is
close to uniform, so a cache that holds a share r of every layer's experts misses about (1 - r) * k
of them a layer. No token can be faster than those bytes at the disk's bandwidth, nor than the
weights it uses at the memory's. Both are measured here, beside every server that is measured.

    python -m benchmarks.residency --model /data/mixtral-4 [--rounds 2] [--new-tokens 16]

Starts `moe-server serve` for one budget after another, round by round, and speaks gRPC to it.
Prints a table and one JSON line, and keeps the latter in benchmarks/results/.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import checkout
from benchmarks.ceilings import disk_bytes_per_s, memory_bytes_per_s
from benchmarks.serving import random_prompt, ready_server
from moe_server.budget import plan_memory
from moe_server.checkpoint import Checkpoint, read_checkpoint
from moe_server.client import Client
from moe_server.config import load_config
from moe_server.proto.moe_server.v1 import generation_pb2 as pb

READY_TIMEOUT_S = 1200
LOG = Path(tempfile.gettempdir()) / "moe-residency.log"
PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Arm:
    """One way to run the server."""

    name: str
    device_share: float
    """Of the experts; the rest is in host memory or on disk."""
    host_share: float = 0.0


ARMS = (
    Arm("all resident", 1.0),
    Arm("half on device", 0.5),
    Arm("half on device, half in host memory", 0.5, 0.5),
    Arm("one slot", 0.0),
)


@dataclass(frozen=True)
class Measured:
    """One request of one arm."""

    ready_s: float
    ttft_s: float
    decode_tokens_per_s: float
    read_bytes_per_token: float
    transfer_bytes_per_token: float
    disk_bytes_per_s: float
    """Probed just before."""


def main() -> None:
    """Measures every arm `rounds` times, interleaved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--port", type=int, default=50059)
    args = parser.parse_args()
    checkpoint = read_checkpoint(args.model)
    shards = sorted(args.model.glob("*.safetensors"))
    measured: dict[str, list[Measured]] = {arm.name: [] for arm in ARMS}
    for number in range(args.rounds):
        for arm in ARMS:
            disk = disk_bytes_per_s(shards, checkpoint.record_layout.weight_bytes)
            flags = _flags(arm, checkpoint, args.model)
            with ready_server(args.model, flags, args.port, READY_TIMEOUT_S, LOG) as client:
                ready_s = client.status().startup.elapsed.ToNanoseconds() / 1e9
                result = _measure(client, checkpoint, args.new_tokens, number)
            measured[arm.name].append(Measured(ready_s, *result, disk))
            print(arm.name, measured[arm.name][-1], file=sys.stderr)
    _report(measured, checkpoint)


def _flags(arm: Arm, checkpoint: Checkpoint, model: Path) -> list[str]:
    config = load_config(flags={"model": str(model), "device_memory": "min"}, environ={})
    plan = plan_memory(config, checkpoint)
    slots = max(1, round(arm.device_share * plan.num_experts_total))
    device = plan.fixed_bytes + slots * plan.slot_bytes
    host = round(arm.host_share * plan.num_experts_total) * plan.slot_bytes
    return ["--device-memory", str(device), "--host-memory", str(host)]


def _measure(
    client: Client, checkpoint: Checkpoint, new_tokens: int, seed: int
) -> tuple[float, float, float, float]:
    """Time to first token, decoded tokens/s, bytes read and bytes moved per decoded token."""
    prompt = random_prompt(checkpoint.vocab_size, PROMPT_TOKENS, seed)
    before = client.status().experts
    read_at_first, moved_at_first = 0, 0
    times = []
    sent = time.perf_counter()
    stopping = pb.Stopping(max_new_tokens=new_tokens, ignore_eos=True)
    for event in client.generate_stream(prompt, stopping=stopping):
        if event.HasField("delta"):
            times.append(time.perf_counter())
            if len(times) == 1:
                counters = client.status().experts
                read_at_first = counters.read_bytes - before.read_bytes
                moved_at_first = counters.transfer_bytes - before.transfer_bytes
        elif event.HasField("finished"):
            timings = event.finished.timings
    decoded = new_tokens - 1
    return (
        times[0] - sent,
        decoded / (times[-1] - times[0]),
        (timings.expert_read_bytes - read_at_first) / decoded,
        (timings.expert_transfer_bytes - moved_at_first) / decoded,
    )


def _report(measured: dict[str, list[Measured]], checkpoint: Checkpoint) -> None:
    experts_per_token = checkpoint.num_layers * checkpoint.num_experts_per_token
    expert_bytes = checkpoint.record_layout.weight_bytes
    expected = {
        arm.name: (1 - max(arm.device_share + arm.host_share, 1 / len(checkpoint.experts)))
        * experts_per_token
        * expert_bytes
        for arm in ARMS
    }
    print(f"{'':38} ready   TTFT  tokens/s  read/token  (uniform)  disk limit")
    for name, runs in measured.items():
        median = {
            key: statistics.median(asdict(run)[key] for run in runs) for key in asdict(runs[0])
        }
        read, disk = median["read_bytes_per_token"], median["disk_bytes_per_s"]
        limit = f"{disk / read:5.2f}/s" if read else "    -"
        print(
            f"{name:38} {median['ready_s']:4.0f}s {median['ttft_s']:5.2f}s "
            f"{median['decode_tokens_per_s']:8.2f}  {read / 1e6:7.0f} MB "
            f"{expected[name] / 1e6:7.0f} MB  {limit}"
        )
    commit = checkout.commit()
    line = {
        "bench": "residency",
        "commit": commit,
        "hardware": {"cpu": platform.machine(), "cores": torch.get_num_threads()},
        "ceilings": {"memory_bytes_per_s": memory_bytes_per_s()},
        "results": {name: [asdict(run) for run in runs] for name, runs in measured.items()},
        "ratios": {},
    }
    checkout.RESULTS.mkdir(exist_ok=True)
    (checkout.RESULTS / f"residency-{commit}.json").write_text(json.dumps(line) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
