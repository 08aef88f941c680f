"""Make the demo checkpoint: collect text, train a tokenizer, train a tiny Mixtral, measure it.

    python -m moe_server.demo.train --out DIR [--steps N | --minutes N] [--seed N]

The text is what the running Python already carries: docstrings and comment blocks of the
standard library (read from its source files, which are parsed and never imported), the `pydoc`
topics, and the docstrings of the modules compiled into the interpreter. The model is the stock
`transformers.MixtralForCausalLM` in float32; what is written is bfloat16 in the layout of the
model hub. The measurements printed at the end come from the written files, loaded again.

What this does not know: other Python versions carry other text, so a checkpoint can only be made
again, bit for bit, with the same Python, the same libraries, the same kind of processor, one
thread and `--steps`. With `--minutes` the learning rate follows the clock. The held-out text is
whole source files that training never saw, but it is the same kind of prose by the same authors,
and only exact copies are removed: its perplexity says nothing about other text.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import logging
import math
import random
import re
import sys
import sysconfig
import time
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

import numpy as np
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

LOG = logging.getLogger(__name__)

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
START, END = 1, 2
SPACE = "▁"
VOCABULARY_SIZE = 2048
ALPHABET = [SPACE, "\n", *(chr(code) for code in range(33, 127))]
# A run of spaces or line breaks leaves its last space to the word that follows it.
WORD_PATTERN = (
    rf"\n+{SPACE}*(?={SPACE})|\n+|{SPACE}+(?={SPACE})"
    rf"|{SPACE}?\p{{L}}+|{SPACE}?\p{{N}}|{SPACE}?[^{SPACE}\n\p{{L}}\p{{N}}]+|{SPACE}"
)

MAX_POSITIONS = 2048
ROTARY_BASE = 10000.0
TOKENS_PER_STEP = 2048
WINDOW_LENGTHS = (512, 1024, 2048)
WINDOW_CHANCES = (0.7, 0.2, 0.1)
SNAP_DISTANCE = 128
HELD_OUT_SHARE = 0.04

PEAK_LEARNING_RATE = 3e-3
FINAL_LEARNING_RATE_SHARE = 0.02
WARM_UP_SHARE = 0.03
WEIGHT_DECAY = 0.1
GRADIENT_NORM = 1.0
BALANCE_COEFFICIENT = 0.02

COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#[^\n]*\n){2,}", re.MULTILINE)
COMMENT_MARK = re.compile(r"^[ \t]*#+ ?", re.MULTILINE)
PROMPTS = ("Return a list of", "Raise an exception if", "This module provides", "")


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and documents of other source files to measure with."""

    train: list[str]
    held_out: list[str]


@dataclass(frozen=True)
class Budget:
    """When training ends: after a number of steps, or after a number of seconds."""

    steps: int | None
    seconds: float | None

    def progress(self, step: int, elapsed: float) -> float:
        """The share of the budget that is used, 1.0 or more when training is over."""
        if self.steps is not None:
            return step / self.steps
        assert self.seconds is not None
        return elapsed / self.seconds


def docstrings_in(source: str) -> Iterator[str]:
    """The docstrings of a module's source, in the order of the syntax tree."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


def comments_in(source: str) -> Iterator[str]:
    """Comment blocks of two lines and more, without their marks."""
    for block in COMMENT_BLOCK.finditer(source):
        yield inspect.cleandoc("\n" + COMMENT_MARK.sub("", block.group()))


def library_files() -> Iterator[Path]:
    """The standard library's source files, in a fixed order, without installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not {"site-packages", "dist-packages"}.intersection(parts) and parts[0] != "pydoc_data":
            yield path


def documents_of_file(path: Path) -> list[str]:
    """Docstrings, then comments, of one file; none where it is no valid Python."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        return [*docstrings_in(source), *comments_in(source)]
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []


def documents_of_compiled_module(module: ModuleType) -> Iterator[str]:
    """Docstrings of a module that has no source file, of its classes and of their methods."""
    for value in (module, *vars(module).values()):
        members = vars(value).values() if isinstance(value, type) else ()
        for item in (value, *members):
            text = getattr(item, "__doc__", None)
            if isinstance(text, str):
                yield inspect.cleandoc(text)


def sources() -> Iterator[tuple[str, list[str]]]:
    """Pairs of a source's name and its documents; one source is split as a whole."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in library_files():
        yield str(path.relative_to(root)), documents_of_file(path)
    for name in sorted(topics):
        yield f"topic {name}", [topics[name].strip()]
    for name in sorted(sys.builtin_module_names):
        documents = documents_of_compiled_module(importlib.import_module(name))
        yield f"compiled {name}", list(documents)


