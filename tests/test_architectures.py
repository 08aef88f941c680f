"""Other architectures, one mechanism: tokens equal transformers', wherever experts are."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moe_server.checkpoint import read_checkpoint
from moe_server.errors import MoeServerError
from moe_server.json_file import read_json, write_json
from moe_server.kernels.formats import WeightFormat
from moe_server.layerwise import LayerwiseModel
from moe_server.pack import pack
from moe_server.packed import StoreFormat
from tests.driver import greedy, run, running_engine, token_ids
from tests.tiny import edit_config, transformers_answers

NEW_TOKENS = 24
COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
SPARSE = {"num_experts": 8, "num_experts_per_tok": 3}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3Moe",
        SPARSE | {"head_dim": 24, "moe_intermediate_size": 48, "norm_topk_prob": True},
    ),
    "qwen3_moe, weights as they are": (
        "Qwen3Moe",
        SPARSE | {"head_dim": 16, "moe_intermediate_size": 48, "norm_topk_prob": False},
    ),
    "qwen3_moe, biases": (
        "Qwen3Moe",
        SPARSE | {"head_dim": 16, "moe_intermediate_size": 48, "attention_bias": True},
    ),
    "olmoe": ("Olmoe", SPARSE | {"intermediate_size": 48}),
    "olmoe, clipped": ("Olmoe", SPARSE | {"intermediate_size": 48, "clip_qkv": 0.5}),
    "mistral": ("Mistral", {"intermediate_size": 96, "sliding_window": None}),
    "mistral, sliding window": ("Mistral", {"intermediate_size": 96, "sliding_window": 16}),
    "llama": ("Llama", {"intermediate_size": 96}),
    "llama, tied, biases": (
        "Llama",
        {
            "intermediate_size": 96,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
}
PLACES = {
    "resident": {},
    "one slot": {"device_memory": "min"},
    "one slot, host tier": {"device_memory": "min", "host_memory": 200_000},
}


def write(name: str, path: Path, dtype: str = "float32") -> Path:
    family, sizes = CONFIGS[name]
    torch.manual_seed(len(name))
    config = getattr(transformers, f"{family}Config")(**COMMON | sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    # Biases begin at zero.
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float(parameter.data[0]), std=0.1)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    return path


def prompts_of(name: str) -> list[list[int]]:
    choose = random.Random(name)
    return [[choose.randrange(320) for _ in range(length)] for length in (1, 7, 40)]


def places_of(path: Path) -> dict[str, dict[str, Any]]:
    return PLACES if read_checkpoint(path).experts else {"resident": {}}


@pytest.mark.parametrize("name", CONFIGS)
def test_fp32_tokens_and_logprobs_equal_transformers(name, tmp_path):
    path = write(name, tmp_path)
    prompts = prompts_of(name)
    expected = transformers_answers(path, prompts, NEW_TOKENS)
    for place, budgets in places_of(path).items():
        with running_engine(path, **budgets, **{"scheduler.max_batch_tokens": 32}) as engine:
            requests = greedy(prompts, NEW_TOKENS)
            batch = run(engine, requests)
            alone = [run(engine, [request])[0] for request in requests]
        for together, single, answer in zip(batch, alone, expected, strict=True):
            for events in (together, single):
                assert token_ids(events) == answer.token_ids, place
                logprobs = torch.tensor([event.logprob for event in events])
                assert torch.allclose(logprobs, torch.tensor(answer.logprobs), atol=2e-4), place


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_bits_do_not_depend_on_where_experts_are_nor_on_neighbours(name, tmp_path):
    path = write(name, tmp_path, "bfloat16")
    requests = greedy(prompts_of(name), NEW_TOKENS)
    with running_engine(path) as engine:
        expected = run(engine, requests)
    for place, budgets in places_of(path).items():
        with running_engine(path, **budgets) as engine:
            told = [run(engine, [request])[0] for request in requests]
        for events, other in zip(told, expected, strict=True):
            assert token_ids(events) == token_ids(other), place
            assert [one.logprob for one in events] == [one.logprob for one in other], place


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "mistral", "llama, tied, biases"])
@pytest.mark.parametrize("expert_format", [WeightFormat.BFLOAT16, WeightFormat.INT8])
def test_a_packed_store_serves_too(name, expert_format, tmp_path):
    source = write(name, tmp_path / "source", "bfloat16")
    stored = StoreFormat(
        WeightFormat.BFLOAT16,
        expert_format,
        128,
        dense_int8=expert_format.is_integer,
    )
    pack(source, tmp_path / "store", stored, assess=lambda *_: {})
    requests = greedy(prompts_of(name), NEW_TOKENS)
    with running_engine(source) as engine:
        expected = run(engine, requests)
    with running_engine(tmp_path / "store") as engine:
        told = run(engine, requests)
    for events, other in zip(told, expected, strict=True):
        if expert_format.is_integer:
            assert abs(events[0].logprob - other[0].logprob) < 0.5
        else:
            assert [one.logprob for one in events] == [one.logprob for one in other]


@pytest.mark.parametrize("name", ["qwen3_moe, biases", "olmoe", "llama, tied, biases"])
def test_drift_is_measured_on_the_same_model(name, tmp_path):
    path = write(name, tmp_path)
    [prompt] = [one for one in prompts_of(name) if len(one) > 10]
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = torch.tensor([prompt])
    with torch.inference_mode():
        expected = model(tokens).logits
    layerwise = LayerwiseModel(read_checkpoint(path), lambda _nbytes: None)
    try:
        assert torch.allclose(layerwise.logits(tokens), expected, atol=1e-3)
    finally:
        layerwise.close()


def test_layers_of_two_kinds_are_refused(tmp_path):
    path = write("qwen3_moe", tmp_path)
    edit_config(path, mlp_only_layers=[1])
    with pytest.raises(MoeServerError, match="mlp_only_layers is \\[1\\]") as caught:
        read_checkpoint(path)
    assert caught.value.remedy
    edit_config(path, mlp_only_layers=[], decoder_sparse_step=2)
    with pytest.raises(MoeServerError, match="decoder_sparse_step is 2"):
        read_checkpoint(path)


def test_what_is_not_served_is_told_what_is(tmp_path):
    path = write("llama", tmp_path)
    config = read_json(path / "config.json")
    write_json(path / "config.json", config | {"model_type": "gpt2"})
    with pytest.raises(MoeServerError, match="'gpt2'") as caught:
        read_checkpoint(path)
    assert "mixtral, qwen3_moe, olmoe, mistral, llama" in caught.value.remedy
