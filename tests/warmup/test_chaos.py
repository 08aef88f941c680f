"""What keeps a real server from serving, and what it does about it: what needs no root.

The server is the command that an operator starts, on a tiny checkpoint in several shards with
places for few of its experts, so that every stage reads; `benchmarks.faults` slows and breaks it.
"""

from dataclasses import dataclass

import pytest

from benchmarks import chaos
from benchmarks.coldstart_ready import model_bytes
from benchmarks.scene import Outcome, Served
from tests.tiny import Tiny

LOAD_S = 0.8
"""What a load takes at least, so that its stages are seen."""
CAUSE_S = 1.0
TIMEOUT_S = 90.0
STAGES = ("libraries", "dense weights", "experts in memory", "every expert")

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Set:
    """A server that can be disturbed, and an undisturbed one's places."""

    served: Served
    places: list[str]
    slow_bytes_per_s: float


@pytest.fixture(scope="module")
def on(tmp_path_factory) -> Set:
    folder = tmp_path_factory.mktemp("chaos")
    tiny = Tiny(dtype="bfloat16", seed=40, layers=3, experts=8, top_k=2, max_shard="200KB")
    path = tiny.write(folder / "model")
    flags = ("--dense-backend", "resident", "--device-memory", "min", "--max-total-tokens", "256")
    slow_bytes_per_s = model_bytes(path).whole / LOAD_S
    served, moments = chaos.undisturbed(
        Served(str(path), path, flags, folder, TIMEOUT_S), slow_bytes_per_s
    )
    return Set(served, chaos.places(moments), slow_bytes_per_s)


def assert_stood(outcome: Outcome) -> None:
    assert outcome.problems == ()
    assert outcome.said
    assert outcome.recovered_s is not None


def test_every_stage_is_seen(on):
    loading = [place for place in on.places if place.startswith("loading")]
    assert loading == [f"loading: {stage}" for stage in STAGES]
    assert [place.split(":")[0] for place in on.places if place not in loading] == [
        "starting",
        "warming",
        "warming",
        "ready",
    ]


@pytest.mark.parametrize("first", [0, 1])
def test_an_engine_is_killed_at_every_stage(on, first):
    # Every other one: the pause before the next engine doubles each time.
    assert_stood(chaos.killed_engine(on.served, on.places[first::2], on.slow_bytes_per_s))


def test_a_server_is_killed_at_every_stage(on):
    assert_stood(chaos.killed_server(on.served, on.places, on.slow_bytes_per_s))


def test_reads_fail_from_the_start(on):
    outcome = chaos.read_error(on.served, while_ready=False, broken_s=CAUSE_S)
    assert_stood(outcome)
    assert "Input/output error" in outcome.said


def test_reads_fail_while_ready(on):
    outcome = chaos.read_error(on.served, while_ready=True, broken_s=CAUSE_S)
    assert outcome.problems == ()
    assert outcome.recovered_s is not None


@pytest.mark.parametrize("from_the_start", [False, True])
def test_a_shard_is_missing_for_a_while(on, from_the_start):
    assert_stood(chaos.missing_shard(on.served, from_the_start=from_the_start, away_s=CAUSE_S))


def test_a_shard_is_still_being_copied(on):
    assert_stood(chaos.cut_shard(on.served, CAUSE_S))
