"""The arithmetic of memory over random models, and the files of the kernel that bound it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_server import budget
from moe_server.architectures import ARCHITECTURES
from moe_server.budget import MemoryPlan, format_bytes, plan_memory
from moe_server.checkpoint import Checkpoint, DenseTensor
from moe_server.config import Config, load_config
from moe_server.errors import MoeServerError
from moe_server.kernels.formats import GROUP_COLUMNS, MatrixLayout, WeightFormat
from moe_server.offload.layout import ExpertId
from moe_server.packed import StoreFormat
from moe_server.safetensors_file import TensorLocation

GIB = 2**30


def make_checkpoint(
    *,
    hidden=64,
    intermediate=96,
    layers=2,
    experts=8,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab=320,
    context=512,
    itemsize=2,
    tied=False,
    dense_int8=False,
) -> Checkpoint:
    """What a checkpoint says of itself; no file is behind it."""
    dtype = {2: WeightFormat.BFLOAT16, 4: WeightFormat.FLOAT32}[itemsize]
    matrix, vector = (vocab, hidden), (layers * hidden * 3,)
    layout = MatrixLayout(*matrix, WeightFormat.INT8 if dense_int8 else dtype)
    nowhere = TensorLocation(Path("shard"), 0, layout.nbytes, "any", matrix)
    end = DenseTensor(nowhere, matrix, layout if dense_int8 else None)
    layers_end = replace(nowhere, nbytes=vector[0] * itemsize, shape=vector)
    dense = {"model.embed_tokens.weight": end, "layers": DenseTensor(layers_end, vector, None)}
    if not tied:
        dense["lm_head.weight"] = end
    return Checkpoint(
        path=Path("model"),
        architecture="MixtralForCausalLM",
        kind=ARCHITECTURES["mixtral"],
        is_plain=True,
        stored=StoreFormat(dtype, dtype, GROUP_COLUMNS),
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_experts=experts,
        num_experts_per_token=min(2, experts),
        max_context_tokens=context,
        bos_token_id=None,
        eos_token_ids=(),
        dense=dense,
        experts={  # type: ignore[misc]
            ExpertId(layer, expert): () for layer in range(layers) for expert in range(experts)
        },
        checksums={},
    )


def make_config(**flags) -> Config:
    return load_config(flags=flags, environ={})


def assert_sums(plan: MemoryPlan, config: Config, checkpoint: Checkpoint) -> None:
    total = len(checkpoint.experts)
    assert 1 <= plan.num_slots <= total
    assert 0 <= plan.num_records <= total - plan.num_slots
    spent = plan.dense_bytes + plan.kv_bytes + plan.workspace_bytes + plan.slots_bytes
    assert spent <= plan.device_budget_bytes
    assert plan.records_bytes <= plan.host_budget_bytes == config.host_memory
    # Nothing that fits is left out.
    if plan.num_slots < total:
        assert spent + plan.slot_bytes > plan.device_budget_bytes
    if plan.embedding_on_disk_bytes:
        # Steps read experts then as well, or would if it were held; and more fit.
        held = spent + plan.embedding_on_disk_bytes - plan.slots_bytes
        slots = (plan.device_budget_bytes - held) // plan.slot_bytes
        assert slots <= plan.num_slots
        assert slots < 1 or slots + plan.num_records <= total
        assert config.dense_backend == "resident"
        assert config.device == "cpu"
    assert plan.dense_bytes + plan.embedding_on_disk_bytes == checkpoint.dense_bytes
    if plan.num_slots + plan.num_records < total:
        assert plan.records_bytes + plan.slot_bytes > plan.host_budget_bytes
    assert plan.slot_bytes >= plan.expert_bytes
    # The KV cache holds what is promised, and any single request.
    block_tokens = config.scheduler.block_tokens
    assert plan.num_blocks * block_tokens >= config.max_total_tokens
    assert plan.kv_bytes == plan.num_blocks * block_tokens * checkpoint.kv_bytes_per_token
    assert plan.max_request_tokens <= plan.num_blocks * block_tokens
    assert plan.max_request_tokens <= checkpoint.max_context_tokens


configs = st.fixed_dictionaries(
    {
        "max_total_tokens": st.integers(2, 40_000),
        "scheduler.max_batch_tokens": st.integers(1, 2048),
        "scheduler.max_running": st.integers(1, 64),
        "scheduler.block_tokens": st.integers(1, 64),
        "read_threads": st.integers(1, 8),
        "dense_backend": st.sampled_from(["resident", "zero3"]),
    }
)
checkpoints = st.builds(
    make_checkpoint,
    hidden=st.integers(1, 300),
    intermediate=st.integers(1, 300),
    layers=st.integers(1, 6),
    experts=st.integers(1, 8),
    heads=st.sampled_from([4, 8]),
    kv_heads=st.sampled_from([1, 2, 4]),
    vocab=st.integers(1, 2000),
    context=st.integers(1, 100_000),
    itemsize=st.sampled_from([2, 4]),
    tied=st.booleans(),
)


@given(
    flags=configs,
    checkpoint=checkpoints,
    extra=st.integers(0, 3_000_000),
    host=st.integers(0, 3_000_000),
    device=st.sampled_from(["cpu", "cuda"]),
)
@settings(max_examples=150)
def test_plans_keep_their_budgets_and_waste_nothing(flags, checkpoint, extra, host, device):
    config = make_config(**flags, device=device, device_memory="min", host_memory=8 * GIB)
    least = plan_memory(config, checkpoint)
    assert_sums(least, config, checkpoint)
    assert least.num_slots == 1
    assert least.device_budget_bytes == least.minimum_device_bytes
    larger = config.model_copy(
        update={"device_memory": least.minimum_device_bytes + extra, "host_memory": host}
    )
    try:
        plan = plan_memory(larger, checkpoint)
    except MoeServerError as error:
        assert error.field == "host_memory"
        assert host < (2 if device == "cuda" else 1) * least.slot_bytes
    else:
        assert_sums(plan, larger, checkpoint)
        assert plan.minimum_device_bytes == least.minimum_device_bytes


@given(flags=configs, checkpoint=checkpoints)
@settings(max_examples=60)
def test_the_minimum_it_names_is_enough_and_one_byte_less_is_not(flags, checkpoint):
    with pytest.raises(MoeServerError) as caught:
        plan_memory(make_config(**flags, device_memory=0), checkpoint)
    assert caught.value.field == "device_memory"
    named = int(re.search(r"at least (\d+) bytes", caught.value.remedy)[1])
    plan = plan_memory(make_config(**flags, device_memory=named), checkpoint)
    assert plan.num_slots == 1
    with pytest.raises(MoeServerError, match=f"need {named} bytes"):
        plan_memory(make_config(**flags, device_memory=named - 1), checkpoint)
    assert plan_memory(make_config(**flags, device_memory="min"), checkpoint) == plan


@given(checkpoint=checkpoints, device=st.sampled_from(["cpu", "cuda"]))
@settings(max_examples=60)
def test_the_least_host_memory_it_names_is_enough(checkpoint, device):
    assume(len(checkpoint.experts) > 1)
    flags = {"device": device, "device_memory": "min"}
    with pytest.raises(MoeServerError) as caught:
        plan_memory(make_config(**flags, host_memory=1), checkpoint)
    assert caught.value.field == "host_memory"
    named = int(re.search(r"at least (\d+) bytes", caught.value.remedy)[1])
    plan = plan_memory(make_config(**flags, host_memory=named), checkpoint)
    # A GPU's reads pass through two records; they come first.
    assert (plan.num_staging, plan.num_records) == ((2, 0) if device == "cuda" else (0, 1))
    with pytest.raises(MoeServerError):
        plan_memory(make_config(**flags, host_memory=named - 1), checkpoint)


def test_host_memory_is_optional_on_a_cpu_and_needless_when_all_is_resident():
    checkpoint = make_checkpoint()
    assert plan_memory(make_config(device_memory="min"), checkpoint).num_records == 0
    plan = plan_memory(make_config(device_memory=GIB, host_memory=100), checkpoint)
    assert (plan.num_slots, plan.num_records) == (16, 0)


def test_a_gpu_needs_a_budget():
    with pytest.raises(MoeServerError, match="needs a budget") as caught:
        plan_memory(make_config(device="cuda", host_memory=GIB), make_checkpoint())
    assert caught.value.field == "device_memory"


def test_a_gpu_takes_integer_experts_of_bfloat16_models_only():
    config = make_config(device="cuda", device_memory=GIB, host_memory=GIB)
    checkpoint = make_checkpoint()
    int4 = StoreFormat(WeightFormat.BFLOAT16, WeightFormat.INT4, GROUP_COLUMNS)
    assert plan_memory(config, replace(checkpoint, stored=int4)).num_slots == 16
    for stored, says in (
        (replace(int4, dtype=WeightFormat.FLOAT16), "float16 model"),
        (replace(int4, dense_int8=True), "dense weights in int8"),
    ):
        with pytest.raises(MoeServerError, match=says) as caught:
            plan_memory(config, replace(checkpoint, stored=stored))
        assert caught.value.field == "device"


def test_a_model_without_experts_needs_no_host_memory_on_a_gpu():
    dense = replace(
        make_checkpoint(), kind=ARCHITECTURES["llama"], experts={}, num_experts=0, is_plain=False
    )
    plan = plan_memory(make_config(device="cuda", device_memory=GIB), dense)
    assert (plan.num_slots, plan.num_records, plan.num_staging) == (0, 0, 0)


def test_on_a_gpu_all_experts_of_a_layer_are_computed_at_once():
    checkpoint = make_checkpoint(hidden=4096, intermediate=14336)
    flags = {"device_memory": 40 * GIB, "host_memory": GIB, "scheduler.max_batch_tokens": 2048}
    on_gpu, on_cpu = (
        plan_memory(make_config(device=device, **flags), checkpoint) for device in ("cuda", "cpu")
    )
    gate_times_up = 2 * 2048 * 14336 * 2
    assert on_gpu.workspace_bytes > on_cpu.workspace_bytes
    assert on_gpu.workspace_bytes >= gate_times_up + 2 * 2048 * 4096 * 2


@pytest.mark.parametrize("free", [10**6, GIB, 100 * GIB])
def test_without_a_budget_it_takes_all_experts_or_most_of_what_is_free(monkeypatch, free):
    checkpoint = make_checkpoint(hidden=4096, intermediate=14336)
    config = make_config(host_memory=GIB)
    monkeypatch.setattr(budget, "available_memory_bytes", lambda: free)
    plan = plan_memory(config, checkpoint)
    assert_sums(plan, config, checkpoint)
    if free == 100 * GIB:
        assert plan.num_slots == len(checkpoint.experts)
        assert plan.device_budget_bytes == plan.fixed_bytes + plan.slots_bytes
    else:
        assert plan.num_slots == 1  # and `check_room` refuses it


@pytest.mark.parametrize(
    ("dense_backend", "is_plain", "runtime"),
    [
        ("resident", True, budget.PLAIN_RUNTIME_BYTES),
        ("resident", False, budget.RUNTIME_BYTES),
        ("zero3", True, budget.RUNTIME_BYTES),
    ],
)
def test_the_runtime_is_small_where_torch_is_all_that_is_imported(dense_backend, is_plain, runtime):
    config = make_config(device_memory=GIB, dense_backend=dense_backend)
    checkpoint = replace(make_checkpoint(), is_plain=is_plain)
    assert plan_memory(config, checkpoint).runtime_bytes == runtime


# The embedding

REAL = {"hidden": 4096, "intermediate": 14336, "layers": 4, "vocab": 32000}


def with_room(checkpoint: Checkpoint, slots: float, **flags) -> MemoryPlan:
    """A plan with memory for so many slots beside an embedding that is held."""
    held = plan_memory(
        make_config(**{**flags, "device_memory": "min", "dense_backend": "zero3"}), checkpoint
    )
    assert held.embedding_on_disk_bytes == 0
    budget = held.minimum_device_bytes + int((slots - 1) * held.slot_bytes)
    return plan_memory(
        make_config(**{"dense_backend": "resident", **flags, "device_memory": budget}), checkpoint
    )


@pytest.mark.parametrize(
    ("sizes", "embedding_bytes", "row_bytes"),
    [
        ({}, 32000 * 4096 * 2, 4096 * 2),
        ({"dense_int8": True}, 2000 * (16 * 4096 + 64), 16 * 4096 + 64),
        ({"itemsize": 4}, 32000 * 4096 * 4, 4096 * 4),
    ],
)
def test_where_experts_are_read_from_disk_so_is_the_embedding(sizes, embedding_bytes, row_bytes):
    checkpoint = make_checkpoint(**REAL, **sizes)
    held = with_room(checkpoint, 13.8, dense_backend="zero3")
    plan = with_room(checkpoint, 13.8)
    assert (held.embedding_on_disk_bytes, held.num_slots) == (0, 13)
    assert plan.embedding_on_disk_bytes == embedding_bytes
    assert plan.dense_bytes == held.dense_bytes - embedding_bytes
    # 64 blocks of rows at once, and a window of each thread's.
    rows = 64 * row_bytes + 4 * (row_bytes + 2 * 4096)
    assert plan.workspace_bytes == held.workspace_bytes + rows
    freed = int(12.8 * plan.slot_bytes) - 12 * plan.slot_bytes + embedding_bytes - rows
    assert plan.num_slots == 13 + freed // plan.slot_bytes > 13
    assert plan.minimum_device_bytes == held.minimum_device_bytes - embedding_bytes + rows
    table = dict(plan.table())
    assert table["  embedding"] == format_bytes(embedding_bytes)
    assert dict(held.table())["  embedding"] == "0 B"


def test_short_steps_need_memory_for_few_rows():
    checkpoint = make_checkpoint(**REAL)
    for tokens, rows in ((1, 1), (40, 40), (64, 64), (512, 64)):
        flags = {"scheduler.max_batch_tokens": tokens}
        held = with_room(checkpoint, 13.8, **flags, dense_backend="zero3")
        plan = with_room(checkpoint, 13.8, **flags)
        grown = plan.workspace_bytes - held.workspace_bytes
        assert grown == rows * 8192 + 4 * (8192 + 2 * 4096)


@pytest.mark.parametrize(
    ("sizes", "slots", "flags"),
    [
        ({}, 32, {}),
        ({}, 33, {}),
        ({}, 20.5, {"host_memory": 13 * 360 * 10**6}),
        ({"tied": True}, 13.8, {}),
        ({}, 13.8, {"dense_backend": "zero3"}),
        ({}, 13.8, {"device": "cuda", "host_memory": 10**9}),
        # It would make room for no expert.
        ({}, 13.1, {}),
        # Its rows would take as much memory as it does.
        ({"vocab": 64}, 13.999, {}),
    ],
)
def test_else_it_is_held(sizes, slots, flags):
    checkpoint = make_checkpoint(**{**REAL, **sizes})
    plan = with_room(checkpoint, slots, **flags)
    assert plan.embedding_on_disk_bytes == 0
    assert plan.dense_bytes == checkpoint.dense_bytes
    assert plan.num_slots == min(int(slots), 32)


def test_its_room_may_be_the_last_that_was_missing():
    checkpoint = make_checkpoint(**REAL, itemsize=4)
    held = with_room(checkpoint, 31.8, dense_backend="zero3")
    plan = with_room(checkpoint, 31.8)
    assert (held.num_slots, held.num_absent) == (31, 1)
    assert plan.embedding_on_disk_bytes == 32000 * 4096 * 4
    assert plan.num_absent == 0
    larger = held.device_budget_bytes + held.slot_bytes
    config = make_config(device_memory=larger, dense_backend="resident")
    assert plan_memory(config, checkpoint).embedding_on_disk_bytes == 0


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (24 * GIB, "24.00 GiB"),
        (3 * 1024 * GIB, "3.00 TiB"),
        (5000 * 1024 * GIB, "5000.00 TiB"),
    ],
)
def test_sizes_for_people(count, text):
    assert format_bytes(count) == text
