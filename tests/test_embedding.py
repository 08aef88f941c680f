"""Embedding rows from disk: the same bits as the embedding in memory, and who fails with them."""

import errno
import os
import threading
import time
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from moe_server.budget import plan_memory
from moe_server.checkpoint import EMBEDDING, read_checkpoint
from moe_server.config import load_config
from moe_server.dense import Int8Embedding
from moe_server.embedding import StoredEmbedding
from moe_server.errors import MoeServerError, Reason
from moe_server.kernels.formats import WeightFormat
from moe_server.pack import pack
from moe_server.packed import StoreFormat
from tests.driver import greedy, run, running_engine, token_ids
from tests.test_exactness import YARN, told
from tests.tiny import Tiny

VOCAB = 1500
TINY = Tiny(dtype="bfloat16", seed=50, vocab=VOCAB)
NEW_TOKENS = 16
WAIT_S = 20.0
# Ids that repeat, near ones that share a block of int8 rows, both ends.
PROMPTS = [
    [5, 5, 1499, 0, 17, 18, 5, 1400, 31, 16, 15],
    [700 + 9 * step for step in range(80)],
    [0],
    [1499, 1498],
]
SOURCES = {
    "bf16 shards": TINY,
    "fp32 shards": Tiny(seed=51, vocab=VOCAB, max_shard="100KB"),
    "fp16 shards, odd width": Tiny(dtype="float16", seed=52, vocab=VOCAB, hidden=52, head_dim=10),
    "transformers' module": Tiny(dtype="bfloat16", seed=53, vocab=VOCAB, rope=YARN),
}
STORES = {
    "bf16 store": StoreFormat(WeightFormat.BFLOAT16, WeightFormat.BFLOAT16, 128),
    "int4 store, dense int8": StoreFormat(
        WeightFormat.BFLOAT16, WeightFormat.INT4, 32, dense_int8=True
    ),
    "int8 store of fp32, dense int8": StoreFormat(
        WeightFormat.FLOAT32, WeightFormat.INT8, 64, dense_int8=True
    ),
}
# Fewer places than a prompt has rows, and fewer than a step may have.
FEW = {"device_memory": "min", "max_total_tokens": 256, "scheduler.max_batch_tokens": 64}


def write(name: str, folder: Path) -> Path:
    if name in SOURCES:
        return SOURCES[name].write(folder / "shards")
    store_format = STORES[name]
    source = Tiny(dtype=store_format.dtype.value, seed=54, vocab=VOCAB).write(folder / "source")
    pack(source, folder / "store", store_format, assess=lambda _store, _rounding: {})
    return folder / "store"


def embedding_of(engine) -> nn.Module:
    return engine.model._module.get_submodule(EMBEDDING)


def lookup(engine, ids: torch.Tensor) -> torch.Tensor:
    """What is on disk for tokens of no step."""
    return StoredEmbedding(engine.weights.embedding, engine.model._dtype)(ids)


@pytest.mark.parametrize("name", [*SOURCES, *STORES])
def test_tokens_and_logprobs_are_those_of_the_embedding_in_memory(name, tmp_path):
    path = write(name, tmp_path)
    requests = greedy(PROMPTS, NEW_TOKENS)
    with running_engine(path, **{"scheduler.max_batch_tokens": 64}) as engine:
        held = embedding_of(engine)
        assert isinstance(held, nn.Embedding | Int8Embedding)
        ids = torch.tensor([[0, VOCAB - 1, *range(0, VOCAB, 7), 3, 3, 0]])
        rows = held(ids)
        expected = told(run(engine, requests))
    with running_engine(path, **FEW) as engine:
        stored = embedding_of(engine)
        assert isinstance(stored, StoredEmbedding)
        assert not list(stored.parameters())
        found = lookup(engine, ids)
        assert found.dtype == rows.dtype
        assert found.equal(rows)
        assert told(run(engine, requests)) == expected
        engine.weights.embedding.check_integrity()


