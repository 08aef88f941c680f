"""The full-size model that is two layers in turn, and how its steps are counted."""

from benchmarks import gpu_serving
from moe_server.checkpoint import read_checkpoint
from moe_server.offload.layout import ExpertId
from tests.driver import running_engine
from tests.tiny import Tiny


def test_a_tiled_checkpoint_has_every_layer_s_tensors(tmp_path):
    held = read_checkpoint(Tiny(layers=2).write(tmp_path / "held"))
    many = gpu_serving.tiled(held, 5)
    real = read_checkpoint(Tiny(layers=5).write(tmp_path / "real"))
    assert many.dense.keys() == real.dense.keys()
    assert many.experts.keys() == real.experts.keys()
    assert many.kv_bytes_per_token == real.kv_bytes_per_token
    for layer in range(5):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        assert many.dense[name] is held.dense[name.replace(f".{layer}.", f".{layer % 2}.")]
        assert many.experts[ExpertId(layer, 3)] == held.experts[ExpertId(layer % 2, 3)]
    assert many.dense["lm_head.weight"] is held.dense["lm_head.weight"]


def test_a_load_counts_the_steps_in_which_all_decode(tmp_path):
    path = Tiny().write(tmp_path)
    with running_engine(path) as engine:
        found = gpu_serving.run_load(engine, [[1, 2, 3], [4, 5]], 6)
    assert found["hit_rate"] == 1.0
    assert found["copied_gb_per_token"] == 0.0
    assert found["tokens_per_s"] > 0
    assert found["ttft_s"] > 0
