"""An engine whose disk fails it: who must fail does, everybody else gets the right tokens."""

import errno
import os
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from moe_server.budget import plan_memory
from moe_server.checkpoint import read_checkpoint
from moe_server.config import load_config
from moe_server.errors import Reason
from moe_server.kernels.formats import WeightFormat
from moe_server.messages import RequestFailed, StepDone, Submit
from moe_server.offload.layout import PAGE_BYTES
from moe_server.pack import pack
from moe_server.packed import StoreFormat
from tests.driver import greedy, run, running_engine, token_ids
from tests.tiny import Tiny

TINY = Tiny(dtype="bfloat16", seed=40, layers=3, experts=8, top_k=2)
STORES = {
    "shards": None,
    "bf16": StoreFormat(WeightFormat.BFLOAT16, WeightFormat.BFLOAT16, 128),
    "int4": StoreFormat(WeightFormat.BFLOAT16, WeightFormat.INT4, 32),
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7, 1, 8], [1, 6, 1, 8, 0, 3, 3], [1, 4, 1]]
NEW_TOKENS = 12
WAIT_S = 20.0


@dataclass(frozen=True)
class Served:
    """A checkpoint, and what an undisturbed engine says to each of the prompts alone."""

    path: Path
    answers: list[list[int]]


@pytest.fixture(scope="module", params=STORES)
def served(request, tmp_path_factory) -> Served:
    path = TINY.write(tmp_path_factory.mktemp("source"))
    store_format = STORES[request.param]
    if store_format is not None:
        store = tmp_path_factory.mktemp("store") / "packed"
        pack(path, store, store_format, assess=lambda _store, _rounding: {})
        path = store
    return Served(path, undisturbed(path))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Served:
    path = TINY.write(tmp_path_factory.mktemp("shards"))
    return Served(path, undisturbed(path))


def undisturbed(path: Path) -> list[list[int]]:
    with running_engine(path) as engine:
        return [token_ids(run(engine, [request])[0]) for request in greedy(PROMPTS, NEW_TOKENS)]


def served_paged(path: Path, **flags):
    """An engine with fewer slots than a layer of all requests wants."""
    return running_engine(path, device_memory="min", max_total_tokens=256, **flags)


def with_slots(path: Path, num_slots: int):
    """An engine with places that reads can begin into while others hang."""
    flags = {"model": str(path), "max_total_tokens": 256}
    smallest = plan_memory(
        load_config(flags={**flags, "device_memory": "min"}, environ={}), read_checkpoint(path)
    )
    device_memory = smallest.minimum_device_bytes + (num_slots - 1) * smallest.slot_bytes
    return running_engine(path, device_memory=device_memory, max_total_tokens=256)


@dataclass
class Outcome:
    """What became of the requests of one run."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    failed: dict[int, RequestFailed] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)

    def take(self, done: StepDone) -> None:
        for event in done.tokens:
            assert event.request_id not in self.failed.keys() | self.cancelled
            self.tokens.setdefault(event.request_id, []).append(event.token_id)
        for failure in done.failed:
            assert failure.request_id not in self.failed, "failed twice"
            self.failed[failure.request_id] = failure


def step(engine, outcome: Outcome) -> None:
    done = engine.step()
    outcome.take(done)
    engine.cache.check_integrity()
    if engine.weights.embedding is not None:
        engine.weights.embedding.check_integrity()
    engine.scheduler.check_integrity()


def finish(engine, outcome: Outcome) -> Outcome:
    while not engine.idle:
        step(engine, outcome)
    load = engine.step().load
    assert (load.running, load.waiting, load.blocks_used) == (0, 0, 0)
    return outcome


def assert_serves(engine, served: Served) -> None:
    """Everything is as if nothing had happened."""
    events = run(engine, greedy(PROMPTS, NEW_TOKENS))
    assert [token_ids(one) for one in events] == served.answers


class Disk:
    """os.preadv, with whatever fault the test sets."""

    def __init__(self, monkeypatch) -> None:
        # A second attempt is as good at once as after a pause.
        monkeypatch.setattr("moe_server.offload.reader._RETRY_S", 0.0)
        self.fault = None
        self.real = os.preadv

        def preadv(descriptor, buffers, offset, *flags):
            if self.fault is not None:
                return self.fault(descriptor, buffers, offset, *flags)
            return self.real(descriptor, buffers, offset, *flags)

        monkeypatch.setattr(os, "preadv", preadv)


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)


def ranges_of(engine, layer: int, expert: int) -> list[tuple[int, int]]:
    checkpoint = engine.model.checkpoint
    segments = next(
        checkpoint.record_segments(one)
        for one in checkpoint.experts
        if (one.layer, one.expert) == (layer, expert)
    )
    return [(one.file_offset, one.file_offset + one.nbytes) for one in segments]


def experts_wanted(engine, request: Submit, num_steps: int) -> set[tuple[int, int]]:
    """The experts that a request's first steps want, found by watching the cache."""
    wanted, acquire = set(), engine.cache.acquire

    def watching(layer, experts, *args):
        wanted.update((layer, expert) for expert in experts)
        return acquire(layer, experts, *args)

    engine.cache.acquire = watching
    engine.submit(request)
    for _ in range(num_steps):
        engine.step()
    engine.cancel(request.request_id)
    engine.cache.acquire = acquire
    return wanted