def test_a_tied_embedding_and_zero3_s_are_held(tmp_path):
    tied = Tiny(dtype="bfloat16", vocab=VOCAB, tied=True).write(tmp_path / "tied")
    plain = TINY.write(tmp_path / "plain")
    for path, backend in ((tied, "resident"), (plain, "zero3")):
        with running_engine(path, **FEW, dense_backend=backend) as engine:
            assert engine.weights.embedding is None
            run(engine, greedy(PROMPTS[:1], 2))


def test_the_slots_it_makes_room_for_are_there(tmp_path):
    path = TINY.write(tmp_path)
    checkpoint = read_checkpoint(path)
    held = load_config(flags={**FEW, "model": str(path), "dense_backend": "zero3"}, environ={})
    budget = plan_memory(held, checkpoint).minimum_device_bytes
    with running_engine(path, **{**FEW, "device_memory": budget}) as engine:
        rows_bytes = checkpoint.embedding.nbytes - 64 * checkpoint.embedding_layout.block_bytes
        slots = 1 + rows_bytes // checkpoint.record_layout.stride_bytes
        assert slots > 1
        assert len(engine.cache.tiers.on_device.free) == 0
        assert len(engine.cache.tiers.on_device.places) == slots


# Faults


class Disk:
    """os.preadv, with the embedding's rows in the hands of the test."""

    def __init__(self, monkeypatch, path: Path) -> None:
        monkeypatch.setattr("moe_server.offload.reader._RETRY_S", 0.0)
        checkpoint = read_checkpoint(path)
        self._first = checkpoint.embedding.offset
        self._block_bytes = checkpoint.embedding_layout.block_bytes
        self.bad: set[int] = set()
        """Tokens whose rows cannot be read."""
        self.fault = self.fail
        self.failures = 0
        self.released = threading.Event()
        self.hanging = threading.Event()
        self._real = os.preadv
        monkeypatch.setattr(os, "preadv", self._preadv)

    def _preadv(self, descriptor, buffers, offset, *flags):
        start, end = offset, offset + sum(len(buffer) for buffer in buffers)
        for token in self.bad:
            row = self._first + token * self._block_bytes
            if start <= row and row + self._block_bytes <= end and end - start <= 8192:
                self.fault()
        return self._real(descriptor, buffers, offset, *flags)

    def fail(self) -> None:
        self.failures += 1
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def hang(self) -> None:
        self.hanging.set()
        assert self.released.wait(WAIT_S)


# 4096 bytes a row: no two rows in one page.
WIDE = Tiny(dtype="float32", seed=55, vocab=200, hidden=1024, heads=2, head_dim=16, intermediate=32)
WIDE_PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8], [9, 7, 9]]


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> tuple[Path, list[list[int]]]:
    """A checkpoint, and what each prompt's answer is."""
    path = WIDE.write(tmp_path_factory.mktemp("wide"))
    with running_engine(path) as engine:
        requests = greedy(WIDE_PROMPTS, NEW_TOKENS)
        return path, [token_ids(run(engine, [request])[0]) for request in requests]


@pytest.fixture
def disk(monkeypatch, wide) -> Disk:
    return Disk(monkeypatch, wide[0])


def outcome(engine, requests) -> tuple[dict[int, list[int]], dict[int, object]]:
    """Tokens and failures of each request."""
    for request in requests:
        engine.submit(request)
    tokens, failed = {request.request_id: [] for request in requests}, {}
    while not engine.idle:
        done = engine.step()
        for event in done.tokens:
            tokens[event.request_id].append(event.token_id)
        failed |= {failure.request_id: failure for failure in done.failed}
        engine.cache.check_integrity()
        engine.weights.embedding.check_integrity()
        engine.scheduler.check_integrity()
    return tokens, failed


