"""The soak in short: everything but the growth of memory, which half a minute does not show."""

import grpc
import pytest

from benchmarks import soak, soak_engine
from benchmarks.soak import drift_of
from benchmarks.soak_clients import Ending, _judged, _read, reached
from tests.front_door import front_door, request

KINDS = {"plain", "cancelling", "hurried", "vanishing", "stalled", "wrong"}


@pytest.mark.timeout(300)
def test_an_overloaded_server_keeps_its_promises(tmp_path) -> None:
    found = soak.run(20, tmp_path, seed=1, capacity_s=3)
    assert not found.wrong
    assert set(found.requests) == KINDS
    assert found.accepted > 20
    assert found.refused > 20
    assert found.arrivals_per_s > 2 * found.capacity_per_s
    assert found.left_over == {"running": 0, "waiting": 0, "kv_blocks": 0}
    for name, before in found.before.items():
        assert found.after[name].files <= before.files + 2
        assert found.after[name].threads <= before.threads + 2


def test_the_engines_books_are_right_throughout() -> None:
    found = soak_engine.run(8, seed=2)
    assert not found.wrong
    assert found.blocks_left == 0
    assert min(found.finished, found.failed, found.cancelled) > 0
    assert found.finished + found.failed + found.cancelled == found.requests


def test_growth_within_the_last_half_is_drift_and_a_peak_before_is_not() -> None:
    assert drift_of([300, 500, *[100] * 8])["drift"] == 0
    assert drift_of([100] * 10 + [100, 102, 104, 106, 108] * 2)["drift"] == pytest.approx(6 / 101)
    assert drift_of([100] * 50 + list(range(100, 150)))["drift"] > 0.3


@pytest.mark.parametrize(
    ("ending", "wrong"),
    [
        (Ending("plain", started=1, finished=1), ""),
        (Ending("plain", started=1, finished=0), "0 of 1 samples"),
        (Ending("plain", started=1, finished=2), "2 ends"),
        (Ending("plain", started=2, finished=1), "started 2 times"),
        (Ending("plain", started=1, finished=0, left=True), ""),
        (Ending("plain", started=1, finished=1, tokens=3, counted_tokens=2), "3 tokens came"),
        (Ending("plain", code=grpc.StatusCode.UNAVAILABLE), "without RetryInfo"),
        (Ending("plain", code=grpc.StatusCode.UNAVAILABLE, has_retry_info=True), ""),
        (Ending("plain", code=grpc.StatusCode.INTERNAL), "INTERNAL"),
    ],
)
def test_what_no_request_may_do_is_seen(ending, wrong) -> None:
    told = _judged(ending, 1).wrong
    assert (not told) if not wrong else any(wrong in one for one in told)


async def test_a_request_that_is_never_answered_is_seen(monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.soak_clients.GIVE_UP_S", 0.2)
    async with (
        front_door("--slow-token", "41", "--slow-s", "3") as door,
        reached(door.server.address, 100) as target,
    ):
        ending = await _read(target.stub, request([40]), "plain")
    assert ending.wrong == ["no end within 0.2 s"]
