"""The engine in the test's own process: what ends requests, and that nothing else does."""

import errno
import json
import os
import time
from pathlib import Path

import pytest
import torch

from moe_server.errors import MoeServerError, Reason
from moe_server.messages import FinishReason, Sampling, Submit
from tests.driver import greedy, run, running_engine, token_ids
from tests.tiny import Tiny, edit_config

TINY = Tiny(seed=30, vocab=80)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
OTHER = [2, 7, 1, 8]
BLOCK_TOKENS = 16


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return TINY.write(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def engine(path):
    with running_engine(path, max_total_tokens=256) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(engine):
    """What each of the two prompts is answered with."""
    return [token_ids(events) for events in run(engine, greedy([PROMPT, OTHER], 20))]


@pytest.fixture(autouse=True)
def nothing_left_behind(request):
    yield
    if "engine" in request.fixturenames:
        assert_empty(request.getfixturevalue("engine"))


def assert_empty(engine) -> None:
    assert engine.idle
    engine.cache.check_integrity()
    engine.scheduler.check_integrity()
    load = engine.step().load
    assert (load.running, load.waiting, load.blocks_used) == (0, 0, 0)


def submit(engine, request_id=0, prompt=PROMPT, new_tokens=20, eos=(), deadline=None) -> None:
    engine.submit(Submit(request_id, list(prompt), new_tokens, list(eos), deadline=deadline))


# The ends that requests choose


def test_one_new_token_needs_one_step(engine, expected):
    submit(engine, new_tokens=1)
    [event] = engine.step().tokens
    assert event.token_id == expected[0][0]
    assert event.finish is FinishReason.LENGTH


def test_only_the_last_token_carries_a_finish_reason(engine, expected):
    [events] = run(engine, greedy([PROMPT], 5))
    assert token_ids(events) == expected[0][:5]
    assert [event.finish for event in events] == [None] * 4 + [FinishReason.LENGTH]


def test_generation_ends_after_an_end_of_sequence_token(engine, expected):
    answer = expected[0]
    position, eos = next(
        (n, token) for n, token in enumerate(answer) if token not in answer[:n] and n
    )
    unused = next(token for token in range(TINY.vocab) if token not in answer)
    request = Submit(0, PROMPT, 20, [unused, eos])
    [events] = run(engine, [request])
    assert token_ids(events) == answer[: position + 1]
    assert events[-1].finish is FinishReason.END_OF_SEQUENCE
    # At the last token that may come, it is still the better reason; in the prompt it is no reason.
    [events] = run(engine, [Submit(0, PROMPT, position + 1, [eos, PROMPT[0]])])
    assert events[-1].finish is FinishReason.END_OF_SEQUENCE


def test_without_end_of_sequence_tokens_it_goes_on(engine, expected):
    [events] = run(engine, [Submit(0, PROMPT, 20, [])])
    assert token_ids(events) == expected[0]


# Sizes


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 10, 11, 12, 64])
def test_any_chunk_size_gives_the_same_tokens(path, expected, chunk):
    with running_engine(path, **{"scheduler.max_batch_tokens": chunk}) as engine:
        answers = run(engine, greedy([PROMPT, OTHER], 20))
    assert [token_ids(events) for events in answers] == expected


@pytest.mark.parametrize("block_tokens", [1, 3, 64])
def test_any_block_size_gives_the_same_tokens(path, expected, block_tokens):
    with running_engine(path, **{"scheduler.block_tokens": block_tokens}) as engine:
        answers = run(engine, greedy([PROMPT, OTHER], 20))
    assert [token_ids(events) for events in answers] == expected


def test_a_request_may_take_the_whole_pool(path):
    total = 4 * BLOCK_TOKENS
    prompt = [number % TINY.vocab for number in range(total - 9)]
    with running_engine(path, max_total_tokens=total) as engine:
        submit(engine, 0, prompt, new_tokens=9)
        submit(engine, 1, OTHER, new_tokens=2)
        first = engine.step()
        assert (first.load.blocks_used, first.load.blocks_total) == (4, 4)
        assert (first.load.running, first.load.waiting) == (1, 1)
        tokens = {0: [event.token_id for event in first.tokens], 1: []}
        while not engine.idle:
            for event in engine.step().tokens:
                tokens[event.request_id].append(event.token_id)
        assert_empty(engine)
    assert [len(answer) for answer in tokens.values()] == [9, 2]
    with running_engine(path) as engine:
        alone = run(engine, greedy([prompt], 9))[0]
    assert tokens[0] == token_ids(alone)


