"""What `benchmarks/gpu.sh` leaves behind is told whatever became of its parts."""

import json
import sys

from benchmarks import gpu_report

NVIDIA_SMI = """
|=========================================+========================+======================|
|   0  NVIDIA A100-SXM4-80GB          On  |   00000000:00:04.0 Off |                    0 |
"""


def run(monkeypatch, capsys, out) -> tuple[int, str, dict]:
    monkeypatch.setattr(sys, "argv", ["gpu_report", str(out)])
    code = gpu_report.main()
    table, _, line = capsys.readouterr().out.rstrip().rpartition("\n")
    assert json.loads((out / "gpu.json").read_text()) == json.loads(line)
    return code, table, json.loads(line)


def test_a_part_that_failed_hides_no_other(tmp_path, monkeypatch, capsys):
    for part in gpu_report.PARTS:
        (tmp_path / f"{part}.status").write_text("ok\n")
        (tmp_path / f"{part}.log").write_text("")
    (tmp_path / "machine.log").write_text(NVIDIA_SMI)
    rates = {"memory_gb_per_s": 1500.0, "experts/int4/t1/of_memory": 0.8}
    (tmp_path / "rates.log").write_text(f"{{not json\n{json.dumps(rates)}\nbye\n")
    (tmp_path / "routing.log").write_text(json.dumps({"gpu": {"parts": {"1": 2.5}}, "name": "x"}))
    code, table, line = run(monkeypatch, capsys, tmp_path)
    assert code == 0
    assert line["hardware"] == "NVIDIA A100-SXM4-80GB"
    assert line["ceilings"] == {"memory_gb_per_s": 1500.0}
    assert line["ratios"] == {"experts/int4/t1/of_memory": 0.8}
    assert "gpu/parts/1" in table
    (tmp_path / "int4.status").write_text("failed (1)\n")
    (tmp_path / "int4.log").write_text("started\nTraceback\nError: no such thing\n")
    (tmp_path / "bf16.status").unlink()
    code, table, line = run(monkeypatch, capsys, tmp_path)
    assert code == 1
    assert "| Error: no such thing" in table
    assert line["status"]["int4"] == "failed (1)"
    assert line["status"]["bf16"] == "not run"
    assert line["results"].keys() == {"rates", "routing"}


def test_nothing_at_all_is_a_report_too(tmp_path, monkeypatch, capsys):
    code, _, line = run(monkeypatch, capsys, tmp_path)
    assert code == 1
    assert set(line["status"].values()) == {"not run"}
    assert line["hardware"] == ""