def test_a_row_that_cannot_be_read_fails_those_who_need_it(wide, disk):
    path, answers = wide
    requests = greedy(WIDE_PROMPTS, NEW_TOKENS)
    with running_engine(path, **FEW) as engine:
        for token in (9, answers[0][3]):
            disk.bad = {token}
            tokens, failed = outcome(engine, requests)
            assert failed
            for number, prompt in enumerate(WIDE_PROMPTS):
                # The last token is no step's input.
                needed = [*prompt, *answers[number][:-1]]
                if token not in needed:
                    assert number not in failed
                    assert tokens[number] == answers[number]
                    continue
                come_to = max(0, needed.index(token) - len(prompt) + 1)
                assert tokens[number] == answers[number][:come_to]
                assert failed[number].reason is Reason.UNAVAILABLE
                assert os.strerror(errno.EIO) in failed[number].message
                assert ".safetensors" in failed[number].message
                assert failed[number].remedy
        disk.bad = set()
        assert outcome(engine, requests) == (dict(enumerate(answers)), {})


def test_an_error_that_passes_fails_nobody(wide, disk):
    path, answers = wide
    with running_engine(path, **FEW) as engine:
        disk.bad, seen = {9}, disk.fail

        def once() -> None:
            disk.bad = set()
            seen()

        disk.fault = once
        assert outcome(engine, greedy(WIDE_PROMPTS, NEW_TOKENS)) == (dict(enumerate(answers)), {})
        assert disk.failures == 1
        assert engine.weights.reader.counters.retries == 1


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_one_who_leaves_is_not_waited_for(wide, disk, monkeypatch, how):
    """Its row hangs, and does so until the others have all their tokens."""
    path, answers = wide
    with running_engine(path, **FEW, read_threads=4) as engine:
        now = [time.monotonic()]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        requests = greedy(WIDE_PROMPTS, NEW_TOKENS)
        requests[0] = msgspec.structs.replace(requests[0], deadline=now[0] + 50.0)
        others = WIDE_PROMPTS[1:] + answers[1:]
        only_first = 4
        assert all(only_first not in tokens for tokens in others)
        disk.bad, disk.fault = {only_first}, disk.hang

        def leave() -> None:
            if disk.hanging.is_set() and how == "cancelled":
                engine.cancel(0)
            elif disk.hanging.is_set():
                now[0] += 100.0

        engine._poll = leave
        tokens, failed = outcome(engine, requests)
        assert not disk.released.is_set()
        assert tokens == {0: [], **dict(enumerate(answers[1:], 1))}
        assert [failure.reason for failure in failed.values()] == (
            [Reason.EXPIRED] if how == "expired" else []
        )
        disk.bad = set()
        disk.released.set()
        engine._poll = lambda: None
        assert outcome(engine, greedy(WIDE_PROMPTS, NEW_TOKENS))[0] == dict(enumerate(answers))


def test_a_shutdown_does_not_wait_for_a_row(wide, disk):
    with running_engine(wide[0], **FEW) as engine:
        disk.bad, disk.fault = {9}, disk.hang
        engine._poll = lambda: engine.cancel_all() if disk.hanging.is_set() else None
        for request in greedy(WIDE_PROMPTS, NEW_TOKENS):
            engine.submit(request)
        done = engine.step()
        assert not disk.released.is_set()
        assert (done.tokens, done.failed, engine.idle) == ([], [], True)
        disk.released.set()


def test_a_store_s_rows_are_held_to_its_checksums(tmp_path):
    path = write("int4 store, dense int8", tmp_path)
    tensor = read_checkpoint(path).embedding
    content = tensor.file.read_bytes()
    requests = greedy([[5, 6], [800]], 1)
    with running_engine(path, **FEW) as engine:
        answers = outcome(engine, requests)[0]
        with tensor.file.open("r+b") as file:
            file.seek(tensor.offset)
            file.write(bytes([content[tensor.offset] ^ 1]))
        tokens, failed = outcome(engine, requests)
        assert tokens == {0: [], 1: answers[1]}
        assert "checksum" in failed[0].message
        tensor.file.write_bytes(content)
    with tensor.file.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(bytes([content[tensor.offset] ^ 1]))
    with pytest.raises(MoeServerError, match="checksum"), running_engine(path, **FEW):
        pass