def test_prompts_are_prefilled_beside_decoding_requests(path, expected):
    with running_engine(path, **{"scheduler.max_batch_tokens": 4}) as engine:
        submit(engine, 1, OTHER)
        tokens = {0: [], 1: [engine.step().tokens[0].token_id]}
        submit(engine, 0, PROMPT)
        while not engine.idle:
            done = engine.step()
            ids = [event.request_id for event in done.tokens]
            assert len(tokens[1]) == 20 or 1 in ids, "a decoding request missed a step"
            for event in done.tokens:
                tokens[event.request_id].append(event.token_id)
    assert [tokens[0], tokens[1]] == expected


# Cancelling


def test_a_request_cancelled_in_the_queue_leaves_no_trace(engine):
    submit(engine)
    engine.cancel(0)
    done = engine.step()
    assert (done.tokens, done.failed, done.load.blocks_used) == ([], [], 0)


def test_a_running_request_cancelled_is_gone_within_one_step(engine, expected):
    submit(engine, 0, PROMPT)
    submit(engine, 1, OTHER)
    answer = [event.token_id for event in engine.step().tokens if event.request_id == 1]
    engine.cancel(0)
    done = engine.step()
    assert [event.request_id for event in done.tokens] == [1]
    assert done.failed == []
    assert done.load.running == 1
    answer += [event.token_id for event in done.tokens]
    while not engine.idle:
        answer += [event.token_id for event in engine.step().tokens]
    assert answer == expected[1]


def test_a_request_cancelled_while_it_is_prefilled(path):
    with running_engine(path, **{"scheduler.max_batch_tokens": 4}) as engine:
        submit(engine)
        assert engine.step().tokens == []
        engine.cancel(0)
        assert_empty(engine)


def test_a_request_cancelled_as_it_fails_is_not_heard_of_again(engine, monkeypatch):
    forward = engine.model.forward

    def leaving(batch, poll):
        batch[0].fail(MoeServerError("Its expert cannot be read."))
        engine.cancel(0)
        return forward(batch, poll)

    monkeypatch.setattr(engine.model, "forward", leaving)
    submit(engine)
    done = engine.step()
    assert (done.tokens, done.failed) == ([], [])


def test_cancelling_what_is_not_there_does_nothing(engine):
    engine.cancel(12345)


# Deadlines


def test_a_deadline_that_has_passed_already(engine):
    submit(engine, deadline=time.monotonic() - 1)
    done = engine.step()
    [failed] = done.failed
    assert failed.reason is Reason.EXPIRED
    assert "waiting in the queue" in failed.message
    assert done.tokens == []
    assert done.load.waiting == 0


class Clock:
    """Time that passes when the test says so."""

    def __init__(self, monkeypatch) -> None:
        self.now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_a_deadline_that_passes_while_decoding(engine, expected, monkeypatch):
    clock = Clock(monkeypatch)
    submit(engine, 0, PROMPT, deadline=clock.now + 10)
    submit(engine, 1, OTHER, deadline=clock.now + 1000)
    tokens = {0: [], 1: []}
    for _ in range(3):
        for event in engine.step().tokens:
            tokens[event.request_id].append(event.token_id)
    clock.now += 10
    done = engine.step()
    [failed] = done.failed
    assert (failed.request_id, failed.reason) == (0, Reason.EXPIRED)
    assert "decoding after 3 tokens" in failed.message
    assert [event.request_id for event in done.tokens] == [1]
    assert tokens[0] == expected[0][:3]
    engine.cancel(1)


def test_a_deadline_that_passes_while_prefilling(path, monkeypatch):
    clock = Clock(monkeypatch)
    with running_engine(path, **{"scheduler.max_batch_tokens": 4}) as engine:
        submit(engine, deadline=clock.now + 10)
        assert engine.step().failed == []
        clock.now += 11
        [failed] = engine.step().failed
        assert "prefilling the prompt" in failed.message
        assert_empty(engine)


def slow_down(engine, clock, monkeypatch, seconds: float) -> None:
    """Every forward pass takes so long, by the test's clock."""
    forward = engine.model.forward

    def slow_forward(batch, poll):
        clock.now += seconds
        return forward(batch, poll)

    monkeypatch.setattr(engine.model, "forward", slow_forward)


