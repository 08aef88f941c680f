"""The Kubernetes manifests: their schemas, and that they agree with the server and its keys."""

import copy
from pathlib import Path

import kubernetes_validate
import pytest

from moe_server import __version__
from moe_server.commands.serve import serve
from moe_server.commands.warmup import NUM_PROBES, warmup
from moe_server.json_file import write_json
from moe_server.notify import START_STALL_S, STOP_MARGIN_S
from moe_server.patience import Patience
from moe_server.planned_models import plan_models
from moe_server.service.health import LIVENESS, READINESS
from moe_server.synth_spec import SynthSpec
from tests.deploy.manifests import Deployment, quantity, read_files, render

VERSIONS = ("1.30", kubernetes_validate.latest_version())
"""The first one that lets preStop sleep by itself, and the newest that the schemas are known of."""
FRONT_DOOR_BYTES = 2**30
CUDA_HOST_BYTES = 4 * 2**30
"""What CUDA and its libraries may take of the host's memory beside the plan; not measured yet."""
SLOW_PROBE_S = 60

FOLDERS = ("base", "mixtral-a100", "gate")


@pytest.fixture(params=["base as written", "base", "mixtral-a100"])
def deployment(request, tmp_path):
    if request.param == "base as written":
        return Deployment.of_files("base")
    return Deployment.rendered(request.param, tmp_path)


@pytest.fixture
def gate():
    [job] = read_files("gate")
    return job


def container_of(job):
    [container] = job["spec"]["template"]["spec"]["containers"]
    return container


def port_of(address):
    return int(address.rpartition(":")[2])


def patience_of(probe):
    return probe["periodSeconds"] * probe["failureThreshold"]


def sparse_mixtral(path: Path) -> Path:
    """Mixtral 8x7B's headers, and files of its size that take no room on disk."""
    path.mkdir()
    spec = SynthSpec(layers=32)
    shards = spec.shards()
    for name, shard in shards.items():
        with (path / name).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.file_bytes)
    places = {tensor.entry.name: name for name, shard in shards.items() for tensor in shard.tensors}
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    write_json(path / "config.json", spec.config())
    return path


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", FOLDERS)
def test_objects_are_valid_as_they_are_written(name, version):
    for one in read_files(name):
        kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", FOLDERS)
def test_objects_are_valid_as_they_are_rendered(name, version):
    for one in render(name):
        kubernetes_validate.validate(one, version, strict=True)


def test_a_misspelt_field_is_found():
    stateful_set = copy.deepcopy(Deployment.of_files("base").get("StatefulSet"))
    spec = stateful_set["spec"]["template"]["spec"]
    spec["terminationGracePeriodSecond"] = spec.pop("terminationGracePeriodSeconds")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(stateful_set, VERSIONS[-1], strict=True)


def test_its_command_is_one_that_the_server_takes(deployment):
    command, *arguments = deployment.container["args"]
    assert command == serve.name
    flags = {flag for parameter in serve.params for flag in parameter.opts}
    assert {one for one in arguments if one.startswith("-")} <= flags
    [file] = [Path(one) for one in arguments if not one.startswith("-")]
    [mount] = [one for one in deployment.container["volumeMounts"] if one["name"] == "config"]
    assert mount["mountPath"] == str(file.parent)
    assert deployment.container["image"].rpartition(":")[2].startswith(__version__)


def test_readiness_is_proof_of_something(deployment):
    assert deployment.config.warmup.max_ttft_ms is not None


def test_ports_are_those_of_the_configuration(deployment):
    listens = {"grpc": deployment.config.listen, "metrics": deployment.config.metrics_listen}
    assert all(address.startswith("0.0.0.0:") for address in listens.values()), "the pod's address"
    numbers = {name: port_of(address) for name, address in listens.items()}
    ports = deployment.container["ports"]
    assert {port["name"]: port["containerPort"] for port in ports} == numbers
    for service in ("moe-server", "moe-server-pods"):
        for port in deployment.get("Service", service)["spec"]["ports"]:
            assert (port["port"], port["targetPort"]) == (numbers[port["name"]], port["name"])
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert deployment.container[probe]["grpc"]["port"] == numbers["grpc"]
    scraped = deployment.template["metadata"]["annotations"]["prometheus.io/port"]
    assert int(scraped) == numbers["metrics"]


def test_probes_ask_for_life_and_for_proof(deployment):
    container = deployment.container
    assert container["livenessProbe"]["grpc"]["service"] == LIVENESS
    assert container["startupProbe"]["grpc"]["service"] == LIVENESS, "a loader is never killed"
    assert container["readinessProbe"]["grpc"]["service"] == READINESS


