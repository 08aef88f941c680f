"""ZeRO-3 around the dense weights: bit-equal to resident, blind to experts, quiet."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from moe_server.checkpoint import read_checkpoint
from moe_server.errors import MoeServerError
from tests.driver import greedy, run, running_engine
from tests.tiny import Tiny

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7], [1] * 30]
NEW_TOKENS = 8
NOTHING_PERSISTENT = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return Tiny(seed=40).write(tmp_path_factory.mktemp("zero3"))


def write_json(folder: Path, content: object) -> str:
    file = folder / "zero3.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def answers(path: Path, **flags) -> list[list[tuple[int, float]]]:
    with running_engine(path, **flags) as engine:
        outcome = run(engine, greedy(PROMPTS, NEW_TOKENS))
    return [[(event.token_id, event.logprob) for event in events] for events in outcome]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
def test_tokens_and_log_probabilities_equal_those_of_resident_weights(dtype, tied, tmp_path):
    path = Tiny(dtype=dtype, tied=tied, seed=41).write(tmp_path)
    assert answers(path, dense_backend="zero3") == answers(path)


USER_CONFIGS = {
    "empty": {},
    "stage alone": {"zero_optimization": {"stage": 3}},
    "nothing persistent": {"zero_optimization": {"stage": 3, **NOTHING_PERSISTENT}},
    "own leaf": {"zero_optimization": {"stage": 3, "leaf_module": {"names": ["mlp"]}}},
    "dtype said again": {"fp16": {"enabled": False}, "bf16": {"enabled": False}},
    "offloaded": {"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}},
    "left to others": {
        "train_micro_batch_size_per_gpu": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": "auto",
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto"},
    },
    "wants its linear": {"zero_optimization": {"stage": 3, "memory_efficient_linear": True}},
}


@pytest.mark.parametrize("name", USER_CONFIGS)
def test_a_user_s_configuration_changes_no_token(path, tmp_path, name):
    file = write_json(tmp_path, USER_CONFIGS[name])
    linear = torch.nn.functional.linear
    assert answers(path, dense_backend="zero3", zero3_config=file) == answers(path)
    assert torch.nn.functional.linear is linear


def test_what_is_left_to_others_follows_the_checkpoint(tmp_path):
    path = Tiny(dtype="bfloat16", seed=42).write(tmp_path / "model")
    auto = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    file = write_json(tmp_path, auto)
    assert answers(path, dense_backend="zero3", zero3_config=file) == answers(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"zero_optimization": {"stage": 2}}, "stage is 2, expected 3"),
        ({"zero_optimization": {"stage": 0}}, "stage is 0, expected 3"),
        ({"zero_optimization": {}}, "stage is None, expected 3"),
        ({"zero_optimization": {"stage": "3"}}, "stage is '3', expected 3"),
        ({"zero_optimization": 3}, "zero_optimization"),
        ({"zero_optimization": None}, "zero_optimization"),
        ({"fp16": {"enabled": True}}, "fp16.enabled contradicts"),
        ({"bf16": {"enabled": True}}, "bf16.enabled contradicts"),
        ({"bf16": True}, "bf16"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "NVMe"),
        ({"zero_optimization": {"stage": 3, "offload_param": 3}}, "offload_param"),
        ({"zero_optimization": {"stage": 3, "no_such_key": 3}}, "no_such_key"),
        ({"train_micro_batch_size_per_gpu": "many"}, "DeepSpeed does not accept it"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, "optimizer is for training"),
        ([], "holds a list, expected an object"),
        ("{", "it is no JSON"),
    ],
    ids=str,
)
def test_a_user_s_configuration_that_cannot_be_is_refused(path, tmp_path, content, said):
    file = write_json(tmp_path, content)
    with pytest.raises(MoeServerError) as caught:
        answers(path, dense_backend="zero3", zero3_config=file)
    assert caught.value.field == "zero3_config"
    assert file in caught.value.message
    assert said in caught.value.message


def test_a_user_s_configuration_that_is_not_there(path, tmp_path):
    with pytest.raises(MoeServerError, match=r"nowhere\.json"):
        answers(path, dense_backend="zero3", zero3_config=str(tmp_path / "nowhere.json"))


@contextmanager
def recorded_gathers(monkeypatch) -> Iterator[list[torch.nn.Parameter]]:
    """Every parameter that ZeRO-3 gathers, in order."""
    from deepspeed.runtime.zero import partition_parameters as zero

    gathered = []

    def record(cls, count) -> None:
        init = cls.__init__

        def recording_init(self, params, *args, **kwargs):
            gathered.extend(params if count == "many" else [params])
            return init(self, params, *args, **kwargs)

        monkeypatch.setattr(cls, "__init__", recording_init)

    record(zero.NoGatherCoalescedHandle, "many")
    record(zero.NoGatherHandle, "one")
    yield gathered


def test_it_gathers_the_dense_weights_once_a_step_and_never_an_expert(path, tmp_path, monkeypatch):
    checkpoint = read_checkpoint(path)
    file = write_json(tmp_path, {"zero_optimization": {"stage": 3, **NOTHING_PERSISTENT}})
    with (
        running_engine(
            path, dense_backend="zero3", zero3_config=file, device_memory="min"
        ) as engine,
        recorded_gathers(monkeypatch) as gathered,
    ):
        names = {
            parameter.ds_id: name for name, parameter in engine.model._module.named_parameters()
        }
        assert names.keys() == {parameter.ds_id for parameter in engine.model._module.parameters()}
        assert not [name for name in names.values() if "experts" in name]
        for request in greedy(PROMPTS, NEW_TOKENS):
            engine.submit(request)
        steps = []
        while not engine.idle:
            gathered.clear()
            engine.step()
            steps.append(list(gathered))
    for step in steps:
        per_layer = [names[parameter.ds_id] for parameter in step]
        assert all(name in checkpoint.dense for name in per_layer), "not a dense weight"
        of_layers = [name for name in per_layer if ".layers." in name]
        assert len(of_layers) == len(set(of_layers)), "gathered twice in a step"
        num_bytes = sum(parameter.ds_numel * 4 for parameter in step if parameter.ds_id in names)
        assert num_bytes <= checkpoint.dense_bytes
    dense_bytes_of_layers = sum(
        tensor.nbytes for name, tensor in checkpoint.dense.items() if ".layers." in name
    )
    first = [parameter for parameter in steps[0] if ".layers." in names[parameter.ds_id]]
    assert sum(parameter.ds_numel * 4 for parameter in first) == dense_bytes_of_layers


QUIET = """
import sys, torch
from pathlib import Path
linear, disable = torch.nn.functional.linear, torch.compiler.disable
import moe_server.engine_process
from tests.driver import greedy, run, running_engine, token_ids
with running_engine(Path(sys.argv[1]), dense_backend="zero3") as engine:
    assert torch.nn.functional.linear is linear, "replaced by wrap"
    answer = token_ids(run(engine, greedy([[3, 1, 4]], 4))[0])
    assert torch.nn.functional.linear is linear, "replaced by a step"
assert len(answer) == 4
from deepspeed.utils import logger
logger.warning("said by DeepSpeed")
assert not {"mpi4py", "grpc", "torch._dynamo"} & set(sys.modules)
assert torch.compiler.disable is disable
"""


def test_a_fresh_process_prints_nothing_keeps_torch_as_it_is_and_loads_little(path):
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "said by DeepSpeed" in done.stderr
