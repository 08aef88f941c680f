"""An engine that nobody has warmed up, in a process of its own: what its first requests wait for.

    python -m benchmarks.coldstart_unwarmed JOB

JOB is a JSON file with `model`, `flags` (of `serve`) and `prompts`. The dense weights are loaded,
the experts come from disk when a request wants them, as a server reads that has no preload. Prints
the seconds to each request's first token as one JSON line. `coldstart_first` starts it.
"""

import json
import sys
import time
from pathlib import Path

from moe_server.budget import plan_memory
from moe_server.checkpoint import read_checkpoint
from moe_server.config import load_config
from moe_server.engine_process import SWITCH_INTERVAL_S
from moe_server.messages import Submit
from moe_server.weights import Weights


class UnfilledWeights(Weights):
    """Weights whose places for experts are empty at first."""

    def fill(self, spare_slots: int = 0) -> None:
        """Reads nothing ahead of the first request."""


def main() -> None:
    """Loads, answers every prompt, prints."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    job = json.loads(Path(sys.argv[1]).read_text())
    names = [flag.removeprefix("--").replace("-", "_") for flag in job["flags"][::2]]
    flags = dict(zip(names, job["flags"][1::2], strict=True))
    config = load_config(flags={"model": job["model"], **flags}, environ={})
    checkpoint = read_checkpoint(config.model_path)
    plan = plan_memory(config, checkpoint)
    weights = UnfilledWeights(config, checkpoint, plan)
    weights.begin()
    from moe_server.engine import Engine  # noqa: PLC0415  reading has begun

    engine = Engine(config, plan, weights)
    engine.model.load_dense(lambda _: None)
    weights.read_embedding(lambda _: None)
    if config.dense_backend == "zero3":
        engine.model.use_zero3(config.zero3_config)
    ttfts_s = []
    for number, token_ids in enumerate(job["prompts"]):
        sent = time.perf_counter()
        engine.submit(Submit(number, token_ids, 1, eos_token_ids=[]))
        while not engine.idle:
            done = engine.step()
            if done.failed:
                raise SystemExit(f"The engine failed: {done.failed[0].message}")
        ttfts_s.append(time.perf_counter() - sent)
    engine.close()
    print(json.dumps(ttfts_s))


if __name__ == "__main__":
    main()
