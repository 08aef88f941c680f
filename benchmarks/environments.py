"""Python environments of the peers: made once, on demand, outside the repository.

Each peer has its own, as their dependencies do not agree. A failed installation is told and
remembered for this run: the peer is then missing from the table, with the reason.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

INSTALL_TIMEOUT_S = 3600
PEERS = Path(__file__).parent / "peers"
TORCH = "torch==2.13.0"
TRANSFORMERS = "transformers==5.23.0"


@dataclass(frozen=True)
class Environment:
    """What one peer needs."""

    name: str
    steps: tuple[tuple[str, ...], ...]
    """Arguments of `pip install`, one call after another."""
    build: str = ""
    """A script in `peers/` that is called with `build` at the end."""


LLAMA_CPP = Environment("llama_cpp", (("llama-cpp-python==0.3.36", "gguf==0.19.0"),))
"""Built from source, which takes some minutes, with the instructions that this machine has."""
ACCELERATE = Environment("accelerate", ((TORCH,), (TRANSFORMERS, "accelerate==1.15.0")))
DEEPSPEED = Environment(
    "deepspeed",
    (
        (TORCH, "setuptools", "wheel", "ninja"),
        ("--no-build-isolation", "deepspeed==0.19.8", TRANSFORMERS, "accelerate==1.15.0"),
    ),
    build="run_deepspeed.py",
)
"""Its disk reads need the headers of libaio (Debian: libaio-dev) and a compiler."""


class EnvironmentUnavailableError(Exception):
    """It is not there and was not to be made, or could not be made."""


def python_of(environment: Environment, folder: Path, *, install: bool) -> Path:
    """The interpreter of an environment below `folder`.

    Raises:
        EnvironmentUnavailableError: It is missing.
    """
    home = folder / f"env-{environment.name}"
    python, complete = home / "bin/python", home / ".complete"
    wanted = repr(environment.steps)
    if complete.exists() and complete.read_text() == wanted:
        return python
    if not install:
        raise EnvironmentUnavailableError(f"not installed in {home}, and QUICK installs nothing")
    print(f"Installing {environment.name} into {home} ...", file=sys.stderr)
    log = folder / "logs" / f"install-{environment.name}.log"
    calls = [[sys.executable, "-m", "venv", str(home)]]
    calls += [[str(python), "-m", "pip", "install", "-q", *step] for step in environment.steps]
    if environment.build:
        calls.append([str(python), str(PEERS / environment.build), "build"])
    with log.open("w") as output:
        for call in calls:
            try:
                subprocess.run(
                    call,
                    check=True,
                    stdout=output,
                    stderr=output,
                    timeout=INSTALL_TIMEOUT_S,
                    env={**os.environ, "CMAKE_BUILD_PARALLEL_LEVEL": "2"},
                )
            except (OSError, subprocess.SubprocessError) as error:
                tail = log.read_text(errors="replace").strip()[-300:]
                raise EnvironmentUnavailableError(f"{error}; {log} ends: {tail}") from None
    complete.write_text(wanted)
    return python