# Faults


def test_only_requests_that_want_the_unreadable_expert_fail(shards, disk):
    with served_paged(shards.path) as engine:
        requests = greedy(PROMPTS, NEW_TOKENS)
        wanted = [experts_wanted(engine, request, NEW_TOKENS) for request in requests]
        tried = 0
        for layer, expert in sorted(set().union(*wanted)):
            victims = {n for n, experts in enumerate(wanted) if (layer, expert) in experts}
            if len(victims) == len(requests):
                continue
            tried += 1
            # Nothing of it is in memory: others took its place.
            for other in range(TINY.experts):
                if other != expert:
                    engine.model.experts.touch(layer, other)
            assert_not_near(engine, layer, expert)
            disk.fault = breaking(disk, ranges_of(engine, layer, expert))
            for request in requests:
                engine.submit(request)
            outcome = finish(engine, Outcome())
            disk.fault = None
            assert_told(outcome, shards, victims)
        assert tried > 5
        assert_serves(engine, shards)


def breaking(disk: Disk, lost: list[tuple[int, int]]):
    """Reads that reach the middle of one of these ranges fail; pages at their ends are shared."""
    middles = [(start + stop) // 2 for start, stop in lost]

    def fault(descriptor, buffers, offset, *flags):
        end = offset + sum(len(buffer) for buffer in buffers)
        if any(offset <= middle < end for middle in middles):
            raise OSError(errno.EIO, "Input/output error")
        return disk.real(descriptor, buffers, offset, *flags)

    return fault


def assert_told(outcome: Outcome, served: Served, victims: set[int]) -> None:
    """Nobody was told a wrong token, all but `victims` everything, and they why not."""
    for number, answer in enumerate(served.answers):
        told = outcome.tokens.get(number, [])
        assert told == answer[: len(told)]
        assert number in victims or told == answer
    assert set(outcome.failed) == victims
    for failure in outcome.failed.values():
        assert failure.reason is Reason.UNAVAILABLE
        assert "Input/output error" in failure.message
        assert failure.remedy


def assert_not_near(engine, layer: int, expert: int) -> None:
    cache = engine.cache
    near = (*cache._on_device.places, *cache._in_host.places, *cache._coming)
    assert all((one.layer, one.expert) != (layer, expert) for one in near)


class Faults:
    """Random mixtures of what can happen to a read, by seed."""

    def __init__(self, disk: Disk, seed: int, *, flips: bool) -> None:
        self._choose = random.Random(seed)
        self._disk = disk
        self._kinds = ["eio", "short", "slow"] + ["flip"] * flips
        self._lock = threading.Lock()
        self.rate = 0.0
        self.happened = dict.fromkeys(["eio", "short", "slow", "flip"], 0)
        disk.fault = self._fault

    def _fault(self, descriptor, buffers, offset, *flags):
        with self._lock:
            kind = None
            if self._choose.random() < self.rate:
                kind = self._choose.choice(self._kinds)
                self.happened[kind] += 1
            at = self._choose.random()
        if kind == "eio":
            raise OSError(errno.EIO, "Input/output error")
        if kind == "slow":
            time.sleep(0.002)
        count = self._disk.real(descriptor, buffers, offset, *flags)
        [buffer] = buffers
        content = memoryview(buffer).cast("B")
        if kind == "flip" and count:
            content[int(at * count)] ^= 1 << int(at * 8)
        if kind == "short" and count > 1:
            count = max(1, int(at * count)) // 4096 * 4096 or count
        return count


@pytest.mark.parametrize("seed", range(2))
def test_faults_at_random_never_give_wrong_tokens(served, disk, seed):
    flips = (served.path / "moe_server.json").exists()
    choose = random.Random(seed)
    budgets = [{}, {"host_memory": 100_000}][seed]
    with served_paged(served.path, **budgets) as engine:
        faults = Faults(disk, seed, flips=flips)
        completed = failures = 0
        for number in range(9):
            # Below, between and beyond what trying again mends.
            faults.rate = (0.05, 0.3, 0.6)[number % 3]
            outcome = Outcome()
            chosen = [choose.randrange(len(PROMPTS)) for _ in range(choose.randint(1, 6))]
            for request_id, prompt in enumerate(chosen):
                engine.submit(Submit(request_id, PROMPTS[prompt], NEW_TOKENS, []))
                if choose.random() < 0.5 and not engine.idle:
                    step(engine, outcome)
                if choose.random() < 0.1:
                    engine.cancel(request_id)
                    outcome.cancelled.add(request_id)
            finish(engine, outcome)
            for request_id, prompt in enumerate(chosen):
                told = outcome.tokens.get(request_id, [])
                assert told == served.answers[prompt][: len(told)]
                if request_id not in outcome.cancelled:
                    assert (len(told) == NEW_TOKENS) != (request_id in outcome.failed)
                completed += len(told) == NEW_TOKENS
            failures += len(outcome.failed)
            for failure in outcome.failed.values():
                assert failure.reason is Reason.UNAVAILABLE
                assert failure.remedy
        assert completed > 3
        assert failures > 3
        kinds = {kind for kind, count in faults.happened.items() if count}
        assert kinds == {"eio", "short", "slow"} | ({"flip"} if flips else set())
        faults.rate = 0.0
        assert_serves(engine, served)


@pytest.mark.parametrize("served", ["bf16", "int4"], indirect=True)
def test_a_flipped_bit_on_the_disk_is_found_and_names_its_place(served, disk):
    experts = sorted(served.path.glob("experts-*"))
    contents = [file.read_bytes() for file in experts]
    with served_paged(served.path) as engine:
        for file, content in zip(experts, contents, strict=True):
            start = 8 + int.from_bytes(content[:8], "little")
            with file.open("r+b") as stream:
                stream.write(content[:start] + bytes(byte ^ 1 for byte in content[start:]))
        for request in greedy(PROMPTS, NEW_TOKENS):
            engine.submit(request)
        outcome = finish(engine, Outcome())
        assert len(outcome.failed) == len(PROMPTS)
        for failure in outcome.failed.values():
            assert failure.reason is Reason.UNAVAILABLE
            assert "checksum" in failure.message
            assert "experts-" in failure.message
            assert "from byte " in failure.message
        assert engine.weights.reader.counters.mismatches >= 3
        for file, content in zip(experts, contents, strict=True):
            with file.open("r+b") as stream:
                stream.write(content)
        assert_serves(engine, served)


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_shards_damaged_under_the_server(shards, damage):
    files = sorted(shards.path.glob("*.safetensors"))
    contents = [file.read_bytes() for file in files]
    with served_paged(shards.path, verify=True) as engine:
        for file, content in zip(files, contents, strict=True):
            if damage == "truncated":
                os.truncate(file, 4096)
            else:
                with file.open("r+b") as stream:
                    stream.write(content[:8192] + bytes(len(content) - 8192))
        for request in greedy(PROMPTS, NEW_TOKENS):
            engine.submit(request)
        outcome = finish(engine, Outcome())
        # In place, as they have been open ever since.
        for file, content in zip(files, contents, strict=True):
            with file.open("r+b") as stream:
                stream.write(content)
        assert set(outcome.failed) == set(range(len(PROMPTS)))
        said = {"truncated": "it ends at byte 4096", "changed": "checksum"}[damage]
        assert all(said in failure.message for failure in outcome.failed.values())
        assert_serves(engine, shards)


# Leaving while a step waits for the disk


class Hang:
    """Reads of experts that hang, all from now on, and a poll that acts while they do."""

    def __init__(self, disk: Disk, engine) -> None:
        self.hanging = threading.Event()
        self.released = threading.Event()
        self.actions = []
        """Called one by one, each in a poll of its own, once a read hangs."""
        self.num_reads = 0
        self._real = disk.real
        # In the same shard.
        embedding = engine.model.checkpoint.embedding
        self._row_offsets = range(
            embedding.offset // PAGE_BYTES * PAGE_BYTES, embedding.offset + embedding.nbytes
        )
        disk.fault = self._fault
        engine._poll = self._poll

    def _fault(self, descriptor, buffers, offset, *flags):
        if offset not in self._row_offsets:
            self.num_reads += 1
            self.hanging.set()
            assert self.released.wait(WAIT_S)
        return self._real(descriptor, buffers, offset, *flags)

    def _poll(self) -> None:
        if self.hanging.is_set() and self.actions:
            self.actions.pop(0)()


def queued_tickets(engine) -> int:
    reader = engine.weights.reader
    with reader.lock:
        return sum(len(queue) for queue in reader._queues.values())


def begin(engine, requests, outcome: Outcome, num_steps: int) -> None:
    for request in requests:
        engine.submit(request)
    for _ in range(num_steps):
        step(engine, outcome)


@pytest.mark.parametrize("num_steps", [0, 3])
def test_everybody_leaving_during_a_step_ends_its_reads(shards, disk, num_steps):
    with with_slots(shards.path, 5) as engine:
        requests = greedy(PROMPTS, NEW_TOKENS)
        begin(engine, requests, outcome := Outcome(), num_steps)
        read = watched_reads(engine)
        hang = Hang(disk, engine)
        left = [0.0]

        def leave() -> None:
            for request in requests:
                engine.cancel(request.request_id)
            read.clear()
            left[0] = time.perf_counter()

        hang.actions = [leave]
        before = {number: list(tokens) for number, tokens in outcome.tokens.items()}
        done = engine.step()
        took_s = time.perf_counter() - left[0]
        # The reads still hang: nobody waited for them.
        assert not hang.released.is_set()
        assert (done.tokens, done.failed) == ([], [])
        assert outcome.tokens == before
        assert queued_tickets(engine) == 0
        assert not read, "reads were begun that nobody wanted"
        assert done.load.blocks_used == 0
        assert took_s < 1.0, f"the step ended {took_s:.3f} s after all had left"
        engine.cache.check_integrity()
        hang.released.set()
        disk.fault = None
        assert_serves(engine, shards)


@pytest.mark.parametrize("how", ["cancelled", "expired"])
@pytest.mark.parametrize("num_steps", [0, 3])
def test_one_leaving_during_a_step_leaves_the_others_their_tokens(
    shards, disk, monkeypatch, how, num_steps
):
    with served_paged(shards.path) as engine:
        now = [time.monotonic()]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        requests = greedy(PROMPTS, NEW_TOKENS)
        requests[0] = msgspec.structs.replace(requests[0], deadline=now[0] + 50.0)
        begin(engine, requests, outcome := Outcome(), num_steps)
        hang = Hang(disk, engine)

        def leave() -> None:
            if how == "cancelled":
                engine.cancel(0)
                outcome.cancelled.add(0)
            else:
                now[0] += 100.0

        hang.actions = [leave, hang.released.set]
        step(engine, outcome)
        assert len(outcome.tokens.get(0, [])) == num_steps
        assert hang.released.is_set()
        finish(engine, outcome)
        assert {number: outcome.tokens[number] for number in (1, 2, 3)} == dict(
            enumerate(shards.answers[1:], 1)
        )
        if how == "expired":
            assert outcome.failed[0].reason is Reason.EXPIRED
        assert set(outcome.failed) == ({0} if how == "expired" else set())
        disk.fault = None
        assert_serves(engine, shards)


def test_reads_that_only_the_one_who_left_wanted_leave_the_queue(shards, disk):
    with served_paged(shards.path, prefetch=False) as engine:
        requests = greedy(PROMPTS[:2], 1)
        wanted = [experts_wanted(engine, request, 1) for request in requests]
        only_first = wanted[0] - wanted[1]
        assert only_first
        read = watched_reads(engine)
        hang = Hang(disk, engine)
        hang.actions = [lambda: engine.cancel(0), hang.released.set]
        begin(engine, requests, outcome := Outcome(), 1)
        assert outcome.tokens == {1: shards.answers[1][:1]}
        # At most those that were being read when it left.
        begun = [one for one in read if one in only_first]
        assert len(begun) <= 2
        assert all(not read[one].complete for one in begun[1:])


def watched_reads(engine):
    """Tickets of the experts that are read from now on, by (layer, expert)."""
    tickets, real = {}, engine.cache._fetches.start

    def reading(expert, *args):
        fetch = real(expert, *args)
        tickets[expert.layer, expert.expert] = fetch.ticket
        return fetch

    engine.cache._fetches.start = reading
    return tickets


def test_a_shutdown_during_a_step_ends_it(shards, disk):
    with served_paged(shards.path) as engine:
        begin(engine, greedy(PROMPTS, NEW_TOKENS), Outcome(), 1)
        hang = Hang(disk, engine)
        hang.actions = [engine.cancel_all]
        done = engine.step()
        assert not hang.released.is_set()
        assert (done.tokens, done.failed, engine.idle) == ([], [], True)
        hang.released.set()
