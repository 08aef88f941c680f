"""How a measured process talks to the benchmark, and how its work is timed: the same for all peers.

The process is started with one JSON argument (the session: model, threads, options). It answers, on
a pipe of its own, with a JSON line once the first token of the first prompt is there, then
with one line for each JSON line of work on stdin, and ends with stdin. Standard library only: it
runs in each peer's own environment. Knows no engine; a runner brings a `generate` function.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], Iterator[list[int]]]
"""(prompts, new_tokens) -> the next token of every prompt, step by step, greedily."""


def session() -> dict[str, Any]:
    """What this process was started for."""
    job: dict[str, Any] = json.loads(sys.argv[1])
    return job


def serve(
    generate: Generate,
    prompts: Prompts,
    facts: dict[str, Any],
    counters: Callable[[], dict[str, int]] = dict,
) -> None:
    """Runs the first prompt, then every piece of work on stdin.

    Args:
        generate: The engine.
        prompts: The session's first prompt, alone in its list.
        facts: Told with the first line.
        counters: What the engine itself counts, monotonic; differences are reported.
    """
    # Not stdout: libraries print there.
    answers = os.fdopen(int(os.environ["MOE_BENCH_ANSWERS"]), "w")

    def answer(line: dict[str, Any]) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    first = next(generate(prompts, 1))
    now = time.monotonic()
    answer({"first_token_at": now, "read_bytes": read_bytes(), "token": first[0], **facts})
    for line in sys.stdin:
        answer(measured(generate, json.loads(line), counters))


def measured(
    generate: Generate, work: dict[str, Any], counters: Callable[[], dict[str, int]]
) -> dict[str, Any]:
    """Seconds, steps and bytes of one piece of work.

    A decode is measured from its `skip`-th step on, so that the prompt and the first tokens are
    not in it; without `skip` everything counts, from the prompt to its first token.
    """
    prompts, skip = work["prompts"], work.get("skip", 0)
    before = _now(counters)
    steps = 0
    tokens: list[list[int]] = [[] for _ in prompts]
    for step in generate(prompts, work["new_tokens"]):
        steps += 1
        for ids, token in zip(tokens, step, strict=True):
            ids.append(int(token))
        if steps == skip:
            before = _now(counters)
    after = _now(counters)
    return {
        "seconds": after["at"] - before["at"],
        "steps": steps - skip,
        "sequences": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "token_ids": tokens,
        **{name: after[name] - before[name] for name in after if name != "at"},
    }


def read_bytes() -> int:
    """Bytes this process has had read from the disk, page faults and O_DIRECT included."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def _now(counters: Callable[[], dict[str, int]]) -> dict[str, Any]:
    return {"at": time.monotonic(), "read_bytes": read_bytes(), **counters()}
