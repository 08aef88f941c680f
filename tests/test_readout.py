"""Scores and embeddings: transformers' own, and the same whatever happens beside them."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_server.engine import Engine
from moe_server.kernels import native
from moe_server.messages import Sampling, StepDone, Submit, TokenEvent
from moe_server.readout import MAX_HIDDEN, Readout
from tests.driver import run, running_engine, token_ids
from tests.test_architectures import COMMON, CONFIGS, write
from tests.test_schedules import count_rows
from tests.tiny import Tiny

TINY = Tiny(dtype="bfloat16", seed=60, vocab=90)
needs_exact_kernels = pytest.mark.skipif(
    torch.ops.mkldnn._is_mkldnn_bf16_supported() and not native.is_available(),
    reason="oneDNN's bfloat16 products round by the number of rows; see benchmarks/LOG.md",
)


def scoring(number: int, prompt: Sequence[int], continuation: Sequence[int]) -> Submit:
    token_ids = [*prompt, *continuation][:-1]
    return Submit(number, token_ids, 1, [], targets=list(continuation))


def embedding(number: int, prompt: Sequence[int]) -> Submit:
    return Submit(number, list(prompt), 1, [], pools=True)


def told(events: Sequence[TokenEvent]) -> tuple[list[tuple[float, bool]], list[float]]:
    [event] = events
    assert event.finish is not None
    return [(score.logprob, score.is_greedy) for score in event.target_scores], event.embedding


def tokens(choose: random.Random, vocab: int, low: int, high: int) -> list[int]:
    return [choose.randrange(vocab) for _ in range(choose.randint(low, high))]


class Reference:
    """What transformers says, each prompt alone."""

    def __init__(self, path: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", experts_implementation="eager"
        )

    def scores(
        self, prompt: Sequence[int], continuation: Sequence[int]
    ) -> list[tuple[float, bool]]:
        with torch.inference_mode():
            logits = self._model(torch.tensor([[*prompt, *continuation]])).logits[0].float()
        rows = logits[len(prompt) - 1 : -1]
        picks = rows.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])[:, 0]
        return list(
            zip(picks.tolist(), (rows.argmax(-1).tolist() == np.array(continuation)), strict=True)
        )

    def embedding(self, prompt: Sequence[int]) -> list[float]:
        with torch.inference_mode():
            hidden = self._model.model(torch.tensor([prompt])).last_hidden_state[0].float()
        mean = hidden.mean(0)
        return (mean / mean.norm()).tolist()


def assert_equals_transformers(path: Path, vocab: int, seed: int) -> None:
    choose = random.Random(seed)
    reference = Reference(path)
    prompt = tokens(choose, vocab, 70, 90)
    continuations = [tokens(choose, vocab, 1, 12) for _ in range(4)]
    # What greedy decoding says, so that some targets are the most likely ones.
    with running_engine(path, **{"scheduler.max_batch_tokens": 40}) as engine:
        [events] = run(engine, [Submit(0, prompt, 6, [])])
        continuations.append(token_ids(events))
        requests = [
            scoring(i, prompt, continuation) for i, continuation in enumerate(continuations)
        ]
        requests += [embedding(10, prompt), embedding(11, prompt[:5])]
        answers = [told(events) for events in run(engine, requests)]
    for continuation, (scores, pooled) in zip(continuations, answers[:5], strict=True):
        assert not pooled
        expected = reference.scores(prompt, continuation)
        assert [score for score, _ in scores] == pytest.approx([e for e, _ in expected], abs=1e-4)
        assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert all(is_greedy for _, is_greedy in answers[4][0])
    for number, length in ((5, len(prompt)), (6, 5)):
        scores, pooled = answers[number]
        assert not scores
        assert pooled == pytest.approx(reference.embedding(prompt[:length]), abs=1e-4)
        assert np.linalg.norm(pooled) == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [{}, {"sliding_window": 16}, {"tied": True, "experts": 4}])
def test_fp32_equals_transformers(shape: dict, tmp_path: Path) -> None:
    tiny = Tiny(seed=61, vocab=90, **shape)
    assert_equals_transformers(tiny.write(tmp_path), tiny.vocab, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_other_architectures_equal_transformers(name: str, tmp_path: Path) -> None:
    assert_equals_transformers(write(name, tmp_path), COMMON["vocab_size"], 2)


def test_zero3_reads_the_same(tmp_path: Path) -> None:
    path, prompt = TINY.write(tmp_path), list(range(50))
    requests = [scoring(0, prompt, [1, 2, 3]), embedding(1, prompt)]
    outcomes = []
    for backend in ("resident", "zero3"):
        with running_engine(path, dense_backend=backend) as engine:
            outcomes.append([told(events) for events in run(engine, requests)])
    assert outcomes[0] == outcomes[1]


def test_scores_are_the_log_probabilities_of_generation(tmp_path: Path) -> None:
    path, prompt = replace(TINY, dtype="float32").write(tmp_path), list(range(40))
    with running_engine(path) as engine:
        [events] = run(engine, [Submit(0, prompt, 5, [], logprobs=0)])
        [scored] = run(engine, [scoring(1, prompt, token_ids(events))])
    logprobs = [event.logprob for event in events]
    assert [score for score, _ in told(scored)[0]] == pytest.approx(logprobs, abs=1e-5)


@needs_exact_kernels
@pytest.mark.parametrize("seed", range(4))
def test_answers_do_not_depend_on_the_schedule(seed: int, tmp_path: Path) -> None:
    choose = random.Random(seed)
    path = TINY.write(tmp_path)
    stem = tokens(choose, TINY.vocab, 60, 60)
    requests: list[Submit] = []
    for number in range(36):
        prompt = stem[: choose.randint(30, 60)] + tokens(choose, TINY.vocab, 1, 6)
        kind = choose.randrange(3)
        if kind == 0:
            requests.append(scoring(number, prompt, tokens(choose, TINY.vocab, 1, 40)))
        elif kind == 1:
            requests.append(embedding(number, prompt))
        else:
            requests.append(Submit(number, prompt, 50, [], Sampling(), logprobs=0))
    readouts = [request for request in requests if request.targets or request.pools]
    with running_engine(path, **{"scheduler.reuse_prefixes": False}) as engine:
        alone = {one.request_id: told(run(engine, [one])[0]) for one in readouts}
    flags = {"scheduler.max_batch_tokens": choose.choice([33, 64, 512])}
    with running_engine(path, device_memory="min", max_total_tokens=120, **flags) as engine:
        answers = run_shuffled(engine, requests, choose)
        assert engine.scheduler.counters.preemptions > 0
        assert engine.scheduler.counters.cached_tokens > 0
    assert answers == alone


def run_shuffled(
    engine: Engine, requests: Sequence[Submit], choose: random.Random
) -> dict[int, tuple]:
    to_come, answers = list(requests), {}

    def take(done: StepDone) -> None:
        assert not done.failed
        for event in done.tokens:
            if event.target_scores or event.embedding:
                answers[event.request_id] = told([event])

    while to_come or not engine.idle:
        while to_come and choose.random() < 0.9:
            engine.submit(to_come.pop(0))
        take(engine.step())
        engine.scheduler.check_integrity()
    return answers


def test_what_continuations_share_is_computed_once(tmp_path: Path) -> None:
    path, prompt = TINY.write(tmp_path), [number % TINY.vocab for number in range(100)]
    with running_engine(path) as engine:
        rows = count_rows(engine)
        answers = run(engine, [scoring(number, prompt, [number, 5]) for number in range(6)])
        assert [events[-1].cached_tokens for events in answers] == [0, *[96] * 5]
        assert sum(rows) == 101 + 5 * 5
        # All hidden states of a pooled prompt are needed; what it computes serves others.
        [pooled] = run(engine, [embedding(7, prompt)])
        assert pooled[-1].cached_tokens == 0
        # Of a long continuation the first target's row is needed, behind 40 tokens.
        [long] = run(engine, [scoring(8, prompt[:40], prompt[40:])])
        assert long[-1].cached_tokens == 32
        assert len(long[-1].target_scores) == 60


def test_logits_of_many_rows_are_taken_a_few_at_a_time(tmp_path: Path) -> None:
    path = TINY.write(tmp_path)
    with running_engine(path, **{"scheduler.max_running": 3}) as engine:
        head = engine.model._module.get_submodule("lm_head")
        forward, rows = head.forward, []
        head.forward = lambda x: rows.append(x.numel() // x.shape[-1]) or forward(x)
        run(engine, [scoring(0, list(range(30)), [1] * 20)])
    assert rows == [1, *[3] * 6, 2]


def test_what_is_not_finite_is_said_so(tmp_path: Path) -> None:
    with running_engine(TINY.write(tmp_path)) as engine:
        norm = engine.model._module.get_submodule("model.norm")
        norm.weight = torch.nn.Parameter(norm.weight * float("inf"), requires_grad=False)
        for request in (embedding(0, range(9)), scoring(1, range(9), [1, 2])):
            engine.submit(request)
            failed = []
            while not engine.idle:
                failed += engine.step().failed
            assert [failure.request_id for failure in failed] == [request.request_id]
            assert "not finite" in failed[0].message
        assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks


def test_sums_do_not_depend_on_where_they_are_cut() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(100, 16) * torch.logspace(-4, 4, 16)
    pooled = []
    for cuts in ([100], [1, 99], [33, 33, 34], [7] * 14 + [2]):
        readout, first = Readout(embedding(0, range(100))), 0
        readout.take_hidden(0, hidden[:50])  # preempted
        for size in cuts:
            readout.take_hidden(first, hidden[first : first + size])
            first += size
        pooled.append(readout.embedding)
    assert pooled == [pooled[0]] * 4
    mean = hidden.double().mean(0)
    assert pooled[0] == pytest.approx((mean / mean.norm()).tolist(), abs=1e-6)
    readout.take_hidden(0, torch.full((1, 16), MAX_HIDDEN))
    assert readout.is_broken
