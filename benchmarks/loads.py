"""The work that everybody is given, and the bars that the results are held to. Pure facts.

All prompts are the same random token ids for every contender of a repetition.
"""

import random
from dataclasses import dataclass, replace
from typing import Any

PROMPT_TOKENS = 16
MAX_TOTAL_TOKENS = 1024


@dataclass(frozen=True)
class Work:
    """One thing that is timed."""

    kind: str
    """decode | prefill."""
    label: str
    """b1, b8: sequences side by side; 512: tokens of the prompt."""
    sequences: int
    prompt_tokens: int
    new_tokens: int
    skip: int
    """Steps of a decode before it is timed."""
    warm: bool = False
    """Run once before, on another prompt."""

    @property
    def tokens_per_step(self) -> int:
        """Of one forward pass that is timed."""
        return self.sequences if self.kind == "decode" else self.prompt_tokens

    def request(self, seed: str) -> dict[str, Any]:
        """The work as a runner is asked for it."""
        prompts = [prompt(f"{seed}/{row}", self.prompt_tokens) for row in range(self.sequences)]
        return {"prompts": prompts, "new_tokens": self.new_tokens, "skip": self.skip}

    def tokens_per_s(self, answer: dict[str, Any]) -> float:
        """What a runner's answer comes to."""
        if self.kind == "decode":
            return float(answer["steps"] * answer["sequences"] / answer["seconds"])
        return float(answer["prompt_tokens"] / answer["seconds"])


DECODE_1 = Work("decode", "b1", 1, PROMPT_TOKENS, new_tokens=24, skip=4)
DECODE_8 = Work("decode", "b8", 8, PROMPT_TOKENS, new_tokens=14, skip=2)
PREFILL_512 = Work("prefill", "512", 1, 512, new_tokens=1, skip=0, warm=True)
COLD_START = "coldstart"


@dataclass(frozen=True)
class Load:
    """Works on one model under one cap, all in one process a contender."""

    name: str
    """Empty for the capped 4-layer model, otherwise the first part of the keys."""
    format: str
    size: str
    """Suffix of the models' names."""
    cap_share: float | None
    """Of the peer's model file."""
    works: tuple[Work, ...]
    cap_bytes: int | None = None
    """Instead of a share."""
    cold_start: bool = True

    def key(self, kind: str, label: str = "") -> str:
        """The key of a result, for example resident/decode/bf16/b1."""
        return "/".join(part for part in (self.name, kind, self.format, label) if part)

    @property
    def is_capped(self) -> bool:
        return self.cap_share is not None or self.cap_bytes is not None

    @property
    def all_fits(self) -> bool:
        """Whether the whole model can be in memory."""
        return not self.is_capped and self.size != "32"


ALL_WORKS = (DECODE_1, DECODE_8, PREFILL_512)
LOADS = (
    Load("", "bf16", "4", 0.5, ALL_WORKS),
    Load("resident", "bf16", "4", None, ALL_WORKS, cold_start=False),
    Load("", "int4", "4", 0.5, ALL_WORKS),
    Load("resident", "int4", "4", None, ALL_WORKS, cold_start=False),
)
FULL_LOADS = (
    Load("full", "int4", "32", None, (DECODE_1, PREFILL_512)),
    Load(
        "full-13GB",
        "int4",
        "32",
        None,
        (DECODE_1, DECODE_8),
        cap_bytes=13_100_000_000,
        cold_start=False,
    ),
)
QUICK_WORKS = (
    replace(DECODE_1, new_tokens=12, skip=2),
    replace(DECODE_8, new_tokens=6, skip=1),
    replace(PREFILL_512, warm=False),
)
QUICK_LOADS = (
    Load("", "bf16", "small", 0.5, QUICK_WORKS),
    Load("resident", "bf16", "small", None, QUICK_WORKS, cold_start=False),
)

LIMIT, BYTES = "limit", "bytes"
"""First parts of ratio keys: of the disk's limit in time, and over the least bytes."""
AT_LEAST = {
    "decode/bf16/b1": 1.6,
    "decode/bf16/b8": 2.0,
    "prefill/bf16/512": 2.5,
    "decode/int4/b1": 4.0,
    "decode/int4/b8": 3.5,
    "prefill/int4/512": 4.0,
    "resident/decode/bf16/b1": 1.0,
    "resident/decode/bf16/b8": 1.0,
    "resident/prefill/bf16/512": 1.0,
    "full/decode/int4/b1": 1.5,
    "full/prefill/int4/512": 10.0,
    "full-13GB/decode/int4/b1": 3.0,
    "full-13GB/decode/int4/b8": 3.0,
    f"{LIMIT}/decode/bf16/b1": 0.9,
}
"""Bars on ratios of tokens/s, ours over the better peer's, and of the limit."""
AT_MOST = {
    "coldstart/bf16": 0.5,
    "coldstart/int4": 0.5,
    "full/coldstart/int4": 0.5,
    f"{BYTES}/decode/bf16/b1": 1.03,
    f"{BYTES}/decode/int4/b1": 1.03,
}
"""Bars on ratios of seconds, ours over the faster peer's, and of bytes over the least."""


def prompt(seed: str, tokens: int) -> list[int]:
    """Random token ids; none of the first three, which are special."""
    return random.Random(seed).choices(range(3, 8000), k=tokens)  # noqa: S311


def met(key: str, ratio: float) -> bool | None:
    """Whether a ratio meets its bar; None where there is none."""
    if key in AT_LEAST:
        return ratio >= AT_LEAST[key]
    if key in AT_MOST:
        return ratio <= AT_MOST[key]
    return None
