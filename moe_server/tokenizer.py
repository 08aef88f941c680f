"""Text to token ids, and a completion's ids back to text as they arrive.

A checkpoint's `tokenizer.model` is read with sentencepiece, its `tokenizer.json` with the
tokenizers library; neither torch nor transformers is imported, for this runs in the front door.
Both libraries only encode. Decoding is our own table of id -> bytes, built once, so that a stream
and the whole text at once come from the same bytes. It knows no chat templates, stop strings or
requests; the generation and tokenizer services call it.
"""

import codecs
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from moe_server.errors import MoeServerError, Reason

SPACE_PIECE = "\u2581"
"""What SentencePiece writes for a space."""
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A piece that stands for one byte of text that has no piece of its own."""
TextEncoder: TypeAlias = Callable[[str, int], list[int]]
"""(text, max_tokens) to ids; refuses a longer result, or returns it."""
PieceDecoder: TypeAlias = Callable[[str], bytes]


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
    """

    __slots__ = ("_adds_leading_space", "_encode_text", "longest_token_bytes", "token_bytes")

    def __init__(
        self, encode_text: TextEncoder, token_bytes: Sequence[bytes], *, adds_leading_space: bool
    ) -> None:
        self._encode_text = encode_text
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
    for name, load in (("tokenizer.model", _load_sentencepiece), ("tokenizer.json", _load_json)):
        file = path / name
        if file.is_file():
            try:
                return load(file)
            except OSError as error:
                raise MoeServerError(
                    f"Cannot read {file}: {error.strerror}.", "Check its permissions."
                ) from None
    return None


def _bytes_of(token_bytes: Sequence[bytes], token_id: int) -> bytes:
    # A model can emit ids beyond the tokenizer's: embeddings are padded to round numbers.
    return token_bytes[token_id] if 0 <= token_id < len(token_bytes) else b""


def _broken(file: Path, problem: object, remedy: str = "") -> MoeServerError:
    return MoeServerError(
        f"{file} is not a usable tokenizer: {problem}.",
        f"Download it again (a git clone without git-lfs leaves pointers in its place){remedy}.",
        reason=Reason.UNSUPPORTED,
    )


def _load_sentencepiece(file: Path) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor  # noqa: PLC0415 - one of the two is enough

    model = file.read_bytes()
    processor = SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(model)
    except RuntimeError as error:
        remedy = ", or remove it if tokenizer.json is the checkpoint's real tokenizer"
        raise _broken(file, str(error).rstrip("."), remedy) from None

    def token_bytes(token_id: int) -> bytes:
        special = (processor.is_control, processor.is_unknown, processor.is_unused)
        if any(is_special(token_id) for is_special in special):
            return b""
        piece = processor.id_to_piece(token_id)
        if processor.is_byte(token_id):
            return bytes.fromhex(piece[3:5])
        return piece.replace(SPACE_PIECE, " ").encode()

    add_bos = processor.bos_id() >= 0

    def encode(text: str, _max_tokens: int) -> list[int]:
        # Control pieces are never found in text: "<s>" becomes the pieces of its characters.
        token_ids: list[int] = processor.encode(text, add_bos=add_bos)
        return token_ids

    vocabulary = [token_bytes(token_id) for token_id in range(processor.vocab_size())]
    adds_leading_space = processor.normalize("a").startswith(SPACE_PIECE)
    return Tokenizer(encode, vocabulary, adds_leading_space=adds_leading_space)