def test_no_probe_ends_a_server_while_a_disk_stands_still(deployment):
    assert patience_of(deployment.container["startupProbe"]) >= START_STALL_S
    assert patience_of(deployment.container["livenessProbe"]) > Patience().loading_s


def test_a_pod_may_take_the_time_that_accepted_requests_are_given(deployment):
    still_serving_s = deployment.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace_s = deployment.config.service.shutdown_grace_s
    needed_s = still_serving_s + grace_s + STOP_MARGIN_S
    assert deployment.pod["terminationGracePeriodSeconds"] >= needed_s


def test_memory_holds_the_plan_the_front_door_and_cuda(deployment, tmp_path):
    config = deployment.config
    if config.model != "demo":
        model = str(sparse_mixtral(tmp_path / "mixtral"))
        config = config.model_copy(update={"model": model})
    [model] = plan_models(config)
    cuda_bytes = CUDA_HOST_BYTES if config.device == "cuda" else 0
    resources = deployment.container["resources"]
    assert resources["requests"] == resources["limits"], "Guaranteed: last to be evicted"
    needed = model.memory_bytes + FRONT_DOOR_BYTES + cuda_bytes
    assert needed <= quantity(resources["limits"]["memory"]) < 1.5 * needed
    assert ("nvidia.com/gpu" in resources["limits"]) == (config.device == "cuda")
    if config.device == "cuda":
        plan = model.plan  # as the file of the configuration tells it
        assert (plan.num_slots, plan.num_records, plan.num_absent) == (57, 193, 6)


def test_a_checkpoint_lies_on_a_volume_of_the_replicas_own(tmp_path):
    deployment = Deployment.rendered("mixtral-a100", tmp_path)
    mounts = deployment.container["volumeMounts"]
    [mount] = [one for one in mounts if deployment.config.model.startswith(one["mountPath"] + "/")]
    assert mount["readOnly"]
    claims = deployment.get("StatefulSet")["spec"]["volumeClaimTemplates"]
    assert mount["name"] in [claim["metadata"]["name"] for claim in claims]


def test_every_mount_has_a_volume(deployment):
    claims = deployment.get("StatefulSet")["spec"].get("volumeClaimTemplates", [])
    volumes = {one["name"] for one in deployment.pod["volumes"]}
    volumes |= {claim["metadata"]["name"] for claim in claims}
    assert {mount["name"] for mount in deployment.container["volumeMounts"]} == volumes


def test_a_server_is_nobody_and_writes_only_where_it_must(deployment):
    assert deployment.pod["securityContext"]["runAsNonRoot"]
    rights = deployment.container["securityContext"]
    assert rights["readOnlyRootFilesystem"]
    assert not rights["allowPrivilegeEscalation"]
    assert rights["capabilities"] == {"drop": ["ALL"]}
    mounts = deployment.container["volumeMounts"]
    writable = {one["mountPath"] for one in mounts if not one.get("readOnly")}
    [home] = [one["value"] for one in deployment.container["env"] if one["name"] == "HOME"]
    assert writable == {"/tmp", home}


def test_selectors_find_the_pods(deployment):
    services = [deployment.get("Service", name) for name in ("moe-server", "moe-server-pods")]
    owners = [deployment.get(kind) for kind in ("StatefulSet", "PodDisruptionBudget")]
    selectors = [one["spec"]["selector"] for one in services]
    selectors += [one["spec"]["selector"]["matchLabels"] for one in owners]
    assert selectors == [deployment.template["metadata"]["labels"]] * len(selectors)


def test_the_gate_proves_every_replica(deployment, gate):
    stateful_set, spec = deployment.get("StatefulSet"), gate["spec"]
    assert (spec["completionMode"], spec["completions"]) == (
        "Indexed",
        stateful_set["spec"]["replicas"],
    )
    given = warmup.make_context("warmup", list(container_of(gate)["args"][1:])).params
    pods = stateful_set["spec"]["serviceName"]
    assert deployment.get("Service", pods)["spec"]["publishNotReadyAddresses"]
    name, port = stateful_set["metadata"]["name"], port_of(deployment.config.listen)
    assert given["target"] == f"{name}-$(JOB_COMPLETION_INDEX).{pods}:{port}"
    assert given["max_ttft_ms"] is None, "what readiness was a proof of"


def test_the_gate_fails_for_a_reason_of_its_own(gate):
    container, spec = container_of(gate), gate["spec"]
    assert container["args"][0] == warmup.name
    given = warmup.make_context("warmup", list(container["args"][1:])).params
    assert spec["activeDeadlineSeconds"] >= given["timeout"] + NUM_PROBES * SLOW_PROBE_S
    assert spec["backoffLimitPerIndex"] == 0, "a missed limit is not tried away"
    assert container["image"].rpartition(":")[2] == __version__
