"""Constrained requests in a real engine, alone and beside others, on the demo model."""

import json
import re
from concurrent.futures import Future

import jsonschema
import pytest
from llguidance import LLParserLimits

from moe_server.config import Config
from moe_server.constraints import matcher
from moe_server.errors import Reason
from moe_server.messages import FinishReason, Sampling, Submit
from tests.constraints.vocabularies import DEMO_EOS, constraint, demo_tokenizer, demo_vocabulary
from tests.driver import run, running_engine, token_ids

PROMPT = demo_tokenizer().encode("The answer is ")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 999}, "b": {"enum": ["x", "yes"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
REGEX = r"[a-z]{3,8} [0-9]{2,4}"
JSON = constraint("json_schema", json.dumps(SCHEMA))
CONSTRAINTS = [
    JSON,
    constraint("regex", REGEX),
    constraint("choices", "no", "yes", "yesterday"),
    constraint("grammar", 'start: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]{1,2}/'),
]
SAMPLINGS = {
    "greedy": Sampling(),
    "sampled": Sampling(temperature=1.0, seed=4),
    "filtered": Sampling(temperature=1.3, top_k=40, top_p=0.9, min_p=0.01, seed=5),
    "penalised": Sampling(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5),
}


@pytest.fixture(scope="module")
def engine():
    with running_engine(Config().model_path, max_total_tokens=2048) as engine:
        engine.compiler.use(demo_vocabulary())
        yield engine


def submit(
    number, what=None, sampling=SAMPLINGS["greedy"], new_tokens=200, eos=(DEMO_EOS,), **more
):
    return Submit(
        number, PROMPT, new_tokens, list(eos), sampling, logprobs=0, constraint=what, **more
    )


def text_of(events) -> str:
    return "".join(demo_tokenizer().token_bytes[event.token_id].decode() for event in events)


def assert_satisfied(what, text: str) -> None:
    match what.kind.value:
        case "json_schema":
            jsonschema.validate(json.loads(text), SCHEMA)
        case "regex":
            assert re.fullmatch(REGEX, text)
        case "choices":
            assert text in what.texts
        case "grammar":
            assert re.fullmatch(r"[0-9]{1,2}(\+[0-9]{1,2})*", text)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_every_completion_satisfies_its_constraint_and_changes_no_neighbour(engine, name):
    sampling = SAMPLINGS[name]
    free = [submit(100 + number, sampling=sampling, new_tokens=30) for number in range(2)]
    expected = [events_of(events) for events in run(engine, free)]
    bound = [submit(number, what, sampling) for number, what in enumerate(CONSTRAINTS)]
    together = run(engine, [free[0], *bound, free[1]])
    assert [events_of(together[0]), events_of(together[-1])] == expected
    for request, events in zip(bound, together[1:-1], strict=True):
        if events[-1].finish is FinishReason.END_OF_SEQUENCE:
            assert_satisfied(request.constraint, text_of(events))
        else:
            # Only the grammar's texts can be longer.
            assert request.constraint.kind.value == "grammar"
        assert events_of(run(engine, [request])[0]) == events_of(events)


def events_of(events):
    return [(event.token_id, event.logprob, event.finish) for event in events]


def test_samples_differ_and_all_satisfy(engine):
    requests = [
        submit(index, JSON, Sampling(temperature=1.0, seed=1, sample_index=index))
        for index in range(12)
    ]
    texts = [text_of(events) for events in run(engine, requests)]
    for text in texts:
        assert_satisfied(JSON, text)
    assert len(set(texts)) > 6


def test_max_new_tokens_cuts_a_text(engine):
    [whole] = run(engine, [submit(0, JSON)])
    for length in (1, len(whole) - 1):
        [events] = run(engine, [submit(0, JSON, new_tokens=length)])
        assert token_ids(events) == token_ids(whole)[:length]
        assert events[-1].finish is FinishReason.LENGTH
    # With its last token it is whole, without an end-of-sequence token.
    [events] = run(engine, [submit(0, JSON, new_tokens=len(whole))])
    assert events[-1].finish is FinishReason.END_OF_SEQUENCE
    assert text_of(events)[-1] == "}"


def test_ignoring_the_end_makes_the_longest_text(engine):
    [events] = run(engine, [submit(0, constraint("regex", "ab{0,6}"), eos=())])
    assert text_of(events) == "abbbbbb"
    assert events[-1].finish is FinishReason.END_OF_SEQUENCE


def test_a_stop_token_ends_a_text_early(engine):
    brace = demo_tokenizer().token_bytes.index(b"{")
    also = [token for token, text in enumerate(demo_tokenizer().token_bytes) if text == b"{"]
    [events] = run(engine, [submit(0, JSON, stop_token_ids=[brace, *also])])
    assert text_of(events) == "{"
    assert events[-1].finish is FinishReason.STOP_TOKEN


def test_an_end_of_sequence_token_that_a_grammar_asks_for_ends_nothing(engine):
    [events] = run(engine, [submit(0, constraint("grammar", f'start: "a" <[{DEMO_EOS}]> "b"'))])
    assert token_ids(events)[1] == DEMO_EOS
    assert text_of(events) == "ab"
    assert events[-1].finish is FinishReason.END_OF_SEQUENCE


def test_log_probabilities_are_the_model_s_own(engine):
    [free] = run(engine, [submit(0, new_tokens=1)])
    [bound] = run(engine, [submit(0, constraint("choices", "\x07"))])
    assert bound[0].logprob < free[0].logprob < 0


def test_a_request_that_leaves_while_its_constraint_is_compiled(engine, monkeypatch):
    waiting = Future()
    engine.compiler._compiled.clear()
    monkeypatch.setattr(engine.compiler._thread, "submit", lambda *_: waiting)
    engine.submit(submit(7, JSON))
    assert not engine.idle
    assert engine.step().tokens == []
    engine.cancel(7)
    assert engine.idle
    assert waiting.cancelled()


def test_others_run_while_a_constraint_is_compiled(engine, monkeypatch):
    waiting = Future()
    engine.compiler._compiled.clear()
    thread_submit = engine.compiler._thread.submit
    monkeypatch.setattr(engine.compiler._thread, "submit", lambda *_: waiting)
    engine.submit(submit(7, JSON))
    monkeypatch.undo()
    engine.submit(submit(8, new_tokens=3))
    ids = [[event.request_id for event in engine.step().tokens] for _ in range(3)]
    assert ids == [[8], [8], [8]]
    compile_now = engine.compiler._compile
    waiting.set_result(thread_submit(compile_now, JSON, demo_vocabulary()).result())
    events = []
    while not engine.idle:
        events += engine.step().tokens
    assert_satisfied(JSON, text_of(events))


def test_a_constraint_that_does_not_compile_fails_its_request_only(engine):
    engine.submit(submit(1, constraint("regex", "(a")))
    engine.submit(submit(2, new_tokens=2))
    failed, tokens = [], []
    while not engine.idle:
        done = engine.step()
        failed += done.failed
        tokens += done.tokens
    [failure] = failed
    assert (failure.request_id, failure.reason, failure.field) == (1, Reason.INVALID, "regex")
    assert [event.request_id for event in tokens] == [2, 2]


def test_a_constraint_that_becomes_too_costly_fails_its_request_only(engine, monkeypatch):
    monkeypatch.setattr(matcher, "limits", lambda: LLParserLimits(max_lexer_states=2000))
    costly = constraint("regex", "(a|b|c)*a(a|b|c){1000}")
    engine.submit(submit(1, costly, Sampling(temperature=3.0), new_tokens=900))
    engine.submit(submit(2, new_tokens=900))
    failed, tokens = [], []
    while not engine.idle:
        done = engine.step()
        failed += done.failed
        tokens += done.tokens
    [failure] = failed
    assert (failure.request_id, failure.reason, failure.field) == (1, Reason.INVALID, "regex")
    assert "too many states" in failure.message
    assert [event.request_id for event in tokens].count(2) == 900
    # The next one to have it does not find it used up.
    [events] = run(engine, [submit(3, costly, Sampling(temperature=3.0), new_tokens=50)])
    assert len(events) == 50
    engine.scheduler.check_integrity()


def test_what_a_request_gets_does_not_depend_on_who_shares_its_constraint(engine, monkeypatch):
    """Each of them needs a third of the states that there may be, and all have one `Compiled`."""
    monkeypatch.setattr(matcher, "limits", lambda: LLParserLimits(max_lexer_states=2000))
    costly = constraint("regex", "(a|b|c)*a(a|b|c){1000}")
    requests = [
        submit(seed, costly, Sampling(temperature=3.0, seed=seed), new_tokens=150)
        for seed in range(8)
    ]
    alone = []
    for request in requests:
        engine.compiler._compiled.clear()
        alone += run(engine, [request])
    engine.compiler._compiled.clear()
    went_alone = []
    begin_alone = engine.compiler.begin_alone
    monkeypatch.setattr(
        engine.compiler,
        "begin_alone",
        lambda sequence: (went_alone.append(sequence), begin_alone(sequence)),
    )
    together = run(engine, requests)
    assert went_alone
    assert [events_of(events) for events in together] == [events_of(events) for events in alone]
    assert {len(events) for events in together} == {150}


def test_a_compiled_constraint_waits_for_no_other_to_be_compiled(engine, monkeypatch):
    run(engine, [submit(0, JSON)])
    never = Future()
    monkeypatch.setattr(engine.compiler._thread, "submit", lambda *_: never)
    engine.submit(submit(1, constraint("regex", "not seen before")))
    engine.submit(submit(2, JSON, new_tokens=1))
    [event] = engine.step().tokens
    assert event.request_id == 2
    engine.cancel(1)
    assert engine.idle
    assert never.cancelled()


def test_requests_with_the_same_new_constraint_are_compiled_for_once(engine, monkeypatch):
    never, submitted = Future(), []
    monkeypatch.setattr(
        engine.compiler._thread, "submit", lambda *_: (submitted.append(1), never)[1]
    )
    what = constraint("regex", "nor this")
    engine.submit(submit(1, what))
    engine.submit(submit(2, what))
    assert len(submitted) == 1
    engine.cancel(1)
    assert not never.cancelled()
    engine.cancel(2)
    assert never.cancelled()


def test_only_so_many_wait_to_be_compiled(engine, monkeypatch):
    monkeypatch.setattr("moe_server.constraints.compiler.MAX_COMPILING", 2)
    monkeypatch.setattr(engine.compiler._thread, "submit", lambda *_: Future())
    for number in range(3):
        engine.submit(submit(number, constraint("regex", f"queued {number}")))
    [failure] = engine.step().failed
    assert (failure.request_id, failure.reason) == (2, Reason.EXHAUSTED)
    engine.cancel_all()
    assert engine.idle
    assert not engine.compiler._compiling


class PanicError(BaseException):
    """As PyO3's, which is no Exception."""


def test_whatever_a_compilation_raises_fails_its_request_only(engine, monkeypatch, capfd):
    def panics(*_):
        raise PanicError

    monkeypatch.setattr("moe_server.constraints.compiler.compile_constraint", panics)
    engine.submit(submit(1, constraint("regex", "panics")))
    engine.submit(submit(2, new_tokens=2))
    failed, tokens = [], []
    while not engine.idle:
        done = engine.step()
        failed += done.failed
        tokens += done.tokens
    [failure] = failed
    assert (failure.request_id, failure.reason) == (1, Reason.UNAVAILABLE)
    assert "PanicError" in failure.message
    assert "PanicError" in capfd.readouterr().err
    assert [event.request_id for event in tokens] == [2, 2]


def test_an_engine_that_was_told_no_vocabulary_refuses(engine):
    with running_engine(Config().model_path, max_total_tokens=256) as untold:
        untold.submit(submit(0, JSON))
        failed = []
        while not untold.idle:
            failed += untold.step().failed
    assert failed[0].reason is Reason.UNSUPPORTED


def test_a_compiled_constraint_serves_a_bounded_number_of_requests(engine, monkeypatch):
    monkeypatch.setattr(matcher, "MAX_FORKS", 2)
    made = []
    for _ in range(5):
        run(engine, [submit(0, constraint("choices", "dd"))])
        made.append(engine.compiler._compiled[constraint("choices", "dd").digest])
    assert [made[0] is one for one in made] == [True, True, False, False, False]
    assert made[2] is made[3]
    assert made[3] is not made[4]


def test_compiled_constraints_are_kept_up_to_a_bound(engine, monkeypatch):
    monkeypatch.setattr("moe_server.constraints.compiler.MAX_COMPILED", 2)
    for text in ("aa", "bb", "aa", "cc"):
        run(engine, [submit(0, constraint("choices", text))])
    expected = [constraint("choices", text).digest for text in ("aa", "cc")]
    assert list(engine.compiler._compiled) == expected


def test_compiled_constraints_are_kept_up_to_so_many_bytes(engine, monkeypatch):
    """These take 4 MiB each, and the small one next to nothing."""
    engine.compiler._compiled.clear()
    monkeypatch.setattr("moe_server.constraints.compiler.KEPT_BYTES", 10 * 2**20)
    small = constraint("choices", "small")
    large = [
        constraint("json_schema", json.dumps({"type": "integer", "multipleOf": 10_007 + number}))
        for number in range(3)
    ]
    for what in (large[0], small, large[1], large[2]):
        run(engine, [submit(0, what, new_tokens=1)])
    kept = engine.compiler._compiled
    assert list(kept) == [what.digest for what in (small, large[1], large[2])]
    assert kept[small.digest].num_bytes < 2**20
    assert all(2**21 < kept[what.digest].num_bytes < 2**23 for what in large[1:])
