"""Our side of the benchmark, as a process: its tokens are the model's, its bytes the cache's."""

import json
import sys
from pathlib import Path

from benchmarks.child import running
from benchmarks.loads import Work, prompt
from tests.tiny import Tiny, transformers_answers

ROOT = Path(__file__).parents[2]


def test_serves_works_one_after_another(tmp_path: Path) -> None:
    model = Tiny().write(tmp_path / "model")
    prompts = [[token % 320 for token in prompt(seed, 16)] for seed in "abc"]
    job = {
        "model": str(model),
        "threads": 1,
        "max_total_tokens": 1024,
        "options": {"memory_bytes": None},
        "cold": True,
        "prompt": prompts[0],
    }
    command = [sys.executable, str(ROOT / "benchmarks/peers/run_ours.py"), json.dumps(job)]
    environ = {"PYTHONPATH": str(ROOT)}
    with running(command, cap_bytes=None, log=tmp_path / "log", environ=environ) as child:
        facts = child.answer(100)
        decode = child.ask({"prompts": prompts, "new_tokens": 6, "skip": 2}, 100)
        prefill = child.ask({"prompts": prompts[:1], "new_tokens": 1}, 100)
    expected = transformers_answers(model, prompts, 6)
    assert facts["first_token_at"] > child.started_at
    assert facts["token"] == expected[0].token_ids[0]
    assert decode["token_ids"] == [answer.token_ids for answer in expected]
    assert (decode["steps"], decode["sequences"]) == (4, 3)
    assert decode["expert_read_bytes"] == 0  # all of them were resident by then
    assert prefill["token_ids"] == [expected[0].token_ids[:1]]
    assert (prefill["steps"], prefill["prompt_tokens"]) == (1, 16)
    work = Work("decode", "b3", 3, 16, new_tokens=6, skip=2)
    assert work.tokens_per_s(decode) == 12 / decode["seconds"]
