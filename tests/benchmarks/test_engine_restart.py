"""The restart's measurement, on a tiny model: everything it starts ends, and streams are told."""

import subprocess

import pytest

from benchmarks import engine_restart
from benchmarks.engine_restart import Restart, measure, ratio
from tests.tiny import Tiny


def servers() -> str:
    command = ["pgrep", "-f", "bench-engine.sock"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def test_ratios_are_within_one_servers_life() -> None:
    # The machine got four times slower meanwhile.
    assert ratio([Restart(10.0, 2.0, 0, 8), Restart(40.0, 8.0, 0, 8)]) == pytest.approx(0.2)


def test_a_server_is_measured_and_ended(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(engine_restart, "drop_page_cache", lambda: None)
    monkeypatch.setattr(engine_restart, "NUM_STREAMS", 2)
    monkeypatch.setattr(engine_restart, "NEW_TOKENS", 400)
    (tmp_path / "logs").mkdir()
    found = measure(Tiny(dtype="bfloat16", vocab=8000).write(tmp_path / "model"), tmp_path)
    assert found.first_ready_s > 0
    assert found.ready_again_s > 0
    assert found.streams_told_to_retry in (1, 2)  # a stream of so small a model may have ended
    assert not servers()
