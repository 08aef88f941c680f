"""The soak: more requests than the server can take, many of them ill-behaved, for a long time.

Open loop: requests come at three times the rate that the server manages, whatever becomes of them.
Of every request it is checked that it ended once and as the protocol says; of the server that its
memory stops growing and that nothing is left of anybody when all have gone. It is started as an
operator would, on the embedded model with places for half of its experts and KV blocks for fewer
requests than run, so that experts are read, and requests preempted, all the time.
"""

import asyncio
import json
import random
import socket
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from benchmarks.engine_server import (
    engine_of,
    half_resident,
    running_server,
    wait_ready,
)
from benchmarks.soak_clients import KINDS, Ending, Target, plain, reached
from moe_server.client import Client

MODEL = "demo"
MAX_RUNNING = 16
MAX_WAITING = 32
SETTINGS = {"dense_backend": "resident", "max_total_tokens": 1536, "verify": True}
"""16 requests of 48 + 48 tokens on average just fit, so many do not."""
SCHEDULER = {"max_running": MAX_RUNNING, "max_waiting": MAX_WAITING}
OVERLOAD = 3.0
CAPACITY_S = 10.0
SAMPLE_S = 1.0
EMPTY_WITHIN_S = 30.0
MEMORY_WINDOWS = 5
"""Of the last half; their medians are compared."""
MAX_WRONGS = 20
"""Told one by one."""


@dataclass(frozen=True)
class Process:
    """What one process holds."""

    rss_bytes: int
    threads: int
    files: int


@dataclass(frozen=True)
class Soak:
    """What came of it."""

    seconds: float
    capacity_per_s: float
    """Requests of well-behaved clients, as many side by side as can run."""
    arrivals_per_s: float
    requests: dict[str, int]
    """By kind of client."""
    endings: dict[str, int]
    """By `kind: how`."""
    accepted: int
    refused: int
    generated_tokens_per_s: float
    preemptions: int
    hopeless: int
    cancelled_reads: int
    wrong: list[str]
    """What must not happen, and did; the first of them."""
    num_wrong: int
    rss: dict[str, dict[str, float]]
    """Of front_door and engine: bytes at half time and at the end, and `drift` between windows."""
    before: dict[str, Process]
    after: dict[str, Process]
    left_over: dict[str, int]
    """Requests and KV blocks in the engine when everybody had gone."""

    @property
    def drift(self) -> float:
        """The larger growth of the two processes over the last half, as a share."""
        return max(of_process["drift"] for of_process in self.rss.values())


def run(seconds: float, folder: Path, seed: int = 0, capacity_s: float = CAPACITY_S) -> Soak:
    """Starts a server, loads it for `seconds`, ends it.

    Args:
        seconds: Of overload.
        folder: For the server's log.
        seed: Of all that is random.
        capacity_s: How long the rate that the server can take is measured for.

    Raises:
        ServerFailedError: It did not start, or lost its engine.
    """
    address, log, file = f"127.0.0.1:{free_port()}", folder / "logs/soak.log", folder / "soak.json"
    log.parent.mkdir(exist_ok=True)
    config = {**SETTINGS, "device_memory": half_resident(MODEL, **SETTINGS)}
    file.write_text(json.dumps(config | {"scheduler": SCHEDULER}))
    with (
        running_server(MODEL, ["--config", str(file)], address, log) as process,
        Client(address) as client,
    ):
        wait_ready(client, process, log)
        soaking = _Soaking(client, process.pid, address, random.Random(seed))  # noqa: S311
        return asyncio.run(soaking.run(seconds, capacity_s))