def _load_json(file: Path) -> Tokenizer:
    import tokenizers  # noqa: PLC0415 - one of the two is enough

    # It would share a batch among threads, and ours are batches of one.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    try:
        text = file.read_text(encoding="utf-8")
        description = json.loads(text)
    except ValueError as error:
        raise _broken(file, error) from None
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise _broken(file, error) from None
    # Files saved after training may carry both; a prompt must be neither cut nor filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True

    added = tokenizer.get_added_tokens_decoder()
    special = {token_id for token_id, token in added.items() if token.special}
    unknown = _unknown_id(tokenizer, description["model"])

    def encode(text: str, max_tokens: int) -> list[int]:
        # `encode` holds the GIL (of a second for 1 MB, 0.96 s); the batch calls release it, and
        # the fast one leaves out offsets, which nobody reads.
        [encoding] = tokenizer.encode_batch_fast([text])
        if len(encoding) > max_tokens:
            # Before its ids become Python objects, for that needs the GIL again.
            raise MoeServerError(
                f"The prompt has {len(encoding)} tokens; at least 1 and at most {max_tokens} fit "
                "this server.",
                field="prompt",
            )
        # A Unigram model finds special tokens in text even when told not to: they are in its
        # vocabulary, with the best score.
        for token_id, from_template in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
            if token_id in special and not from_template and token_id != unknown:
                raise MoeServerError(
                    f"The text contains {added[token_id].content!r}, which this tokenizer can only "
                    "read as the special token of that name.",
                    "Take it out of the text, or send token_ids.",
                    field="text",
                )
        return encoding.ids

    piece_bytes, adds_leading_space = _piece_decoder(file, description.get("decoder"))
    byte_level = piece_bytes is _byte_level_bytes
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    token_bytes = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for piece, token_id in vocabulary.items():
        if token_id in special:
            continue
        verbatim = byte_level and token_id in added
        token_bytes[token_id] = piece.encode() if verbatim else piece_bytes(piece)
    return Tokenizer(encode, token_bytes, adds_leading_space=adds_leading_space)


def _unknown_id(tokenizer: Any, model: Mapping[str, Any]) -> int | None:
    """The id of characters outside the vocabulary; a text may contain it, it steers nothing."""
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    unknown = model.get("unk_token")
    return None if unknown is None else tokenizer.token_to_id(unknown)


def _piece_decoder(file: Path, decoder: Mapping[str, Any] | None) -> tuple[PieceDecoder, bool]:
    """How one piece becomes bytes, and whether decoding a whole text takes one leading space off.

    Only decoders that treat each piece by itself can be streamed.

    Raises:
        MoeServerError: Any other decoder.
    """
    steps = _flatten(decoder)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level_bytes, False

    fuse = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    per_piece, on_the_whole = steps[:fuse], steps[fuse + 1 :]
    strips = on_the_whole == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    byte_fallback = False
    replacements: list[tuple[str, str]] = []
    for step in per_piece:
        match step:
            case {"type": "Replace", "pattern": {"String": sign}, "content": text}:
                replacements.append((sign, text))
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Metaspace", "replacement": sign}:
                replacements.append((sign, " "))
                strips |= step.get("prepend_scheme") != "never"
            case _:
                raise _unsupported(file, kinds)
    if not replacements or (on_the_whole and not strips):
        raise _unsupported(file, kinds)

    def piece_bytes(piece: str) -> bytes:
        if byte_fallback and (match := BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(match[1])
        for sign, text in replacements:
            piece = piece.replace(sign, text)
        return piece.encode()

    return piece_bytes, strips


def _flatten(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flatten(inner)]


def _unsupported(file: Path, kinds: Sequence[str]) -> MoeServerError:
    return MoeServerError(
        f"{file} has the decoder {' + '.join(kinds) or 'null'}, which cannot be streamed.",
        "Supported: ByteLevel; Metaspace; Replace + ByteFallback + Fuse (+ Strip). Move the file "
        "away to serve token_ids only.",
        reason=Reason.UNSUPPORTED,
    )


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable ones are themselves, the others U+0100 up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


BYTE_OF_CHARACTER = _byte_level_alphabet()


def _byte_level_bytes(piece: str) -> bytes:
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in piece)
    except KeyError:  # a piece that was never byte-encoded stands for itself
        return piece.encode()
