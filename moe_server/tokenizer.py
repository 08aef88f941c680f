"""Text to token ids, and a completion's ids back to text as they arrive.

A checkpoint's `tokenizer.model` is read with sentencepiece, its `tokenizer.json` with the
tokenizers library; neither torch nor transformers is imported, for this runs in the front door.
Both libraries only encode. Decoding is our own table of id -> bytes, built once, so that a stream
and the whole text at once come from the same bytes. It knows no chat templates, stop strings or
requests; the generation and tokenizer services call it. The two kinds of file are read by
`sentencepiece_tokenizer.py` and `json_tokenizer.py`; `chat/` puts special tokens between texts.
"""

import codecs
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from moe_server.errors import MoeServerError, Reason

SPACE_PIECE = "\u2581"
"""What SentencePiece writes for a space."""
TextEncoder: TypeAlias = Callable[[str, int], list[int]]
"""(text, max_tokens) to ids; refuses a longer result, or returns it."""
SectionEncoder: TypeAlias = Callable[[Sequence[str | int], int], list[int]]
"""(texts and the ids between them, max_tokens) to ids; refuses a longer result, or returns it."""


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The special tokens of a checkpoint, and how texts are encoded that stand between them."""

    ids: Mapping[str, int] = field(default_factory=dict)
    """By the string that a chat template writes for them."""
    encode_sections: SectionEncoder | None = None
    """Encodes untrusted texts and special ids in turn, as the text would be that has them all; no
    BOS goes first and no text becomes a special token."""


class Detokenizer:
    """The text of one completion, token by token, in whole characters.

    Bytes of a character that is not complete yet are held back. Invalid bytes become U+FFFD,
    exactly as `bytes.decode("utf-8", "replace")` of all bytes together would have it. One object
    per stream.
    """

    __slots__ = ("_decoder", "_token_bytes")

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text this token completes; "" for special tokens and for ids that name no token."""
        return self._decoder.decode(_bytes_of(self._token_bytes, token_id))

    def flush(self) -> str:
        """The end of the stream: U+FFFD for a character left incomplete, else ""."""
        return self._decoder.decode(b"", final=True)


class Tokenizer:
    """A checkpoint's tokenizer. Immutable; may be shared between threads.

    Args:
        encode_text: Text to ids, with BOS where the model expects it. Works off the GIL, so that
            a thread that encodes megabytes stalls no other.
        token_bytes: What each id stands for in a text; b"" for special tokens.
        adds_leading_space: Whether encoding puts a space before the text; `decode` takes it off.
        special: What chat templates need.
    """

    __slots__ = (
        "_adds_leading_space",
        "_encode_text",
        "longest_token_bytes",
        "special",
        "token_bytes",
    )

    def __init__(
        self,
        encode_text: TextEncoder,
        token_bytes: Sequence[bytes],
        *,
        adds_leading_space: bool,
        special: SpecialTokens | None = None,
    ) -> None:
        self._encode_text = encode_text
        self.special = special or SpecialTokens()
        self.token_bytes = token_bytes
        """What each id stands for in a text; b"" for special tokens."""
        self.longest_token_bytes = max(map(len, token_bytes), default=1)
        """The most bytes of a text that one token can stand for."""
        self._adds_leading_space = adds_leading_space

    @property
    def vocab_size(self) -> int:
        """The number of ids, added tokens included; a model's embedding may be padded beyond it."""
        return len(self.token_bytes)

    def encode(self, text: str, max_tokens: int = sys.maxsize) -> list[int]:
        """Turns untrusted text into ids.

        BOS goes first exactly when the model expects it; no other special token appears, whatever
        the text spells out.

        Args:
            text: Of any size.
            max_tokens: More need not be returned; the result can still be longer.

        Raises:
            MoeServerError: The text is not valid Unicode, has too many tokens, or this tokenizer
                could only read part of it as a special token.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MoeServerError(
                f"The text is not valid Unicode: a lone surrogate at character {error.start}.",
                "Send UTF-8 text.",
                field="text",
            ) from None
        return self._encode_text(text, max_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """A whole text, without special tokens and the space that encoding put before it."""
        text = b"".join(_bytes_of(self.token_bytes, token_id) for token_id in token_ids)
        return text[self._adds_leading_space and text[:1] == b" " :].decode("utf-8", "replace")

    def detokenizer(self) -> Detokenizer:
        """For the completion of a prompt: it keeps the first token's leading space."""
        return Detokenizer(self.token_bytes)


def load_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer of the checkpoint directory `path`; None if it has none.

    `tokenizer.model` comes first: the `tokenizer.json` that transformers makes of Mixtral's reads
    most texts differently.

    Raises:
        MoeServerError: A tokenizer file that does not parse, or of a kind that cannot be streamed.
    """
    # Each brings its library along, and one of the two is enough.
    try:
        if (file := path / "tokenizer.model").is_file():
            from moe_server.sentencepiece_tokenizer import load_sentencepiece  # noqa: PLC0415

            return load_sentencepiece(file)
        if (file := path / "tokenizer.json").is_file():
            from moe_server.json_tokenizer import load_json  # noqa: PLC0415

            return load_json(file)
    except OSError as error:
        raise MoeServerError(
            f"Cannot read {file}: {error.strerror}.", "Check its permissions."
        ) from None
    return None


def broken_file(
    file: Path, problem: object, remedy: str = "", *, reason: Reason = Reason.UNSUPPORTED
) -> MoeServerError:
    """The refusal of a tokenizer file that does not parse."""
    return MoeServerError(
        f"{file} is not a usable tokenizer: {problem}.",
        f"Download it again (a git clone without git-lfs leaves pointers in its place){remedy}.",
        reason=reason,
    )


def _bytes_of(token_bytes: Sequence[bytes], token_id: int) -> bytes:
    # A model can emit ids beyond the tokenizer's: embeddings are padded to round numbers.
    return token_bytes[token_id] if 0 <= token_id < len(token_bytes) else b""
