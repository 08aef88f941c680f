"""One thread for each test: cores are shared, and small products need no more."""

import contextlib
import os
import shutil
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"
# Servers that tests start learn nothing from each other, and leave nothing in the user's home. (The
# variable speaks of a server's first model only.)
os.environ["MOE_SERVER_WARMUP__HOT_SET"] = "off"
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="moe-server-tests-")

import torch

torch.set_num_threads(1)
# How long a test takes says nothing beside others. (The kernels' own tests on a GPU need no more
# than pytest.)
with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("beside others", deadline=None)
    settings.load_profile("beside others")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["XDG_STATE_HOME"], ignore_errors=True)
