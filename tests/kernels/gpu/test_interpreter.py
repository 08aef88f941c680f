"""The GPU's programs compute what they should, in Triton's interpreter.

In a process of its own: the interpreter is chosen before Triton is imported, for all that imports
it, and other libraries do.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.gpu.numerics.device import IS_INTERPRETED

NUMERICS = Path(__file__).with_name("numerics")
ROOT = NUMERICS.parents[3]

pytest.importorskip("triton", reason="Triton, of the extra `gpu`, is not installed")


@pytest.mark.skipif(IS_INTERPRETED, reason="the numerics are run by this very session")
@pytest.mark.skipif(
    tuple(map(int, np.__version__.split(".")[:2])) >= (2, 5),
    reason="Triton 3.6's interpreter makes numbers of arrays, which NumPy 2.5 refuses",
)
@pytest.mark.timeout(300)
def test_numerics():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(NUMERICS)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert " skipped" not in done.stdout, done.stdout[-2_000:]
