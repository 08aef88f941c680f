"""What is allowed against a brute-force twin; random walks through it always make valid texts."""

import json
import random
import re

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_server.errors import MoeServerError, Reason
from moe_server.tokenizer import load_tokenizer
from tests.constraints.vocabularies import (
    DEMO_EOS,
    MIXTRAL_V1,
    compiled,
    constraint,
    demo_tokenizer,
    demo_vocabulary,
    vocabulary_of,
    walk,
)

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "score": {"type": "number"},
        "tags": {"type": "array", "items": {"enum": ["a", "é", 'quo"te']}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMAS = {
    "object": PERSON,
    "anything": True,
    "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "constant": {"const": {"a": [1, None, "x"]}},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    "date": {"type": "string", "format": "date"},
}
REGEXES = [
    r"[0-9]+",
    r"(yes|no|yesterday)!?",
    r"[a-z]{3,8}/[0-9]{2,4}",
    r"\d{3}-\d{2}",
    r"é+[^a-z]{1,3}",
    r"(?i:abc)\n\t?x",
]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    directory = tmp_path_factory.mktemp("v1")
    (directory / "tokenizer.model").symlink_to(MIXTRAL_V1)
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module", params=["demo", "mixtral"])
def tokens_and_vocabulary(request, mixtral):
    if request.param == "demo":
        return demo_tokenizer().token_bytes, demo_vocabulary()
    return mixtral.token_bytes, vocabulary_of(mixtral.token_bytes, [2])


def texts(what, tokens_and_vocabulary, count: int, most: int = 400) -> list[str]:
    """Complete texts of random walks."""
    tokens, vocabulary = tokens_and_vocabulary
    prototype = compiled(what, vocabulary)
    walks = [
        walk(prototype.fork([]), tokens, vocabulary.eos_token_ids[0], random.Random(seed), most)
        for seed in range(count)
    ]
    complete = [text.decode() for text in walks if text is not None]
    assert len(complete) > count / 4
    return complete


@pytest.mark.parametrize("name", SCHEMAS)
def test_documents_are_valid(name, tokens_and_vocabulary):
    what = constraint("json_schema", json.dumps(SCHEMAS[name]))
    for text in texts(what, tokens_and_vocabulary, 15):
        jsonschema.validate(json.loads(text), SCHEMAS[name])


@pytest.mark.parametrize("regex", REGEXES)
def test_texts_match_the_whole_regex(regex, tokens_and_vocabulary):
    for text in texts(constraint("regex", regex), tokens_and_vocabulary, 15):
        assert re.fullmatch(regex, text), text


def test_texts_are_of_the_grammar(tokens_and_vocabulary):
    lark = 'start: sum\nsum: term | sum "+" term\nterm: NUMBER | "(" sum ")"\nNUMBER: /[1-9][0-9]?/'
    for text in texts(constraint("grammar", lark), tokens_and_vocabulary, 20):
        assert re.fullmatch(r"[0-9+()]+", text)
        assert isinstance(eval(text), int)


# A twin


PIECES = [b"", b"a", b"b", b"ab", b"ba", b"aab", b"\xc3", b"\xa9", "é".encode(), b"a", b'"', b"\\"]
SPECIAL, EOS, OTHER_EOS = 0, len(PIECES), len(PIECES) + 1
SMALL = vocabulary_of([*PIECES, b"", b""], [EOS, OTHER_EOS], vocab_size=len(PIECES) + 5)
CHOICES = st.lists(st.text('abé"\\', min_size=1, max_size=6), min_size=1, max_size=6)


def allowed_by_hand(text: bytes, choices: list[bytes]) -> set[int]:
    """Tokens with which the text is the beginning of a choice, and the ends of whole ones."""
    going_on = {
        token
        for token, piece in enumerate(PIECES)
        if piece and any(choice.startswith(text + piece) for choice in choices)
    }
    return going_on | ({EOS, OTHER_EOS} if text in choices else set())


@given(choices=CHOICES, seed=st.integers(0, 99))
@settings(max_examples=80)
def test_exactly_what_goes_on_is_allowed(choices, seed):
    choose, encoded = random.Random(seed), [choice.encode() for choice in choices]
    matcher, text = compiled(constraint("choices", *choices), SMALL).fork([]), b""
    while not matcher.is_complete:
        allowed = set(np.flatnonzero(matcher.allowed).tolist())
        assert allowed == allowed_by_hand(text, encoded)
        assert len(matcher.allowed) == SMALL.vocab_size
        going_on = sorted(allowed - {EOS, OTHER_EOS})
        if not going_on:
            break
        token = choose.choice(going_on)
        text += PIECES[token]
        matcher.accept(token, look=True)
    assert text in encoded
    # It is complete exactly where nothing goes on.
    assert not [choice for choice in encoded if choice.startswith(text) and choice != text]


def test_a_request_that_ignores_the_end_gets_none_until_nothing_else_is_left():
    matcher = compiled(constraint("choices", "a", "ab"), SMALL).fork([EOS, OTHER_EOS])
    matcher.accept(PIECES.index(b"a"), look=True)
    assert np.flatnonzero(matcher.allowed).tolist() == [PIECES.index(b"b")]
    assert not matcher.is_complete
    matcher.accept(PIECES.index(b"b"), look=True)
    assert matcher.is_complete


def test_the_last_token_still_completes_a_text_unlooked():
    matcher = compiled(constraint("choices", "a", "bb"), SMALL).fork([])
    matcher.accept(PIECES.index(b"a"), look=False)
    assert matcher.is_complete


def test_forks_go_their_own_ways():
    prototype = compiled(constraint("choices", "ab", "ba"), SMALL)
    one, other = prototype.fork([]), prototype.fork([])
    before = other.allowed.copy()
    one.accept(PIECES.index(b"a"), look=True)
    assert (other.allowed == before).all()
    other.accept(PIECES.index(b"b"), look=True)
    assert np.flatnonzero(one.allowed).tolist() == [PIECES.index(b"b")]
    assert np.flatnonzero(other.allowed).tolist() == [1, 9]


def test_a_model_without_an_end_of_sequence_token_ends_where_nothing_follows():
    vocabulary = vocabulary_of(PIECES, [])
    matcher = compiled(constraint("choices", "ab"), vocabulary).fork([])
    matcher.accept(PIECES.index(b"ab"), look=True)
    assert matcher.is_complete
    ends_anywhere = compiled(constraint("regex", "a+"), vocabulary).fork([])
    ends_anywhere.accept(PIECES.index(b"a"), look=True)
    assert np.flatnonzero(ends_anywhere.allowed).tolist() == [1, 9]


def test_blanks_in_a_document_end():
    vocabulary, tokens = demo_vocabulary(), demo_tokenizer().token_bytes
    schema = '{"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2}'
    matcher, text = compiled(constraint("json_schema", schema), vocabulary).fork([]), ""
    while not matcher.is_complete:
        allowed = np.flatnonzero(matcher.allowed).tolist()
        blank = next((token for token in allowed if tokens[token].isspace()), allowed[0])
        text += tokens[blank].decode()
        matcher.accept(blank, look=True)
    assert json.loads(text) == [1, 1]
    assert len(text) < 120


def test_a_schema_says_what_blanks_it_wants():
    vocabulary, tokens = demo_vocabulary(), demo_tokenizer().token_bytes
    schema = {"const": [1, 2], "x-guidance": {"whitespace_flexible": False}}
    compact = compiled(constraint("json_schema", json.dumps(schema)), vocabulary)
    for seed in range(20):
        assert walk(compact.fork([]), tokens, DEMO_EOS, random.Random(seed)) == b"[1,2]"


def test_an_end_of_sequence_token_in_the_middle_is_not_the_end():
    what = constraint("grammar", f'start: "a" <[{EOS}]> "b"')
    matcher = compiled(what, SMALL).fork([])
    matcher.accept(PIECES.index(b"a"), look=True)
    assert np.flatnonzero(matcher.allowed).tolist() == [EOS]
    assert not matcher.may_end
    matcher.accept(EOS, look=True)
    assert np.flatnonzero(matcher.allowed).tolist() == [PIECES.index(b"b")]
    matcher = compiled(what, SMALL).fork([EOS])
    with pytest.raises(MoeServerError, match="which this request ignores"):
        matcher.accept(PIECES.index(b"a"), look=True)


# Refusals


BAD = {
    "no JSON": ("json_schema", '{"type":', "no JSON"),
    "deep JSON": ("json_schema", "[" * 30_000, "nested too deeply"),
    "no number": ("json_schema", '{"maximum": Infinity}', "Infinity is no number"),
    "trailing backslash": ("regex", "a\\\\\\", "ends with a backslash"),
    "no schema": ("json_schema", "[1]", "object or boolean"),
    "no options": ("json_schema", '{"x-guidance": "none"}', "invalid type"),
    "unsatisfiable": ("json_schema", "false", "Unsatisfiable"),
    "unknown keyword": ("json_schema", '{"if": {}, "then": {"type": "null"}}', '"if"'),
    "no end": ("json_schema", '{"$ref": "#"}', "no text of this model's tokens"),
    "remote": ("json_schema", '{"$ref": "http://127.0.0.1:9/x.json"}', "127.0.0.1:9"),
    "look-ahead": ("regex", "(?=a)b", "look-around"),
    "unclosed": (
        "regex",
        "(a",
        'cannot be used: invalid regex "(a" (in regex): regex parse error: unclosed',
    ),
    "nothing matches": ("regex", r"[^\s\S]", "no text of this model's tokens"),
    "no start": ("grammar", 'begin: "a"', "no start rule"),
    "unknown rule": ("grammar", 'start: "a" b', "unknown name"),
    "special token by name": ("grammar", 'start: "a" <s>', "only ids such as <[2]>"),
    "not in the vocabulary": ("choices", "ω", "no text of this model's tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_refusal_says_what_is_wrong(name):
    kind, text, problem = BAD[name]
    with pytest.raises(MoeServerError, match=re.escape(problem)) as caught:
        compiled(constraint(kind, text), SMALL)
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID, kind)
    assert len(str(caught.value)) < 700


def test_a_constraint_may_cost_only_so_much_in_every_step():
    """It compiles at once; what it allows would need ever more memory."""
    what = constraint("regex", "(a|b)*a(a|b){400}")
    matcher, choose = compiled(what, SMALL).fork([]), random.Random(0)

    def go_on() -> None:
        for _ in range(20_000):
            matcher.accept(choose.choice([1, 2]), look=True)

    with pytest.raises(MoeServerError, match="too many states"):
        go_on()


def test_special_tokens_are_not_text():
    what = constraint("regex", "(?s:.)*")
    allowed = compiled(what, demo_vocabulary()).fork([]).allowed
    special = [token for token, text in enumerate(demo_tokenizer().token_bytes) if not text]
    assert [token for token in special if allowed[token]] == [DEMO_EOS]
