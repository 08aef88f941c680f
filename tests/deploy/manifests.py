"""Kubernetes manifests as the cluster would get them, and what the tests ask of them."""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_server.config import Config, load_config

FOLDER = Path(__file__).parents[2] / "deploy/kubernetes"
RENDERERS = (("kubectl", "kustomize"), ("kustomize", "build"))

UNITS = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def render(name: str) -> list[dict[str, Any]]:
    """The objects of one kustomization; needs one of the two programs that render it."""
    renderer = next((one for one in RENDERERS if shutil.which(one[0])), None)
    if renderer is None:
        pytest.skip("neither kubectl nor kustomize is installed; the tests of files need neither")
    done = subprocess.run((*renderer, FOLDER / name), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def read_files(name: str) -> Iterator[dict[str, Any]]:
    """The objects of the kustomization's own files, as they are written."""
    kustomization = yaml.safe_load((FOLDER / name / "kustomization.yaml").read_text())
    for resource in kustomization["resources"]:
        if resource.endswith(".yaml"):
            yield from yaml.safe_load_all((FOLDER / name / resource).read_text())


def quantity(text: str) -> float:
    """ "512Mi" -> 536870912.0."""
    unit = text.lstrip("0123456789.")
    return float(text.removesuffix(unit)) * UNITS.get(unit, 1)


@dataclass(frozen=True)
class Deployment:
    """A server's objects and the configuration that is mounted into its pods."""

    objects: list[dict[str, Any]]
    config: Config

    @classmethod
    def of_files(cls, name: str) -> "Deployment":
        config = load_config(FOLDER / name / "moe-server.toml", environ={})
        return cls(list(read_files(name)), config)

    @classmethod
    def rendered(cls, name: str, scratch: Path) -> "Deployment":
        objects = render(name)
        [config_map] = [one for one in objects if one["kind"] == "ConfigMap"]
        [(file, text)] = config_map["data"].items()
        (scratch / file).write_text(text)
        deployment = cls(objects, load_config(scratch / file, environ={}))
        [volume] = [one for one in deployment.pod["volumes"] if one["name"] == "config"]
        assert volume["configMap"]["name"] == config_map["metadata"]["name"]
        return deployment

    def get(self, kind: str, name: str = "moe-server") -> dict[str, Any]:
        [found] = [
            one for one in self.objects if (one["kind"], one["metadata"]["name"]) == (kind, name)
        ]
        return found

    @property
    def template(self) -> dict[str, Any]:
        return self.get("StatefulSet")["spec"]["template"]

    @property
    def pod(self) -> dict[str, Any]:
        return self.template["spec"]

    @property
    def container(self) -> dict[str, Any]:
        [container] = self.pod["containers"]
        return container