def is_prose(text: str) -> bool:
    """Whether a document is long enough and mostly letters and spaces, so no table or rule."""
    letters = sum(character.isalpha() or character == " " for character in text)
    return len(text) >= 24 and letters >= 0.7 * len(text)


def share_of_name(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on the name and the seed alone."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def collect_corpus(seed: int) -> Corpus:
    """All documents, each text once, split by source."""
    seen: set[str] = set()
    corpus = Corpus(train=[], held_out=[])
    for name, documents in sources():
        held_out = share_of_name(name, seed) < HELD_OUT_SHARE
        for text in documents:
            key = " ".join(text.split()).lower()
            if key not in seen and is_prose(text):
                seen.add(key)
                (corpus.held_out if held_out else corpus.train).append(text)
    return corpus


def text_pipeline(tokenizer: Tokenizer) -> Tokenizer:
    """Set how text becomes pieces: a leading mark, marks for spaces, words apart."""
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    return tokenizer


def learn_merges(documents: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Train byte-pair merges on printable ASCII: the pieces in order, and the merges."""
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS) - len(BYTE_TOKENS),
        initial_alphabet=ALPHABET,
        limit_alphabet=len(ALPHABET),
        show_progress=False,
    )
    tokenizer = text_pipeline(Tokenizer(models.BPE()))
    ascii_only = (re.sub(r"[^\n -~]", "\n", text) for text in documents)
    tokenizer.train_from_iterator(ascii_only, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    return pieces, [(left, right) for left, right in learned["merges"]]


def train_tokenizer(documents: Iterable[str]) -> Tokenizer:
    """A tokenizer in the style of Llama's: special tokens, 256 byte tokens, then pieces."""
    pieces, merges = learn_merges(documents)
    vocabulary = {
        token: index for index, token in enumerate((*SPECIAL_TOKENS, *BYTE_TOKENS, *pieces))
    }
    tokenizer = text_pipeline(
        Tokenizer(
            models.BPE(
                vocab=vocabulary,
                merges=merges,
                unk_token="<unk>",  # noqa: S106
                fuse_unk=True,
                byte_fallback=True,
            )
        )
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", START)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def random_text(generator: random.Random) -> str:
    """Text from all of Unicode but the space mark, rich in spaces, tabs and line breaks."""

    def character() -> str:
        kind = generator.random()
        if kind < 0.4:
            return generator.choice("  \t\n\r")
        if kind < 0.7:
            return chr(generator.randrange(128))
        code = generator.randrange(0x110000)
        return "?" if 0xD800 <= code < 0xE000 or code == ord(SPACE) else chr(code)

    return "".join(character() for _ in range(generator.randrange(40)))


def check_round_trips(tokenizer: Tokenizer, seed: int, documents: Iterable[str]) -> None:
    """Fail unless text comes back exactly from its tokens."""
    generator = random.Random(seed)  # noqa: S311
    fixed = ("", " ", "   a  b ", "\t\n x", "naïve 👩‍🚀 日本語", "<0x41> <s", "a\r\n\r\n  b")
    randoms = (random_text(generator) for _ in range(5000))
    for text in (*fixed, *documents, *randoms):
        if tokenizer.decode(tokenizer.encode(text).ids) != text and SPACE not in text:
            raise ValueError(f"the tokenizer does not give back {text!r}")


def as_stream(tokenizer: Tokenizer, documents: Iterable[str]) -> np.ndarray:
    """All documents as one run of tokens, each between a start and an end token."""
    tokens: list[int] = []
    for encoding in tokenizer.encode_batch(list(documents)):
        tokens.extend((*encoding.ids, END))
    return np.array(tokens, dtype=np.int64)


def window_sampler(stream: np.ndarray, seed: int) -> Callable[[], Tensor]:
    """A function that draws batches of one window length, of as many tokens each time.

    A window begins at the start of a document when one lies shortly before the drawn place.
    """
    generator = np.random.default_rng(seed)
    starts = np.flatnonzero(stream == START)

    def window(length: int) -> np.ndarray:
        place = int(generator.integers(len(stream) - length))
        start = int(starts[np.searchsorted(starts, place, side="right") - 1])
        place = start if place - start < SNAP_DISTANCE else place
        return stream[place : place + length + 1]

    def batch() -> Tensor:
        length = int(generator.choice(WINDOW_LENGTHS, p=WINDOW_CHANCES))
        windows = [window(length) for _ in range(TOKENS_PER_STEP // length)]
        return torch.from_numpy(np.stack(windows))

    return batch


def model_config() -> MixtralConfig:
    """The demo's shape: Mixtral's, small enough to live in a source tree."""
    return MixtralConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        initializer_range=0.04,
        router_aux_loss_coef=BALANCE_COEFFICIENT,
        bos_token_id=START,
        eos_token_id=END,
    )


def add_dropout(model: MixtralForCausalLM, chance: float) -> None:
    """Drop parts of the embeddings and of what each block adds, while training."""

    def drop(module: nn.Module, _: object, output: object) -> object:
        if isinstance(output, tuple):
            return (functional.dropout(output[0], chance, module.training), *output[1:])
        assert isinstance(output, Tensor)
        return functional.dropout(output, chance, module.training)

    places = [model.model.embed_tokens]
    for layer in model.model.layers:
        places.extend((layer.self_attn, layer.mlp))
    for place in places:
        place.register_forward_hook(drop)


def expert_counts(router_logits: Tensor, chosen: int) -> Tensor:
    """How many of a layer's choices fell on each expert."""
    choices = router_logits.topk(chosen, dim=-1).indices.flatten()
    return torch.bincount(choices, minlength=router_logits.shape[-1])


def balance_loss(router_logits: tuple[Tensor, ...], chosen: int) -> Tensor:
    """The load-balancing loss of the Switch Transformer, per layer, averaged; 1.0 is balanced.

    The one in transformers joins all layers first, so that one layer can undo another's skew.
    """
    losses = []
    for logits in router_logits:
        counts = expert_counts(logits, chosen).float()
        chances = logits.float().softmax(dim=-1).mean(dim=0)
        losses.append(len(counts) * (counts / counts.sum() * chances).sum())
    return torch.stack(losses).mean()


def token_losses(model: MixtralForCausalLM, windows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Each next token's loss, shaped as the inputs, and the router's logits of each layer."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    output = model(input_ids=inputs, use_cache=False, output_router_logits=True)
    logits = output.logits.float().flatten(0, 1)
    losses = functional.cross_entropy(logits, targets.flatten(), reduction="none")
    return losses.view_as(targets), output.router_logits


def make_optimizer(model: MixtralForCausalLM) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine down to a small share of the peak."""
    if progress < WARM_UP_SHARE:
        return PEAK_LEARNING_RATE * max(progress, 1e-4) / WARM_UP_SHARE
    cosine = 0.5 + 0.5 * math.cos(math.pi * (progress - WARM_UP_SHARE) / (1 - WARM_UP_SHARE))
    share = FINAL_LEARNING_RATE_SHARE + (1 - FINAL_LEARNING_RATE_SHARE) * cosine
    return PEAK_LEARNING_RATE * share


def train_step(
    model: MixtralForCausalLM, optimizer: torch.optim.AdamW, windows: Tensor, rate: float
) -> tuple[float, float]:
    """One update; the mean token loss and the balance loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    losses, router_logits = token_losses(model, windows)
    loss = losses.mean()
    balance = balance_loss(router_logits, model.config.num_experts_per_tok)
    (loss + BALANCE_COEFFICIENT * balance).backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), balance.item()


def held_out_windows(stream: np.ndarray, length: int) -> Iterator[Tensor]:
    """The held-out stream in windows of one length, one after the other."""
    for place in range(0, len(stream) - length, length):
        yield torch.from_numpy(stream[place : place + length + 1])[None]


def quick_perplexity(model: MixtralForCausalLM, stream: np.ndarray) -> float:
    """Perplexity on short held-out windows, to watch training."""
    model.eval()
    with torch.inference_mode():
        windows = torch.cat(list(held_out_windows(stream, 512)))
        losses = [token_losses(model, part)[0] for part in torch.split(windows, 8)]
    model.train()
    return math.exp(torch.cat(losses).mean().item())


def train_model(
    train: np.ndarray, held_out: np.ndarray, budget: Budget, dropout: float, seed: int
) -> tuple[MixtralForCausalLM, int]:
    """Train until the budget is used; the model in float32 and the steps taken."""
    torch.manual_seed(seed)
    model = MixtralForCausalLM(model_config())
    model.train()
    add_dropout(model, dropout)
    optimizer = make_optimizer(model)
    next_batch = window_sampler(train, seed)
    began = time.monotonic()
    step = 0
    while (progress := budget.progress(step, time.monotonic() - began)) < 1.0:
        loss, balance = train_step(model, optimizer, next_batch(), learning_rate(progress))
        step += 1
        if step % 50 == 0:
            elapsed = time.monotonic() - began
            LOG.info("step %d %.0f s loss %.3f balance %.3f", step, elapsed, loss, balance)
        if step % 500 == 0:
            LOG.info("step %d held-out %.2f", step, quick_perplexity(model, held_out))
    return model, step


def write_json(path: Path, values: dict[str, object]) -> None:
    """A settings file as transformers writes them."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_checkpoint(model: MixtralForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the model in bfloat16 and the tokenizer, as the model hub lays them out.

    The base of the rotary embedding is written twice, for readers of either age.
    """
    model.generation_config = GenerationConfig(bos_token_id=START, eos_token_id=END)
    model.to(torch.bfloat16).save_pretrained(out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    write_json(out / "config.json", {**config, "rope_theta": ROTARY_BASE})
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    write_json(out / "tokenizer_config.json", settings)


def measure(model: MixtralForCausalLM, stream: np.ndarray) -> dict[str, object]:
    """Perplexity over held-out windows of the full length, by position, and expert shares."""
    chosen = model.config.num_experts_per_tok
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_local_experts)
    rows = []
    with torch.inference_mode():
        for window in held_out_windows(stream, MAX_POSITIONS):
            losses, router_logits = token_losses(model, window)
            rows.append(losses)
            counts += torch.stack([expert_counts(logits, chosen) for logits in router_logits])
    losses = torch.cat(rows)
    quarters = losses.mean(dim=0).view(4, -1).mean(dim=1)
    shares = counts / counts.sum(dim=1, keepdim=True)
    return {
        "tokens": losses.numel(),
        "perplexity": round(losses.mean().exp().item(), 3),
        "perplexity_by_quarter_of_positions": [round(x.exp().item(), 3) for x in quarters],
        "expert_shares": [[round(share, 3) for share in row] for row in shares.tolist()],
    }


def complete(
    model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, *, sampled: bool
) -> str:
    """The prompt and up to 60 more tokens: the likeliest, or drawn at temperature 0.7."""
    torch.manual_seed(0)
    drawing = {"temperature": 0.7, "top_p": 0.95} if sampled else {}
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, do_sample=sampled, max_new_tokens=60, **drawing)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=False))


def report(out: Path, held_out: np.ndarray) -> dict[str, object]:
    """What the written files do when stock transformers loads them."""
    model = MixtralForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": {path.name: path.stat().st_size for path in sorted(out.iterdir())},
        **measure(model, held_out),
        "greedy": [complete(model, tokenizer, prompt, sampled=False) for prompt in PROMPTS],
        "sampled": [complete(model, tokenizer, prompt, sampled=True) for prompt in PROMPTS],
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the embedded demo checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, help="number of updates, repeatable")
    budget.add_argument("--minutes", type=float, default=60.0, help="training time instead")
    parser.add_argument("--dropout", type=float, default=0.05, help="chance, while training")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Collect, train, write and measure."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    corpus = collect_corpus(arguments.seed)
    tokenizer = train_tokenizer(corpus.train)
    check_round_trips(tokenizer, arguments.seed, corpus.held_out)
    train, held_out = (as_stream(tokenizer, part) for part in (corpus.train, corpus.held_out))
    for name, part, stream in (("train", corpus.train, train), ("held", corpus.held_out, held_out)):
        size = sum(map(len, part))
        LOG.info("%s: %d documents, %d characters, %d tokens", name, len(part), size, len(stream))
    budget = Budget(arguments.steps, arguments.minutes * 60)
    model, steps = train_model(train, held_out, budget, arguments.dropout, arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_checkpoint(model, tokenizer, arguments.out)
    LOG.info(json.dumps({"steps": steps, **report(arguments.out, held_out)}, indent=1))


if __name__ == "__main__":
    main()
