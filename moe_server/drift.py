"""How far a packed store's model is from the checkpoint's: the same text through both.

The figures are those of next-token distributions, position by position. Knows nothing of how logits
come about; `commands/pack.py` brings both models. Shape legend: N positions, V vocabulary.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_server.checkpoint import Checkpoint
from moe_server.errors import MoeServerError, Reason
from moe_server.kernels.formats import WeightFormat
from moe_server.packed import StoreFormat
from moe_server.tokenizer import load_tokenizer

Logits = Callable[[torch.Tensor], torch.Tensor]
"""int64 (windows, positions) to (windows, positions, vocab_size)."""

WINDOW_TOKENS = 512
CHARACTERS_PER_TOKEN = 16
"""More than a token of a text has on average: more of it need not be encoded."""
ROWS_AT_ONCE = 64
"""Positions whose distributions are held in float64."""
BUILT_IN_TEXT = Path(__file__).with_name("drift_text.txt")


@dataclass(frozen=True, slots=True)
class Drift:
    """Averages over positions."""

    tokens: int
    """Positions whose next token counted."""
    kl_divergence: float
    """In nats, of the store's next-token distribution from the checkpoint's."""
    top1_agreement: float
    """Share of positions at which both find the same token most likely."""
    source_perplexity: float
    perplexity: float

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / self.source_perplexity


@dataclass(frozen=True, slots=True)
class Sample:
    """What both models read."""

    description: str
    """For people: where it comes from."""
    windows: torch.Tensor
    """int64 (windows, positions)."""


def take_sample(checkpoint: Checkpoint, text_file: Path | None, num_tokens: int) -> Sample:
    """Windows of a text, or of random tokens where the checkpoint has no tokenizer.

    Args:
        checkpoint: Whose tokenizer and vocabulary count.
        text_file: UTF-8; None: a text of our own.
        num_tokens: The most that are taken.

    Raises:
        MoeServerError: The file cannot be read or is too short, or there is no tokenizer for it.
    """
    window = max(2, min(WINDOW_TOKENS, checkpoint.max_context_tokens, num_tokens))
    tokenizer = load_tokenizer(checkpoint.path)
    if tokenizer is None and text_file is not None:
        raise MoeServerError(
            f"{checkpoint.path} has no tokenizer to read {text_file} with.",
            "Leave --text out: random tokens are taken then.",
            reason=Reason.UNSUPPORTED,
            field="text",
        )
    if tokenizer is None:
        draw = random.Random(0)  # noqa: S311
        count = max(1, num_tokens // window) * window
        token_ids = [draw.randrange(checkpoint.vocab_size) for _ in range(count)]
        description = "random tokens, as the checkpoint has no tokenizer"
    else:
        file = text_file or BUILT_IN_TEXT
        text = _read_text(file)[: num_tokens * CHARACTERS_PER_TOKEN]
        token_ids = tokenizer.encode(text)[:num_tokens]
        description = "the built-in text" if text_file is None else str(text_file)
    if len(token_ids) < 2:
        raise MoeServerError(
            f"{description} has {len(token_ids)} tokens.", "Give a longer text.", field="text"
        )
    window = min(window, len(token_ids))
    count = len(token_ids) // window
    windows = torch.tensor(token_ids[: count * window], dtype=torch.int64).view(count, window)
    return Sample(description, windows)


def measure_drift(source: Logits, store: Logits, windows: torch.Tensor) -> Drift:
    """Reads the windows with both models.

    Args:
        source: The checkpoint's model.
        store: The packed store's.
        windows: int64 (windows, positions), at least two positions.
    """
    source_logits, store_logits = source(windows), store(windows)
    kl = agreed = source_loss = loss = 0.0
    following_N = windows[:, 1:].flatten()
    expected_NV, got_NV = source_logits[:, :-1].flatten(0, 1), store_logits[:, :-1].flatten(0, 1)
    for start in range(0, len(following_N), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        p, q = (logits[rows].double().log_softmax(-1) for logits in (expected_NV, got_NV))
        following = following_N[rows, None]
        kl += float((p.exp() * (p - q)).sum())
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        source_loss -= float(p.gather(1, following).sum())
        loss -= float(q.gather(1, following).sum())
    count = len(following_N)
    return Drift(
        tokens=count,
        kl_divergence=kl / count,
        top1_agreement=agreed / count,
        source_perplexity=math.exp(source_loss / count),
        perplexity=math.exp(loss / count),
    )


def refuse_drift(drift: Drift, max_drift: float, stored: StoreFormat) -> None:
    """Refuses a store whose perplexity is too far from the checkpoint's.

    Raises:
        MoeServerError: The ratio passes 1 + `max_drift`, or is no number.
    """
    excess = drift.perplexity_ratio - 1
    if not excess <= max_drift:
        raise MoeServerError(
            f"The store's perplexity is {drift.perplexity:.4g} where the checkpoint's is "
            f"{drift.source_perplexity:.4g}: {excess:+.2%}, more than the {max_drift:.2%} allowed.",
            f"Pack with {_closer_format(stored)}, or accept it with a larger --max-drift: what was "
            "packed is kept beside OUT for that.",
            field="max_drift",
        )


def _closer_format(stored: StoreFormat) -> str:
    if stored.dense_int8:
        return "--dense-format checkpoint"
    if stored.experts is WeightFormat.INT4:
        return "--format int8" + " or a smaller --group-size" * (stored.group_columns > 32)
    return "--format bf16"


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MoeServerError(
            f"Cannot read the text {file}: {error}.",
            "Give a UTF-8 text file.",
            reason=Reason.NOT_FOUND,
            field="text",
        ) from None
