"""Our Mixtral module against transformers': the same bits, for every configuration it takes."""

import subprocess
import sys
from pathlib import Path

import pytest

from moe_server.json_file import read_json
from moe_server.mixtral import Mixtral
from moe_server.plain_mixtral import is_plain
from tests.driver import greedy, run, running_engine
from tests.tiny import Tiny, edit_config

PROMPTS = [[5, 9, 200, 31, 7], [300, 2, 2, 41], [17], list(range(40, 90))]
PLAIN = {
    "plain": Tiny(),
    "bf16": Tiny(dtype="bfloat16", seed=1),
    "fp16": Tiny(dtype="float16", seed=2),
    "tied": Tiny(tied=True, seed=3),
    "tied, bf16": Tiny(tied=True, dtype="bfloat16", seed=4),
    "sliding window": Tiny(sliding_window=16, seed=5),
    "multi-query": Tiny(heads=6, kv_heads=1, head_dim=8, seed=6),
    "5 experts top-3": Tiny(experts=5, top_k=3, seed=7, hidden=52, head_dim=10, intermediate=37),
    "another theta": Tiny(rope={"rope_type": "default", "rope_theta": 5e5}, seed=8),
}


def answers(path: Path, *, ours: bool) -> list[list[tuple[int, float | None]]]:
    with running_engine(path) as engine:
        told = run(engine, greedy(PROMPTS, 24))
        assert isinstance(engine.model._module, Mixtral) == ours
    return [[(event.token_id, event.logprob) for event in events] for events in told]


@pytest.mark.parametrize("name", PLAIN)
def test_it_equals_transformers_bit_for_bit(name, tmp_path, monkeypatch):
    path = PLAIN[name].write(tmp_path)
    ours = answers(path, ours=True)
    monkeypatch.setattr("moe_server.checkpoint.is_plain", lambda _config: False)
    assert ours == answers(path, ours=False)


def test_a_config_of_an_older_transformers_is_read_too(tmp_path):
    path = Tiny(rope={"rope_type": "default", "rope_theta": 3e4}).write(tmp_path)
    config = read_json(path / "config.json")
    assert is_plain(config)
    old = {**config, "rope_theta": 3e4}
    del old["rope_parameters"]
    assert is_plain(old)
    new = answers(path, ours=True)
    edit_config(path, rope_parameters=None, rope_theta=3e4)
    assert answers(path, ours=True) == new


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": None},
        {"hidden_act": "gelu"},
        {"rms_norm_eps": "small"},
        {"model_type": "qwen3_moe"},
        {"quantization_config": {"bits": 4}},
        {"rope_parameters": "default"},
    ],
)
def test_what_it_does_not_compute_is_left_to_transformers(change, tmp_path):
    config = read_json(Tiny().write(tmp_path) / "config.json")
    assert is_plain(config)
    assert not is_plain({**config, **change})


def test_a_plain_model_needs_no_transformers(tmp_path):
    path = Tiny(dtype="bfloat16").write(tmp_path)
    code = f"""
import sys
from pathlib import Path
from tests import driver
with driver.running_engine(Path({str(path)!r})) as engine:
    driver.run(engine, driver.greedy([[1, 2, 3]], 4))
print('transformers' in sys.modules, 'deepspeed' in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100
    )
    assert done.stdout.split() == ["False", "False"]
