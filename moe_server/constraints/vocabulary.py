"""The model's tokens as llguidance wants them."""

from typing import TYPE_CHECKING

import msgspec

from moe_server.messages import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLTokenizer


class _Tokens:
    """What llguidance asks a tokenizer for. It never has one encode: see `grammar`'s options."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, tokens: list[bytes], eos_token_id: int | None) -> None:
        self.tokens = tokens
        self.eos_token_id = eos_token_id

    def __call__(self, text: bytes | str) -> list[int]:
        raise NotImplementedError("nothing is forced, so nothing is encoded")


def build_tokenizer(vocabulary: Vocabulary) -> "LLTokenizer":
    """The vocabulary as a trie of bytes; takes 0.1 s for 32,000 tokens.

    Special tokens and ids beyond the tokenizer's stand for no bytes and are never allowed, but for
    the end-of-sequence tokens where a text is complete.

    Raises:
        ValueError: llguidance cannot use it.
    """
    from llguidance import LLTokenizer  # noqa: PLC0415 - only where constraints are used

    tokens = msgspec.msgpack.decode(vocabulary.tokens, type=list[bytes])[: vocabulary.vocab_size]
    tokens += [b""] * (vocabulary.vocab_size - len(tokens))
    eos = vocabulary.eos_token_ids
    # Without one llguidance adds a token of its own behind the last.
    return LLTokenizer(_Tokens(tokens, eos[0] if eos else None), eos_token=eos or None)  # type: ignore[arg-type]