def test_what_cannot_make_its_deadline_is_refused_before_it_takes_a_step(path, monkeypatch):
    clock = Clock(monkeypatch)
    with running_engine(path) as engine:
        slow_down(engine, clock, monkeypatch, 2.0)
        run(engine, greedy([OTHER], 10))
        for request_id, seconds in enumerate([1.9, 2.1, 200.0]):
            submit(engine, request_id, new_tokens=1, deadline=clock.now + seconds)
        long = Submit(3, PROMPT, 20, [], deadline=clock.now + 39.0, fewest_new_tokens=20)
        engine.submit(long)
        done = engine.step()
        assert [(one.request_id, one.reason) for one in done.failed] == [
            (0, Reason.EXPIRED),
            (3, Reason.EXPIRED),
        ]
        assert "at most 19 new tokens" in done.failed[1].remedy
        assert sorted(event.request_id for event in done.tokens) == [1, 2]
        assert done.load.hopeless == 2
        assert_empty(engine)


def test_who_waits_for_too_long_is_refused_before_it_takes_a_step(path, monkeypatch):
    clock = Clock(monkeypatch)
    flags = {"scheduler.max_running": 1, "scheduler.max_wait_s": 5}
    with running_engine(path, **flags) as engine:
        slow_down(engine, clock, monkeypatch, 0.5)
        submit(engine, 0, new_tokens=20)
        for request_id in (1, 2):
            submit(engine, request_id, new_tokens=1)
        engine.submit(Submit(3, PROMPT, 1, [], is_patient=True))
        failed = []
        while not failed:
            failed = engine.step().failed
        assert [(one.request_id, one.reason) for one in failed] == [
            (1, Reason.EXHAUSTED),
            (2, Reason.EXHAUSTED),
        ]
        assert "It waited for 5.0 s" in failed[0].message
        assert failed[0].retry_s == 5.0, "nothing has started: the pace is not known"
        done = engine.step()
        assert done.load.overdue == 2
        assert [event.request_id for event in done.tokens] == [0]
        while not engine.idle:
            done = engine.step()
            assert done.failed == []
        assert [event.request_id for event in done.tokens] == [3]
        assert_empty(engine)


def test_a_step_that_was_cut_short_says_nothing_of_what_steps_take(path, monkeypatch):
    clock = Clock(monkeypatch)
    with running_engine(path) as engine:
        slow_down(engine, clock, monkeypatch, 2.0)
        run(engine, greedy([OTHER], 10))
        forward = engine.model.forward

        def cut_short(batch, poll):
            clock.now -= 1.9
            engine.cancel(0)
            return forward(batch, poll)

        monkeypatch.setattr(engine.model, "forward", cut_short)
        submit(engine, 0)
        engine.step()
        submit(engine, 1, new_tokens=1, deadline=clock.now + 1.0)
        assert [failed.request_id for failed in engine.step().failed] == [1]
        assert_empty(engine)


def test_timings_tell_queue_prefill_and_decode_apart(engine, monkeypatch):
    clock = Clock(monkeypatch)
    slow_down(engine, clock, monkeypatch, 2.0)
    submit(engine, new_tokens=3)
    clock.now += 5.0
    events = [event for _ in range(3) for event in engine.step().tokens]
    timings = events[-1].timings
    assert timings.queue_s == pytest.approx(5.0)
    assert timings.prefill_s == pytest.approx(2.0)
    assert timings.decode_s == pytest.approx(4.0)


# Read failures


class Disk:
    """os.preadv, which fails on demand."""

    def __init__(self, monkeypatch) -> None:
        self.calls, self.fails = 0, lambda _: False
        real = os.preadv

        def preadv(*args):
            self.calls += 1
            if self.fails(self.calls):
                raise OSError(errno.EIO, "Input/output error")
            return real(*args)

        monkeypatch.setattr(os, "preadv", preadv)


BACKENDS = {
    "resident": {},
    "zero3": {"dense_backend": "zero3"},
    "zero3, nothing persistent": {"dense_backend": "zero3"},
}


