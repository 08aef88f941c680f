"""The throughput's two arms, on a tiny model: the same tokens, from the same expert memory."""

import pytest

from benchmarks import engine_pieces, engine_throughput
from benchmarks.engine_server import ServerFailedError
from benchmarks.engine_throughput import Round, measure, summarised
from tests.tiny import Tiny


def test_server_and_bare_model_give_the_same_tokens(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(engine_throughput, "BATCHES", (2, 3))
    (tmp_path / "logs").mkdir()
    path = Tiny(dtype="bfloat16", vocab=8000).write(tmp_path / "model")
    try:
        rounds = measure(path, tmp_path, 1, 24)
    except ServerFailedError as error:
        pytest.skip(str(error))
    assert [one.batch for one in rounds] == [2, 3]
    for one in rounds:
        assert one.same_tokens
        assert one.server_tokens_per_s > 0
        assert one.bare_tokens_per_s > 0


def test_a_ratio_is_the_median_of_neighbours() -> None:
    # The machine got slower between the rounds, not the server.
    speeds = [(90.0, 100.0), (9.0, 10.0), (40.0, 50.0)]
    rounds = [Round(8, *pair, True, 1.0, 2.0, 98.0, 95.0) for pair in speeds]
    found = summarised(rounds)["b8"]
    assert found["ratio"] == pytest.approx(0.9)
    assert found["processor_ratio"] == pytest.approx(0.95)
    assert rounds[0].overhead_ms == pytest.approx(8 * (1000 / 90 - 10))


def test_pieces_are_all_measured(monkeypatch) -> None:
    monkeypatch.setattr(engine_pieces, "STEPS", 5)
    monkeypatch.setattr(engine_pieces, "WARM_STEPS", 1)
    pieces = engine_pieces.measure(4)
    assert min(pieces.values()) > 0
    assert pieces["sample"] < pieces[engine_pieces.OTHERS]
