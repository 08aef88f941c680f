"""A checkpoint's `tokenizer.json`, read with the tokenizers library.

`tokenizer.load_tokenizer` calls it. What each piece stands for in a text is worked out here.
"""

import json
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import tokenizers

from moe_server.errors import MoeServerError, Reason
from moe_server.json_file import is_cut_short
from moe_server.tokenizer import SpecialTokens, Tokenizer, broken_file

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A piece that stands for one byte of text that has no piece of its own."""
PieceDecoder: TypeAlias = Callable[[str], bytes]


def load_json(file: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`.

    Raises:
        MoeServerError: The file does not parse, or cannot be streamed.
        OSError: It cannot be read.
    """
    # It would share a batch among threads, and ours are batches of one.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    try:
        text = file.read_text(encoding="utf-8")
        description = json.loads(text)
    except ValueError as error:
        reason = Reason.UNAVAILABLE if is_cut_short(error) else Reason.UNSUPPORTED
        raise broken_file(file, error, reason=reason) from None
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise broken_file(file, error) from None
    # Files saved after training may carry both; a prompt must be neither cut nor filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True

    added = tokenizer.get_added_tokens_decoder()
    special = {token_id for token_id, token in added.items() if token.special}
    unknown = _unknown_id(tokenizer, description["model"])

    def encode(text: str, max_tokens: int, *, with_bos: bool = True) -> list[int]:
        # `encode` holds the GIL (of a second for 1 MB, 0.96 s); the batch calls release it, and
        # the fast one leaves out offsets, which nobody reads.
        [encoding] = tokenizer.encode_batch_fast([text], add_special_tokens=with_bos)
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

    sign_of, id_of = _add_signs(tokenizer, {i: added[i] for i in special})

    def encode_sections(sections: Sequence[str | int], max_tokens: int) -> list[int]:
        text = "".join(sign_of[part] if isinstance(part, int) else part for part in sections)
        token_ids = encode(text, max_tokens, with_bos=False)
        return [id_of.get(token_id, token_id) for token_id in token_ids]

    return Tokenizer(
        encode,
        token_bytes,
        adds_leading_space=adds_leading_space,
        special=SpecialTokens({added[i].content: i for i in special}, encode_sections),
    )


def _add_signs(
    tokenizer: Any, special: Mapping[int, tokenizers.AddedToken]
) -> tuple[dict[int, str], dict[int, int]]:
    """Gives every special token a second string, which nobody can type: it is drawn here.

    So a text can have special tokens in it while the library reads the names that users type as
    text, and what stands between them is encoded where it stands, not by itself. A sign is found in
    a text exactly as the special token would be.

    Returns:
        The sign of each special id; the special id of each sign's own.
    """
    secret = secrets.token_hex(16)
    sign_of = {token_id: f"\U0010fffd{secret}:{token_id}\U0010fffd" for token_id in special}
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(
                sign_of[token_id],
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=False,
            )
            for token_id, token in special.items()
        ]
    )
    return sign_of, {tokenizer.token_to_id(sign): token_id for token_id, sign in sign_of.items()}


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