# A decoding step reads six times for each of two layers.
@pytest.mark.parametrize(
    ("backend", "good_steps", "good_reads"),
    [
        ("resident", 0, 0),
        ("resident", 4, 9),
        ("zero3", 0, 9),
        ("zero3", 1, 0),
        ("zero3", 4, 9),
        ("zero3, nothing persistent", 0, 0),
        ("zero3, nothing persistent", 1, 3),
        ("zero3, nothing persistent", 4, 9),
    ],
)
def test_a_read_failure_fails_the_step_s_requests_and_no_others(
    path, expected, tmp_path, monkeypatch, backend, good_steps, good_reads
):
    flags = dict(BACKENDS[backend])
    if "nothing" in backend:
        flags["zero3_config"] = str(tmp_path / "zero3.json")
        zero = {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
        }
        (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": zero}))
    with running_engine(
        path,
        device_memory="min",
        max_total_tokens=32,
        **flags,
        **{"scheduler.max_running": 1},
    ) as engine:
        disk = Disk(monkeypatch)
        submit(engine, 0, PROMPT)
        submit(engine, 1, OTHER)
        for _ in range(good_steps):
            assert engine.step().failed == []
        first_bad = disk.calls + good_reads
        disk.fails = lambda call: call > first_bad
        done = engine.step()
        [failed] = done.failed
        assert failed.request_id == 0
        assert failed.reason is Reason.UNAVAILABLE
        assert "Input/output error" in failed.message
        assert failed.remedy
        assert done.tokens == []
        assert done.load.running == 0
        assert done.load.waiting == 1
        engine.cache.check_integrity()
        engine.scheduler.check_integrity()
        disk.fails = lambda _: False
        answer = []
        while not engine.idle:
            done = engine.step()
            assert done.failed == []
            answer += [event.token_id for event in done.tokens]
        assert answer == expected[1]
        for _ in range(2):
            assert token_ids(run(engine, greedy([PROMPT], 20))[0]) == expected[0]
        assert_empty(engine)


def test_reads_that_fail_now_and_then_never_give_wrong_tokens(path, expected, monkeypatch):
    with running_engine(path, device_memory="min", host_memory=300_000) as engine:
        disk = Disk(monkeypatch)
        # Longer than a block is tried again.
        disk.fails = lambda call: call % 97 < 9
        answers, failures = [], 0
        for request_id in range(40):
            submit(engine, request_id, PROMPT, new_tokens=3)
            answer = []
            while not engine.idle:
                done = engine.step()
                failures += len(done.failed)
                answer += [event.token_id for event in done.tokens]
            assert answer == expected[0][: len(answer)]
            answers.append(len(answer))
            engine.cache.check_integrity()
    assert failures > 3
    assert answers.count(3) > 3


def test_sampled_and_greedy_requests_share_a_step(engine, expected):
    sampled = Submit(1, OTHER, 20, [], Sampling(temperature=1.0, seed=1))
    [greedy_events, _] = run(engine, [Submit(0, PROMPT, 20, []), sampled])
    assert token_ids(greedy_events) == expected[0]


@pytest.mark.parametrize("change", [{"hidden_act": "nonsense"}, {"rms_norm_eps": "small"}])
def test_a_config_that_transformers_refuses_is_the_users_to_mend(
    change: dict[str, object], tmp_path: Path
) -> None:
    path = Tiny().write(tmp_path)
    edit_config(path, **change)
    with (
        pytest.raises(MoeServerError, match=r"cannot build MixtralForCausalLM") as caught,
        running_engine(path),
    ):
        pass
    assert caught.value.reason is Reason.INVALID


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_end_their_own_request_only(
    engine, expected, monkeypatch, value
):
    sample_from = engine.model.forward

    def overflowing(batch, poll):
        with torch.inference_mode():
            logits = sample_from(batch, poll).clone()
            logits[0, 3] = value
        return logits

    monkeypatch.setattr(engine.model, "forward", overflowing)
    engine.submit(Submit(0, PROMPT, 20, [], Sampling(temperature=1.0)))
    submit(engine, 1, OTHER)
    done = engine.step()
    monkeypatch.undo()
    [failed] = done.failed
    assert (failed.request_id, failed.reason) == (0, Reason.UNSUPPORTED)
    answer = [event.token_id for event in done.tokens]
    while not engine.idle:
        answer += [event.token_id for event in engine.step().tokens]
    assert answer == expected[1]
    assert_empty(engine)


def test_finite_logits_whose_sum_is_not_are_served(engine, monkeypatch):
    sample_from = engine.model.forward

    def enormous(batch, poll):
        with torch.inference_mode():
            logits = sample_from(batch, poll).clone()
            logits[:, 3:9] = torch.finfo(torch.float32).max
        return logits

    monkeypatch.setattr(engine.model, "forward", enormous)
    assert token_ids(run(engine, greedy([PROMPT], 4))[0]) == [3] * 4
