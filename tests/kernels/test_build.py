"""The library is built where a compiler is, and nothing fails where none is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_server.kernels import native

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler on this machine")
@pytest.mark.skipif(
    os.environ.get(native.ENVIRONMENT_VARIABLE) == "torch", reason="the environment asks for none"
)
def test_an_installation_with_a_compiler_has_the_library():
    assert native.is_available(), native.unavailable_reason()


def test_an_installation_without_a_compiler_succeeds_without_the_library(tmp_path):
    pytest.importorskip("setuptools")
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(
        [*build, "--build-temp", str(tmp_path / "temp")],
        cwd=ROOT,
        env=os.environ | {"CC": "false", "CXX": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 'building extension "moe_server.kernels._cpu" failed' in done.stderr + done.stdout
    assert not list(tmp_path.rglob("_cpu.*"))
