"""A checkpoint's `tokenizer.model`, read with sentencepiece.

`tokenizer.load_tokenizer` calls it.
"""

from collections.abc import Sequence
from itertools import compress
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from moe_server.json_file import read_json
from moe_server.tokenizer import SPACE_PIECE, SpecialTokens, Tokenizer, broken_file

WITHOUT_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""ModelProto { normalizer_spec { add_dummy_prefix: false } }: messages that follow one another are
merged field by field, so behind a model these bytes change that one."""


def load_sentencepiece(file: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.model`, with the tokens that its directory adds to it.

    Raises:
        MoeServerError: The file does not parse.
        OSError: It cannot be read.
    """
    model = file.read_bytes()
    processor = SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(model)
    except RuntimeError as error:
        remedy = ", or remove it if tokenizer.json is the checkpoint's real tokenizer"
        raise broken_file(file, str(error).rstrip("."), remedy) from None

    def token_bytes(token_id: int) -> bytes:
        special = (processor.is_control, processor.is_unknown, processor.is_unused)
        if any(is_special(token_id) for is_special in special):
            return b""
        piece = processor.id_to_piece(token_id)
        if processor.is_byte(token_id):
            return bytes.fromhex(piece[3:5])
        return piece.replace(SPACE_PIECE, " ").encode()

    add_bos = processor.bos_id() >= 0
    # Inside a conversation: a text that follows a special token gets no space of its own.
    inner = SentencePieceProcessor()
    inner.load_from_serialized_proto(model + WITHOUT_DUMMY_PREFIX)

    def encode(text: str, _max_tokens: int) -> list[int]:
        # Control pieces are never found in text: "<s>" becomes the pieces of its characters.
        token_ids: list[int] = processor.encode(text, add_bos=add_bos)
        return token_ids

    def encode_sections(sections: Sequence[str | int], _max_tokens: int) -> list[int]:
        token_ids: list[int] = []
        for section in sections:
            if isinstance(section, int):
                token_ids.append(section)
            else:
                token_ids += (inner if token_ids else processor).encode(section)
        return token_ids

    ids = range(processor.vocab_size())
    # One call for all of them: 32,000 take 30 ms.
    are_control = processor.is_control(list(ids))
    control = {processor.id_to_piece(token_id): token_id for token_id in compress(ids, are_control)}
    special = SpecialTokens(control | _added_tokens(file.parent), encode_sections)
    vocabulary = [token_bytes(token_id) for token_id in range(processor.vocab_size())]
    adds_leading_space = processor.normalize("a").startswith(SPACE_PIECE)
    return Tokenizer(encode, vocabulary, adds_leading_space=adds_leading_space, special=special)


def _added_tokens(directory: Path) -> dict[str, int]:
    """Tokens beyond the model's pieces: fine-tuned checkpoints add the marks of their turns.

    All of them, for text never becomes one of them, whatever the checkpoint calls special.
    """
    added: dict[str, int] = {}
    if (file := directory / "added_tokens.json").is_file():
        added |= read_json(file)
    if (file := directory / "tokenizer_config.json").is_file():
        decoder = read_json(file).get("added_tokens_decoder") or {}
        added |= {entry["content"]: int(token_id) for token_id, entry in decoder.items()}
    return added
