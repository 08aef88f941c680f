"""The bare model: `Model.forward` and the likeliest token, no scheduler, sampler or server.

Experts are those of a running server, where they lie in memory: nothing is held twice, and both
read the same pages. All of them have a place, so nobody writes there. Whoever starts it sets
OMP_WAIT_POLICY as the engine process does, before torch can be imported.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from session import Prompts, serve, session

from moe_server.budget import plan_memory, usable_cores
from moe_server.checkpoint import read_checkpoint
from moe_server.config import load_config
from moe_server.kernels import native
from moe_server.model import Model
from moe_server.step import StepInput
from moe_server.weights import Weights, lasting_memory


def main() -> None:
    """Takes the experts over and serves its works."""
    job = session()
    config = load_config(flags=job["flags"], environ={})
    checkpoint = read_checkpoint(Path(job["flags"]["model"]))
    plan = plan_memory(config, checkpoint)
    memory = os.open(job["memory"], os.O_RDWR)
    weights = Weights(config, checkpoint, plan, lasting_memory(memory, config, checkpoint, plan))
    weights.begin()
    if weights.num_kept != plan.num_experts_total:
        raise SystemExit(
            f"{weights.num_kept} of {plan.num_experts_total} experts are in the server's memory"
        )
    torch.set_num_threads(usable_cores())
    native.set_num_threads(usable_cores())
    block_tokens = config.scheduler.block_tokens
    model = Model(
        weights,
        device=torch.device("cpu"),
        num_blocks=plan.num_blocks,
        block_tokens=block_tokens,
        prefetch=False,
    )
    model.load_dense(lambda _done: None)

    def generate(prompts: Prompts, new_tokens: int) -> Iterator[list[int]]:
        longest = max(map(len, prompts)) + new_tokens
        blocks = -(-longest // block_tokens)
        tables = [list(range(row * blocks, (row + 1) * blocks)) for row in range(len(prompts))]
        texts = [list(prompt) for prompt in prompts]
        fresh = [len(prompt) for prompt in prompts]
        for _ in range(new_tokens):
            step = [
                StepInput(
                    token_ids=text[-num_new:],
                    num_context=len(text),
                    num_prompt=len(prompt),
                    block_table=table,
                    wants_logits=True,
                    still_wanted=lambda: True,
                    fail=_fail,
                )
                for text, prompt, table, num_new in zip(texts, prompts, tables, fresh, strict=True)
            ]
            tokens = model.forward(step).argmax(dim=-1).tolist()
            for text, token in zip(texts, tokens, strict=True):
                text.append(token)
            fresh = [1] * len(prompts)
            yield tokens

    serve(generate, [[3]], {}, lambda: {"cpu_ns": time.process_time_ns()})


def _fail(error: Exception) -> None:
    raise error


if __name__ == "__main__":
    sys.exit(main())
