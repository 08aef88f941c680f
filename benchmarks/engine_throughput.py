"""Tokens per second through the whole server, beside the bare model's.

A client's streams all decode side by side in a server that an operator would start, with every
expert resident; then a process of its own runs the same prompts through `Model.forward` alone, on
the same expert memory, while the server is idle. They take turns, and a ratio is of neighbours.
Both are greedy and must give the same tokens. The client is on the same cores as the server, and
what it costs counts; processor time says whose it is.
"""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.child import Child, running
from benchmarks.engine_server import (
    ServerFailedError,
    engine_of,
    processor_seconds,
    running_server,
    wait_ready,
)
from benchmarks.loads import prompt
from moe_server.budget import plan_memory
from moe_server.checkpoint import read_checkpoint
from moe_server.client import Client
from moe_server.config import load_config
from moe_server.proto.moe_server.v1 import generation_pb2

PROMPT_TOKENS = 16
BATCHES = (8, 32)
SKIP = 2
"""Steps after the prompts that are not timed, at either end: not all streams are there."""
TIMEOUT_S = 600
POLL_S = 0.005
BARE = Path(__file__).parent / "peers/run_bare.py"
MEMORY = "memfd:moe-server-experts"


@dataclass(frozen=True)
class Round:
    """One batch through both."""

    batch: int
    server_tokens_per_s: float
    bare_tokens_per_s: float
    same_tokens: bool
    client_cpu_ms: float
    front_door_cpu_ms: float
    engine_cpu_ms: float
    bare_cpu_ms: float
    """Processor time of a step, of each process."""

    @property
    def ratio(self) -> float:
        return self.server_tokens_per_s / self.bare_tokens_per_s

    @property
    def processor_ratio(self) -> float:
        """As `ratio`, in processor time, in which others on the machine hardly count."""
        return self.bare_cpu_ms / (self.engine_cpu_ms + self.front_door_cpu_ms)

    @property
    def overhead_ms(self) -> float:
        """Of one step."""
        return 1e3 * self.batch * (1 / self.server_tokens_per_s - 1 / self.bare_tokens_per_s)


def measure(model: Path, folder: Path, rounds: int, new_tokens: int) -> list[Round]:
    """Starts a server, measures each batch `rounds` times, ends it.

    Args:
        model: A checkpoint that fits in memory.
        folder: For logs and the socket.
        rounds: Of each batch size.
        new_tokens: Of each request.

    Raises:
        ServerFailedError: It ended, failed, or took too long.
        ChildFailedError: The bare model did.
    """
    flags: dict[str, Any] = {"model": str(model), "dense_backend": "resident"}
    plan = plan_memory(load_config(flags=flags, environ={}), read_checkpoint(model))
    flags["device_memory"] = plan.device_budget_bytes  # decided once: the two are to have one plan
    address, file = f"unix:{folder / 'bench-throughput.sock'}", folder / "throughput.json"
    log = folder / "logs/throughput.log"
    file.write_text(json.dumps(flags))
    with (
        running_server(str(model), ["--config", str(file)], address, log) as process,
        Client(address) as client,
    ):
        wait_ready(client, process, log)
        job = {"flags": flags, "memory": _expert_memory(process)}
        command = [sys.executable, str(BARE), json.dumps(job)]
        # As in the engine process. Threads that spin at barriers made this arm 4 to 12 times slower
        # than the server on a machine that others used.
        environ = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_WAIT_POLICY": "PASSIVE"}
        with running(
            command, cap_bytes=None, log=folder / "logs/bare.log", environ=environ
        ) as bare:
            bare.answer(TIMEOUT_S)
            found = []
            for number in range(rounds):
                for batch in BATCHES:
                    one = _round(client, process.pid, bare, batch, number, new_tokens)
                    print(
                        f"b{batch} #{number}: {one.server_tokens_per_s:.1f} tokens/s, bare "
                        f"{one.bare_tokens_per_s:.1f} ({one.ratio:.2f}; in processor time "
                        f"{one.processor_ratio:.3f})",
                        file=sys.stderr,
                    )
                    found.append(one)
            return found


