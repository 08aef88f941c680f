"""What is read from disk, and who owns the memory that it was read into."""

import gc
import weakref

from moe_server.budget import plan_memory
from moe_server.checkpoint import read_checkpoint
from moe_server.config import load_config
from moe_server.weights import Weights
from tests.tiny import Tiny


def test_dense_tensors_own_their_memory_one_by_one(tmp_path):
    """Else whoever takes them by copying, ZeRO-3 or a GPU, would hold the dense weights twice."""
    path = Tiny(seed=3).write(tmp_path)
    config = load_config(flags={"model": str(path)}, environ={})
    checkpoint = read_checkpoint(path)
    weights = Weights(config, checkpoint, plan_memory(config, checkpoint))
    weights.begin()
    memories = {name: weakref.ref(read.memory) for name, read in weights._dense.items()}
    tensors = weights.take_dense(lambda done: None)
    assert tensors.keys() == checkpoint.dense.keys()
    kept = "model.norm.weight"
    content = tensors[kept].clone()
    for name in tensors.keys() - {kept}:
        del tensors[name]
    weights.close()
    gc.collect()
    assert {name for name, memory in memories.items() if memory() is not None} == {kept}
    assert tensors[kept].equal(content)
