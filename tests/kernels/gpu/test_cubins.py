"""Every program that a GPU is sent compiles well for sm_80 and sm_90; a bad one is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cubins import SHARED_LIMITS, Cubin, Program, compiled, programs
from moe_server.kernels.formats import WeightFormat
from tests.kernels.gpu.numerics.device import IS_INTERPRETED

ROOT = Path(__file__).parents[3]

pytest.importorskip("triton", reason="Triton, of the extra `gpu`, is not installed")
pytestmark = pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter compiles nothing")


@pytest.fixture(scope="module")
def cubins(tmp_path_factory) -> dict[tuple[str, int], Cubin]:
    # A cache of its own: what passes has been compiled by the Triton that is installed.
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cubins"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr[-5_000:]
    found = [Cubin(**one) for one in json.loads(done.stdout.splitlines()[-1])]
    return {(one.name, one.arch): one for one in found}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("arch", SHARED_LIMITS)
@pytest.mark.parametrize("program", list(programs()), ids=lambda program: program.name)
def test_program_is_good(cubins, program, arch):
    assert cubins[program.name, arch].problems == []


def bad(number: int, **changes) -> list[str]:
    """Problems of a program of the table, changed for the worse."""
    program = list(programs())[number]
    values = {name: getattr(program, name) for name in Program.__slots__} | changes
    return compiled(Program(**values), 80).problems


def test_what_spills_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    number, program = next(
        (number, program)
        for number, program in enumerate(programs())
        if program.constants.get("FORMAT") == WeightFormat.INT4.value
        and program.constants["BLOCK_M"] == 128
    )
    assert any("spills" in problem for problem in bad(number, num_warps=program.num_warps // 2))


def test_what_fetches_little_at_a_time_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    program = next(programs())
    # An odd number of columns: no row but the first is aligned.
    problems = bad(0, constants=program.constants | {"COLUMNS": 4095})
    assert any("128 bits" in problem for problem in problems)
    assert any("below 32" in problem for problem in problems)


def test_what_does_not_fit_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert any("shared memory" in problem for problem in bad(0, num_stages=12))
