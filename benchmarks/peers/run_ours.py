"""Our engine, measured as the peers are: in one process, without the server around it.

The steps are those of the engine process (`moe_server/engine_process.py`): reading begins before
the heavy libraries are imported. For a cold start the first prompt comes at once; otherwise the
preload has touched every expert before, as in a server that is READY.
"""

import os
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from session import Prompts, serve, session

from moe_server.budget import plan_memory, runtime_bytes
from moe_server.checkpoint import read_checkpoint
from moe_server.config import load_config
from moe_server.engine_process import SWITCH_INTERVAL_S
from moe_server.messages import Submit
from moe_server.weights import Weights


def main() -> None:
    """Loads the model within the session's cap and serves its works."""
    job = session()
    options = job["options"]
    flags = {
        "model": job["model"],
        "dense_backend": "resident",
        "max_total_tokens": job["max_total_tokens"],
        "threads": job["threads"],
        # Whatever is sent twice is to be computed twice.
        "scheduler.reuse_prefixes": False,
    }
    config = load_config(flags=flags, environ={})
    checkpoint = read_checkpoint(Path(job["model"]))
    if options["memory_bytes"] is not None:
        device_memory = options["memory_bytes"] - runtime_bytes(config, checkpoint)
        config = config.model_copy(update={"device_memory": device_memory})
    plan = plan_memory(config, checkpoint)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    weights = Weights(config, checkpoint, plan)
    weights.begin()
    from moe_server.engine import Engine  # noqa: PLC0415  see above
    from moe_server.warmup.preload import preload  # noqa: PLC0415

    engine = Engine(config, plan, weights)
    if job["cold"]:
        engine.model.load_dense(lambda _: None)
    else:
        preload(engine, config, plan, lambda _: None)
    numbers = count()

    def generate(prompts: Prompts, new_tokens: int) -> Iterator[list[int]]:
        rows = {next(numbers): row for row in range(len(prompts))}
        for request, row in rows.items():
            engine.submit(Submit(request, prompts[row], new_tokens, eos_token_ids=[]))
        while not engine.idle:
            done = engine.step()
            if done.failed:
                raise SystemExit(f"The engine failed: {done.failed[0].message}")
            tokens = {rows[event.request_id]: event.token_id for event in done.tokens}
            if len(tokens) != len(rows):
                raise SystemExit(f"A step gave {len(tokens)} tokens, expected {len(rows)}")
            yield [tokens[row] for row in range(len(rows))]

    def counters() -> dict[str, int]:
        return {"expert_read_bytes": engine.cache.counters.read_bytes}

    facts = {
        "expert_bytes": plan.expert_bytes,
        "dense_bytes": plan.dense_bytes,
        "num_slots": plan.num_slots,
    }
    serve(generate, [job["prompt"]], facts, counters)
    engine.close()


if __name__ == "__main__":
    main()
