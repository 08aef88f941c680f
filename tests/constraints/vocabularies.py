"""Vocabularies for tests of constraints, and walks through what a constraint allows."""

import random
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import msgspec
import numpy as np

from moe_server.config import Config
from moe_server.constraints.matcher import Compiled, Matcher, compile_constraint
from moe_server.constraints.vocabulary import build_tokenizer
from moe_server.messages import Constraint, ConstraintKind, Vocabulary
from moe_server.tokenizer import Tokenizer, load_tokenizer

MIXTRAL_V1 = Path(str(resources.files("mistral_common") / "data" / "tokenizer.model.v1"))


def vocabulary_of(tokens: Sequence[bytes], eos: Sequence[int], vocab_size: int = 0) -> Vocabulary:
    return Vocabulary(msgspec.msgpack.encode(list(tokens)), vocab_size or len(tokens), list(eos))


@cache
def demo_tokenizer() -> Tokenizer:
    tokenizer = load_tokenizer(Config().model_path)
    assert tokenizer is not None
    return tokenizer


DEMO_EOS = 2


def demo_vocabulary() -> Vocabulary:
    return vocabulary_of(demo_tokenizer().token_bytes, [DEMO_EOS])


def constraint(kind: str, *texts: str) -> Constraint:
    return Constraint(ConstraintKind(kind), texts)


def compiled(what: Constraint, vocabulary: Vocabulary) -> Compiled:
    return compile_constraint(what, build_tokenizer(vocabulary), vocabulary.vocab_size)


def walk(
    matcher: Matcher, tokens: Sequence[bytes], eos: int, choose: random.Random, most: int = 400
) -> bytes | None:
    """A text of allowed tokens, chosen at random and short ones by preference; None if too long."""
    text = b""
    for number in range(most):
        if matcher.is_complete:
            return text
        allowed = np.flatnonzero(matcher.allowed).tolist()
        assert allowed
        if eos in allowed and choose.random() < 0.3:
            return text
        others = [token for token in allowed if token != eos]
        if not others:
            return text
        # Tokens that close something, so that walks end.
        closing = [token for token in others if tokens[token] in (b'"', b"}", b"]", b",", b")")]
        favoured = closing if closing and choose.random() < number / 100 else others
        token = choose.choice(favoured)
        text += tokens[token]
        matcher.accept(token, look=True)
    return None
