"""Tiny Mixtral checkpoints written by transformers itself, and its own answers to them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM


@dataclass(frozen=True)
class Tiny:
    """What varies between the checkpoints; the defaults are the plainest one."""

    dtype: str = "float32"
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    hidden: int = 64
    intermediate: int = 96
    experts: int = 8
    top_k: int = 2
    tied: bool = False
    sliding_window: int | None = None
    rope: dict[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 1e4}
    )
    max_positions: int = 512
    max_shard: str = "5GB"
    seed: int = 0
    vocab: int = 320

    def write(self, path: Path) -> Path:
        """Writes the checkpoint; weights are large enough that logits differ clearly."""
        torch.manual_seed(self.seed)
        config = MixtralConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            num_local_experts=self.experts,
            num_experts_per_tok=self.top_k,
            tie_word_embeddings=self.tied,
            sliding_window=self.sliding_window,
            rope_parameters=self.rope,
            max_position_embeddings=self.max_positions,
            initializer_range=0.2,
            eos_token_id=None,
            bos_token_id=None,
        )
        model = MixtralForCausalLM(config).to(getattr(torch, self.dtype))
        model.save_pretrained(path, max_shard_size=self.max_shard)
        return path


@dataclass(frozen=True)
class Answer:
    """What transformers' own greedy `generate` says to a prompt."""

    token_ids: list[int]
    logprobs: list[float]


def transformers_answers(path: Path, prompts: list[list[int]], new_tokens: int) -> list[Answer]:
    """Greedy completions, each prompt alone, in the checkpoint's dtype."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", experts_implementation="eager")
    answers = []
    for prompt in prompts:
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
                pad_token_id=0,
            )
        token_ids = output.sequences[0, len(prompt) :].tolist()
        logprobs = [
            float(logits[0].float().log_softmax(-1)[token])
            for logits, token in zip(output.logits, token_ids, strict=True)
        ]
        answers.append(Answer(token_ids, logprobs))
    return answers


def edit_config(path: Path, **changes: Any) -> None:
    """Overwrites keys of a checkpoint's config.json."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
