"""A start computes every expert once, and begins with it before the last one is there."""

import os
import threading
from collections import Counter

import pytest

from moe_server.checkpoint import read_checkpoint
from moe_server.layer_experts import LayerExperts
from moe_server.offload.layout import PAGE_BYTES, ExpertId
from tests.driver import running_engine
from tests.tiny import Tiny

TINY = Tiny(dtype="bfloat16", seed=40, layers=3, experts=8, top_k=2)
WAIT_S = 20.0


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return TINY.write(tmp_path_factory.mktemp("preload"))


class Touches:
    """What was computed, in order."""

    def __init__(self, monkeypatch) -> None:
        self.experts: list[ExpertId] = []
        self.begun = threading.Event()
        real = LayerExperts.touch

        def touch(experts, layer, expert):
            real(experts, layer, expert)
            self.experts.append(ExpertId(layer, expert))
            self.begun.set()

        monkeypatch.setattr(LayerExperts, "touch", touch)


@pytest.mark.parametrize("device_memory", [None, "min"])
def test_every_expert_is_computed_once(path, monkeypatch, device_memory):
    touches = Touches(monkeypatch)
    flags = {} if device_memory is None else {"device_memory": device_memory}
    with running_engine(path, max_total_tokens=256, **flags) as engine:
        engine.cache.check_integrity()
        expected = Counter(
            ExpertId(layer, expert)
            for layer in range(TINY.layers)
            for expert in range(TINY.experts)
        )
        assert Counter(touches.experts) == expected


def test_the_first_are_computed_while_the_last_is_still_read(path, monkeypatch):
    touches, waited = Touches(monkeypatch), []
    real = os.preadv
    experts = read_checkpoint(path).experts.values()
    last = max(parts[0].file_offset for parts in experts)

    def preadv(descriptor, buffers, offset, *flags):
        if offset // PAGE_BYTES == last // PAGE_BYTES:
            waited.append(touches.begun.wait(WAIT_S))
        return real(descriptor, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", preadv)
    with running_engine(path):
        assert waited
        assert all(waited)
