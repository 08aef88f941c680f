"""Stop sequences and detokenisation, against a brute-force twin that sees the whole text."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_server.messages import TokenEvent
from moe_server.service.stop_sequences import StopMatcher
from moe_server.service.text_stream import TextStream
from tests.front_door import E_ACUTE, EOS, letters_tokenizer


def events(token_ids):
    return [TokenEvent(1, token_id) for token_id in token_ids]


def first_match(text: str, stops: list[str]) -> int | None:
    """Where the match that is completed first starts; the longest, if several are."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end - max(map(len, ending))
    return None


def stream_text(pieces: list[list[int]], stops: list[str]) -> tuple[str, list[int], bool]:
    stream = TextStream(letters_tokenizer().detokenizer(), stops)
    text, token_ids = "", []
    for index, piece in enumerate(pieces):
        released = stream.push(events(piece), is_last=index == len(pieces) - 1)
        text += released.text
        token_ids += [event.token_id for event in released.tokens]
        if stream.is_stopped:
            break
    return text, token_ids, stream.is_stopped


letters = st.integers(0, 2)
words = st.text("abc", min_size=1, max_size=4)


@given(st.lists(st.lists(letters, min_size=1), min_size=1), st.lists(words, max_size=4))
def test_equals_searching_the_whole_text(pieces, stops):
    whole = "".join(chr(97 + token) for piece in pieces for token in piece)
    match = first_match(whole, stops)
    text, token_ids, is_stopped = stream_text(pieces, stops)
    assert text == (whole if match is None else whole[:match])
    assert token_ids == [ord(char) - 97 for char in text]
    assert is_stopped == (match is not None)


@given(st.text("ab", max_size=30), st.lists(words, min_size=1, max_size=3), st.integers(0))
def test_how_text_is_cut_does_not_matter(text, stops, seed):
    cut = random.Random(seed)
    matcher = StopMatcher(stops)
    position, found = 0, None
    while position < len(text) and found is None:
        size = cut.randint(1, 5)
        match = matcher.feed(text[position : position + size])
        if match is not None:
            found = position + match.end - match.length
        position += size
    assert found == first_match(text, stops)


@given(st.text("ab", min_size=1, max_size=30), st.lists(words, min_size=1, max_size=3))
def test_held_is_exactly_what_could_still_match(text, stops):
    matcher = StopMatcher(stops)
    if matcher.feed(text) is None:
        possible = [
            size for stop in stops for size in range(len(stop)) if text.endswith(stop[:size])
        ]
        assert matcher.num_held_chars == max(possible)


def test_text_that_could_become_a_stop_is_held_with_its_tokens():
    stream = TextStream(letters_tokenizer().detokenizer(), ["bcd"])
    assert stream.push(events([0, 1]), is_last=False).text == "a"
    held = stream.push(events([2]), is_last=False)
    assert not held
    released = stream.push(events([25]), is_last=False)
    assert released.text == "bcz"
    assert [event.token_id for event in released.tokens] == [1, 2, 25]


def test_a_token_reaching_into_the_match_is_released():
    # Token 30 is "<30>"; the stop sequence begins inside it.
    text, token_ids, is_stopped = stream_text([[0, 30, 1]], ["0>b"])
    assert (text, token_ids, is_stopped) == ("a<3", [0, 30], True)


def test_tokens_after_a_match_are_not_counted():
    stream = TextStream(letters_tokenizer().detokenizer(), ["b"])
    released = stream.push(events([0, 1, 2, 3]), is_last=True)
    assert (released.text, stream.num_tokens) == ("a", 2)


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ([[E_ACUTE[0]], [E_ACUTE[1]]], "é"),
        ([[0, E_ACUTE[0]]], "a\N{REPLACEMENT CHARACTER}"),
        ([[0], [EOS]], "a"),
    ],
)
def test_incomplete_characters_and_special_tokens(pieces, text):
    got, token_ids, _ = stream_text(pieces, [])
    assert got == text
    assert token_ids == [token for piece in pieces for token in piece]


def test_without_a_tokenizer_tokens_pass():
    stream = TextStream(None, [])
    released = stream.push(events([5, 6]), is_last=True)
    assert released.text == ""
    assert [event.token_id for event in released.tokens] == [5, 6]
