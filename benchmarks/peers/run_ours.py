"""Our engine, measured as the peers are: in one process, without the server around it."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

from session import Prompts, serve, session

from moe_server.budget import RUNTIME_BYTES, plan_memory
from moe_server.checkpoint import read_checkpoint
from moe_server.config import load_config
from moe_server.engine import Engine
from moe_server.messages import Submit


def main() -> None:
    """Loads the model within the session's cap and serves its works."""
    job = session()
    options = job["options"]
    flags = {
        "model": job["model"],
        "dense_backend": "resident",
        "max_total_tokens": job["max_total_tokens"],
        "threads": job["threads"],
    }
    if options["memory_bytes"] is not None:
        flags["device_memory"] = options["memory_bytes"] - RUNTIME_BYTES
    config = load_config(flags=flags, environ={})
    checkpoint = read_checkpoint(Path(job["model"]))
    plan = plan_memory(config, checkpoint)
    engine = Engine(config, checkpoint, plan)
    # Experts are read when the first prompt wants them: a cold start loads no more than it needs.
    engine.model.load_dense(engine.reader, lambda _: None)
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
        "num_layers": checkpoint.num_layers,
        "num_experts": checkpoint.num_experts,
        "top_k": checkpoint.num_experts_per_token,
        "expert_bytes": plan.expert_bytes,
        "dense_bytes": plan.dense_bytes,
        "num_slots": plan.num_slots,
    }
    serve(generate, [job["prompt"]], facts, counters)
    engine.close()


if __name__ == "__main__":
    main()
