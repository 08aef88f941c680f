"""A benchmark whose part fails."""

import json
from pathlib import Path

import pytest

from benchmarks import parts
from benchmarks.models import ModelFolder


def noting(name: str):
    def part(report: parts.Report, _repetitions: int | None) -> None:
        report.results[name] = "found"
        report.ratios[f"{name}/limit"] = 1.0

    return part


def failing(_report: parts.Report, _repetitions: int | None) -> None:
    raise RuntimeError("the disk is gone")


def report_of(tmp_path: Path, names: list[str]) -> parts.Report:
    models = ModelFolder(tmp_path / "models", 0, Path)
    return parts.Report(tmp_path, models, names, quick=False)


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("benchmarks.checkout.RESULTS", tmp_path / "results")
    monkeypatch.setattr("benchmarks.checkout.commit", lambda: "abc")
    return tmp_path / "results"


def test_a_part_that_fails_costs_no_other_its_results(tmp_path, kept, capsys):
    every = {"one": noting("one"), "two": failing, "three": noting("three")}
    benchmark = parts.Benchmark("named", list(every), {}, {"one/limit": 2, "three/limit": 2})
    report = report_of(tmp_path, list(every))
    benchmark.run(every, report, None)
    assert benchmark.tell(report, lambda _picture: None) == 1
    [file] = kept.iterdir()
    assert file.name == "named-one-three-abc.json"  # not under the name of the whole
    found = json.loads(file.read_text())
    assert found["results"] == {"one": "found", "three": "found"}
    assert found["failed"] == {"two": "RuntimeError('the disk is gone')"}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found


def test_nothing_is_kept_where_every_part_failed(tmp_path, kept):
    benchmark = parts.Benchmark("named", ["two"], {}, {})
    report = report_of(tmp_path, ["two"])
    benchmark.run({"two": failing}, report, None)
    assert benchmark.tell(report, lambda _picture: None) == 1
    assert not kept.exists()


def test_a_whole_run_succeeds(tmp_path, kept):
    benchmark = parts.Benchmark("named", ["one"], {}, {"one/limit": 2})
    report = report_of(tmp_path, ["one"])
    benchmark.run({"one": noting("one")}, report, None)
    assert benchmark.tell(report, lambda _picture: None) == 0
    assert [file.name for file in kept.iterdir()] == ["named-abc.json"]