class _Soaking:
    """One soak under way."""

    def __init__(self, client: Client, server: int, address: str, rng: random.Random) -> None:
        self._client = client
        self._address = address
        self._rng = rng
        self._pids = {"front_door": server, "engine": engine_of(server)}
        self._rss: dict[str, list[int]] = {name: [] for name in self._pids}
        self._tokens = 0
        self._count: Counter[str] = Counter()
        self._endings: Counter[str] = Counter()
        self._wrong: list[str] = []
        self._accepted = self._refused = 0

    async def run(self, seconds: float, capacity_s: float) -> Soak:
        [model] = self._client.models()
        async with reached(self._address, model.vocab_size) as target:
            capacity = await self._capacity(target, capacity_s)
            await self._all_left()
            before = self._processes()
            self._tokens = 0
            began = time.monotonic()
            await self._overload(target, seconds, OVERLOAD * capacity)
            took = time.monotonic() - began
            left_over = await self._all_left()
        status = self._client.status()
        if status.engine_restarts:
            self._wrong.append(f"the engine was lost {status.engine_restarts} times")
        return Soak(
            seconds=took,
            capacity_per_s=capacity,
            arrivals_per_s=OVERLOAD * capacity,
            requests=dict(self._count),
            endings=dict(sorted(self._endings.items())),
            accepted=self._accepted,
            refused=self._refused,
            generated_tokens_per_s=self._tokens / took,
            preemptions=status.load.preemptions,
            hopeless=status.load.hopeless_requests,
            cancelled_reads=status.experts.cancelled_reads,
            wrong=self._wrong[:MAX_WRONGS],
            num_wrong=len(self._wrong),
            rss={name: drift_of(samples) for name, samples in self._rss.items()},
            before=before,
            after=self._processes(),
            left_over=left_over,
        )

    async def _capacity(self, target: Target, seconds: float) -> float:
        """Requests per second of as many plain clients as can run, one after the other each."""
        ends_at, num_done = time.monotonic() + seconds, 0

        async def keep_on(rng: random.Random) -> None:
            nonlocal num_done
            while time.monotonic() < ends_at:
                self._note(await plain(target, rng))
                num_done += time.monotonic() < ends_at

        seeds = [self._rng.random() for _ in range(MAX_RUNNING)]
        await asyncio.gather(*(keep_on(random.Random(seed)) for seed in seeds))  # noqa: S311
        return max(1.0, num_done / seconds)

    async def _overload(self, target: Target, seconds: float, per_s: float) -> None:
        kinds, shares = list(KINDS), list(KINDS.values())
        sampler = asyncio.create_task(self._sample())
        ends_at = comes_at = time.monotonic()
        ends_at += seconds
        async with asyncio.TaskGroup() as group:
            while comes_at < ends_at:
                [kind] = self._rng.choices(kinds, shares)
                rng = random.Random(self._rng.random())  # noqa: S311
                group.create_task(self._one(kind(target, rng)))
                # Whoever is late sends at once: an open loop waits for nobody.
                comes_at += self._rng.expovariate(per_s)
                await asyncio.sleep(max(0.0, comes_at - time.monotonic()))
        sampler.cancel()

    async def _one(self, request: Awaitable[Ending]) -> None:
        self._note(await request)

    def _note(self, ending: Ending) -> None:
        how = "refused" if ending.is_refused else "left" if ending.left else ending.code.name
        self._count[ending.kind] += 1
        self._endings[f"{ending.kind}: {how}"] += 1
        self._accepted += ending.started > 0
        # At the door, or when it had waited for too long, or would have.
        self._refused += ending.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        self._tokens += ending.tokens
        self._wrong += [f"{ending.kind}: {wrong}" for wrong in ending.wrong]

    async def _sample(self) -> None:
        while True:
            for name, process in self._processes().items():
                self._rss[name].append(process.rss_bytes)
            await asyncio.sleep(SAMPLE_S)

    async def _all_left(self) -> dict[str, int]:
        """Waits until the engine has nobody's work; what it still has after EMPTY_WITHIN_S."""
        give_up_at = time.monotonic() + EMPTY_WITHIN_S
        while True:
            load = (await asyncio.to_thread(self._client.status)).load
            left = {
                "running": load.running_requests,
                "waiting": load.waiting_requests,
                "kv_blocks": load.kv_blocks_used,
            }
            if not any(left.values()) or time.monotonic() > give_up_at:
                return left
            await asyncio.sleep(0.1)

    def _processes(self) -> dict[str, Process]:
        return {name: _look_at(pid) for name, pid in self._pids.items()}


def drift_of(samples: Sequence[int]) -> dict[str, float]:
    """How far a process's memory moved over the last half of the time.

    Args:
        samples: Bytes, evenly spaced.
    """
    half = samples[len(samples) // 2 :] or samples
    size = max(1, len(half) // MEMORY_WINDOWS)
    medians = [statistics.median(half[first : first + size]) for first in range(0, len(half), size)]
    return {
        "at_start": samples[0],
        "at_half": medians[0],
        "at_end": medians[-1],
        "drift": max(medians) / min(medians) - 1,
    }


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _look_at(pid: int) -> Process:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return Process(
        rss_bytes=int(fields["VmRSS"].split()[0]) * 1024,
        threads=int(fields["Threads"]),
        files=len(list(Path(f"/proc/{pid}/fd").iterdir())),
    )