def summarised(rounds: list[Round]) -> dict[str, dict[str, float]]:
    """Medians by batch size, keyed b8 and so on."""
    found = {}
    for batch in sorted({one.batch for one in rounds}):
        of_batch = [one for one in rounds if one.batch == batch]
        names = (
            *("server_tokens_per_s", "bare_tokens_per_s", "ratio", "overhead_ms"),
            *("client_cpu_ms", "front_door_cpu_ms", "engine_cpu_ms", "bare_cpu_ms"),
            "processor_ratio",
        )
        found[f"b{batch}"] = {
            name: statistics.median(getattr(one, name) for one in of_batch) for name in names
        }
    return found


def _round(
    client: Client, server: int, bare: Child, batch: int, number: int, new_tokens: int
) -> Round:
    prompts = [prompt(f"throughput/{batch}/{number}/{row}", PROMPT_TOKENS) for row in range(batch)]
    pids = {"client": os.getpid(), "front_door": server, "engine": engine_of(server)}
    streams = [_Stream(client, ids, new_tokens) for ids in prompts]
    while min(len(stream.tokens) for stream in streams) <= SKIP and _all_run(streams):
        time.sleep(POLL_S)
    before = {name: sum(processor_seconds(pid)) for name, pid in pids.items()}
    count = _count(streams)
    while max(len(stream.tokens) for stream in streams) < new_tokens - SKIP and _all_run(streams):
        time.sleep(POLL_S)
    steps = (_count(streams) - count) / batch
    cpu_ms = {
        f"{name}_cpu_ms": 1e3 * (sum(processor_seconds(pid)) - before[name]) / max(steps, 1.0)
        for name, pid in pids.items()
    }
    for stream in streams:
        stream.join(TIMEOUT_S)
    if any(len(stream.tokens) != new_tokens for stream in streams):
        raise ServerFailedError(f"not all of {batch} streams gave {new_tokens} tokens")
    work = {"prompts": prompts, "new_tokens": new_tokens, "skip": 1 + SKIP}
    answer = bare.ask(work, TIMEOUT_S)
    return Round(
        batch,
        _together(streams),
        batch * answer["steps"] / answer["seconds"],
        [stream.tokens for stream in streams] == answer["token_ids"],
        **cpu_ms,
        bare_cpu_ms=answer["cpu_ns"] / 1e6 / answer["steps"],
    )


def _all_run(streams: "list[_Stream]") -> bool:
    return all(stream.is_alive() for stream in streams)


def _count(streams: "list[_Stream]") -> int:
    return sum(len(stream.tokens) for stream in streams)


def _together(streams: "list[_Stream]") -> float:
    """Tokens per second while all of them decoded."""
    first = max(stream.arrivals[SKIP] for stream in streams)
    last = min(stream.arrivals[-1 - SKIP] for stream in streams)
    tokens = sum(first < at <= last for stream in streams for at in stream.arrivals)
    return tokens / (last - first)


class _Stream(threading.Thread):
    """One request, and when its tokens came."""

    def __init__(self, client: Client, ids: list[int], new_tokens: int) -> None:
        super().__init__(daemon=True)
        self.tokens: list[int] = []
        self.arrivals: list[float] = []
        self._client, self._ids, self._new_tokens = client, ids, new_tokens
        self.start()

    def run(self) -> None:
        stopping = generation_pb2.Stopping(max_new_tokens=self._new_tokens, ignore_eos=True)
        for response in self._client.generate_stream(self._ids, stopping=stopping):
            if response.HasField("delta"):
                self.tokens += response.delta.token_ids
                self.arrivals += [time.monotonic()] * len(response.delta.token_ids)


def _expert_memory(server: "subprocess.Popen[bytes]") -> str:
    """The path at which another process can open the file that the server's experts lie in."""
    for descriptor in Path(f"/proc/{server.pid}/fd").iterdir():
        if MEMORY in str(descriptor.readlink()) and descriptor.stat().st_size:
            return str(descriptor)
    raise ServerFailedError("the server's experts are in memory that cannot be shared")
