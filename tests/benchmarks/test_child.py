"""A measured process: answers, ends, and leaves nothing behind."""

import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.cgroups import MEMORY
from benchmarks.child import ChildFailedError, can_cap, running

ANSWER = "import os, sys\nanswers = open(int(os.environ['MOE_BENCH_ANSWERS']), 'w', buffering=1)\n"
ECHO = "print('noise')\nanswers.write('1\\n')\nfor line in sys.stdin: answers.write(line)"
HANG = "import time\ntime.sleep(600)"


def command(code: str) -> list[str]:
    return [sys.executable, "-c", ANSWER + code]


def test_asks_and_answers_until_it_is_let_go(tmp_path: Path) -> None:
    with running(command(ECHO), cap_bytes=None, log=tmp_path / "log", environ={}) as child:
        assert child.answer(20) == 1
        assert child.ask({"a": [1, 2]}, 20) == {"a": [1, 2]}


def test_how_it_failed_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    code = "raise SystemExit('no such model')"
    with running(command(code), cap_bytes=None, log=tmp_path / "log", environ={}) as child:
        with pytest.raises(ChildFailedError, match="code 1: no such model"):
            child.answer(20)
        with pytest.raises(ChildFailedError):
            child.ask({}, 0.1)


def test_one_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess\n"
        f"other = subprocess.Popen([sys.executable, '-c', {HANG!r}])\n"
        "answers.write(f'{other.pid}\\n')\nother.wait()"
    )
    with running(command(code), cap_bytes=None, log=tmp_path / "log", environ={}) as child:
        other = child.answer(20)
        with pytest.raises(ChildFailedError, match="no answer within 0 s"):
            child.answer(0.01)
    give_up = time.monotonic() + 20
    while _runs(other):
        assert time.monotonic() < give_up


@pytest.mark.skipif(can_cap() is not None, reason="needs root and a memory cgroup")
def test_a_cap_kills_what_passes_it_and_its_group_goes(tmp_path: Path) -> None:
    code = "answers.write('1\\n')\ninput()\nblock = bytearray(2**28)"
    with running(command(code), cap_bytes=2**26, log=tmp_path / "log", environ={}) as child:
        assert child.answer(20) == 1
        with pytest.raises(ChildFailedError, match="killed by the memory cap"):
            child.ask({}, 60)
    assert not (MEMORY / f"moe-bench-{os.getpid()}").exists()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
    return status != "Z"  # one that nobody waits for here is as good as gone
