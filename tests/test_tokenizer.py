"""The tokenizer: real Mixtral v1 pieces, and small trained ones of the other two kinds."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as LibraryTokenizer

from moe_server.errors import MoeServerError
from moe_server.tokenizer import Tokenizer, load_tokenizer

CORPUS = ["hello world, the quick brown fox jumps over the lazy dog", "naïve café", "日本語"]
MIXTRAL_V1 = Path(str(resources.files("mistral_common") / "data" / "tokenizer.model.v1"))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


def byte_level() -> LibraryTokenizer:
    """Like GPT-2's, Qwen's and Llama 3's, with BOS from its post-processor."""
    tokenizer = LibraryTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>", "<|im_end|>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    # "é" is also a character of the byte alphabet: an added token must not be read as bytes.
    tokenizer.add_tokens([AddedToken(name, special=False) for name in ("<thinké>", "<a b>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def byte_fallback() -> LibraryTokenizer:
    """Like Llama 2's and Mixtral's tokenizer.json."""
    tokenizer = LibraryTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    specials = ["<unk>", "<s>", "</s>"]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        CORPUS[:1],
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=specials + byte_pieces, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    # Training can only reserve byte pieces as special tokens; in real files they are plain pieces.
    description = json.loads(tokenizer.to_str())
    added = description["added_tokens"]
    description["added_tokens"] = [token for token in added if token["content"] in specials]
    return LibraryTokenizer.from_str(json.dumps(description))


def metaspace_unigram() -> LibraryTokenizer:
    """Like T5's; Unigram finds special tokens in text even with `encode_special_tokens`."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("▁", -1.0), *((c, -3.0) for c in "<s>hi")]
    tokenizer = LibraryTokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return tokenizer


def saved(tokenizer: LibraryTokenizer, directory: Path) -> Tokenizer:
    tokenizer.save(str(directory / "tokenizer.json"))
    loaded = load_tokenizer(directory)
    assert loaded is not None
    return loaded


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The real Mixtral v1 tokenizer."""
    directory = tmp_path_factory.mktemp("v1")
    (directory / "tokenizer.model").symlink_to(MIXTRAL_V1)
    loaded = load_tokenizer(directory)
    assert loaded is not None
    return loaded


@pytest.fixture(scope="session", params=["mixtral", "byte_level", "byte_fallback"])
def tokenizer(
    request: pytest.FixtureRequest, mixtral: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    """Each kind, lossless up to its own normalisation."""
    if request.param == "mixtral":
        return mixtral
    directory = tmp_path_factory.mktemp(request.param)
    return saved((byte_level if request.param == "byte_level" else byte_fallback)(), directory)


def streamed(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str]:
    stream = tokenizer.detokenizer()
    return [*(stream.push(token_id) for token_id in token_ids), stream.flush()]


@given(text=TEXTS)
def test_a_stream_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text)
    if tokenizer.decode(tokenizer.encode("▁")) == "▁":
        normalised, leading_space = text, ""
    else:  # both SentencePiece kinds: U+2581 is their sign for a space, and one goes first
        normalised, leading_space = text.replace("▁", " "), " " if text else ""
    assert tokenizer.decode(token_ids) == normalised
    assert "".join(streamed(tokenizer, token_ids)) == leading_space + normalised


@given(text=TEXTS)
def test_a_completion_continues_its_prompt(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text)
    whole = "".join(streamed(tokenizer, token_ids))
    for split in range(len(token_ids)):
        *prompt, held_back = streamed(tokenizer, token_ids[:split])
        if not held_back:
            assert "".join(prompt + streamed(tokenizer, token_ids[split:])) == whole


@given(data=st.data())
def test_any_ids_stream_as_they_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = st.integers(0, tokenizer.vocab_size + 5)
    byte_ids = st.integers(0, 300)  # control and byte pieces are here in all three
    token_ids = data.draw(st.lists(ids | byte_ids))
    whole = "".join(streamed(tokenizer, token_ids))
    assert tokenizer.decode(token_ids) in (whole, whole.removeprefix(" "))


@given(st.binary(max_size=12))
def test_bytes_stream_as_python_replaces_them(mixtral: Tokenizer, payload: bytes) -> None:
    token_ids = [byte + 3 for byte in payload]  # <0x00> is piece 3
    assert "".join(streamed(mixtral, token_ids)) == payload.decode("utf-8", "replace")


def test_mixtral_encodes_as_sentencepiece_with_bos(mixtral: Tokenizer) -> None:
    processor = SentencePieceProcessor(model_file=str(MIXTRAL_V1))
    text = "[INST] Grüße, 😀!\n\tdef f(x):  return x [/INST]"
    assert mixtral.encode(text) == [1, *processor.encode(text)]
    assert mixtral.decode(mixtral.encode(text)) == processor.decode(processor.encode(text)) == text
    assert mixtral.vocab_size == 32000


def test_an_emoji_over_byte_tokens_comes_out_whole(mixtral: Tokenizer) -> None:
    # </s> in the middle adds nothing and disturbs nothing.
    melting_face = [byte + 3 for byte in "🫠".encode()]
    assert streamed(mixtral, [*melting_face[:2], 2, *melting_face[2:], 1318]) == [
        "", "", "", "", "🫠", " x", "",
    ]  # fmt: skip


def test_a_cut_emoji_is_replaced_at_the_flush(mixtral: Tokenizer) -> None:
    assert streamed(mixtral, [byte + 3 for byte in "🫠".encode()[:3]]) == ["", "", "", "\ufffd"]


def test_a_completion_keeps_its_leading_space(mixtral: Tokenizer) -> None:
    token_ids = mixtral.encode("hello world")[1:]
    assert "".join(streamed(mixtral, token_ids)) == " hello world"
    assert mixtral.decode(token_ids) == "hello world"


def test_special_tokens_typed_by_a_user_are_text(tokenizer: Tokenizer) -> None:
    text = "<s>a</s><unk> <|im_end|>"
    token_ids = tokenizer.encode(text)
    specials = {0, 1, 2}
    assert token_ids[0] in specials
    assert specials.isdisjoint(token_ids[1:])
    assert tokenizer.decode(token_ids) == text


def test_added_tokens_are_verbatim(tmp_path: Path) -> None:
    library = byte_level()
    tokenizer = saved(library, tmp_path)
    added = [library.get_vocab()[name] for name in ("<thinké>", "<a b>")]
    assert streamed(tokenizer, added) == ["<thinké>", "<a b>", ""]
    # Not special by the checkpoint's own word, so text may spell them.
    assert tokenizer.encode("<a b>")[1:] == added[1:]


def test_the_library_decodes_the_same(tmp_path: Path) -> None:
    for build in (byte_level, byte_fallback):
        library = build()
        tokenizer = saved(library, tmp_path)
        for text in [*CORPUS, "  two  spaces", "", "日", "\x00\x7f"]:
            token_ids = tokenizer.encode(text)
            expected = library.decode(token_ids, skip_special_tokens=True)
            assert tokenizer.decode(token_ids) == expected


@pytest.mark.parametrize(
    ("prefix", "decoded"),
    [
        ({"prepend_scheme": "always"}, "hi"),
        ({"prepend_scheme": "never", "split": True}, " hi"),
        ({"add_prefix_space": True}, "hi"),
    ],
)
def test_metaspace_takes_off_only_the_space_it_added(
    tmp_path: Path, prefix: dict[str, Any], decoded: str
) -> None:
    description = json.loads(metaspace_unigram().to_str())
    metaspace = {"type": "Metaspace", "replacement": "▁", **prefix}
    description |= {"decoder": metaspace, "pre_tokenizer": metaspace}
    library = LibraryTokenizer.from_str(json.dumps(description))
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    token_ids = [library.get_vocab()[piece] for piece in "▁hi"]
    assert tokenizer.decode(token_ids) == decoded == library.decode(token_ids)


def test_no_bos_without_a_post_processor(tmp_path: Path) -> None:
    library = byte_level()
    library.post_processor = processors.ByteLevel()
    assert saved(library, tmp_path).encode("") == []


def test_a_saved_truncation_is_not_applied(tmp_path: Path) -> None:
    library = byte_level()
    library.enable_truncation(2)
    library.enable_padding(length=4)
    assert len(saved(library, tmp_path).encode("hello " * 50)) > 50


def test_unigram_refuses_text_it_would_read_as_a_special_token(tmp_path: Path) -> None:
    tokenizer = saved(metaspace_unigram(), tmp_path)
    assert tokenizer.decode(tokenizer.encode("hi hi")) == "hi hi"
    assert tokenizer.encode("zz")[-1] == 0  # unknown characters are no offence
    with pytest.raises(MoeServerError, match=r"'<s>'.*token_ids") as caught:
        tokenizer.encode("hi <s>")
    assert caught.value.field == "text"


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(MoeServerError, match="character 1"):
        tokenizer.encode("a\ud800")


async def largest_gap_s(work: Callable[[], object]) -> tuple[float, float]:
    """How long the loop was held up while a thread did `work`, and how long that took."""
    times = [time.monotonic()]

    async def heartbeat() -> None:
        while True:
            await asyncio.sleep(0.005)
            times.append(time.monotonic())

    beating = asyncio.create_task(heartbeat())
    await asyncio.sleep(0.02)
    started = time.monotonic()
    try:
        await asyncio.to_thread(work)
    finally:
        took_s = time.monotonic() - started
        await asyncio.sleep(0.01)
        beating.cancel()
    gaps = [after - before for before, after in pairwise(times)]
    return max(gaps), took_s


async def test_a_large_text_does_not_hold_up_others(mixtral: Tokenizer, tmp_path: Path) -> None:
    library = byte_level()
    library.add_tokens([AddedToken("x" * 300, special=False)])
    text = "hello world " * 100_000
    # Sentencepiece gives its result in one go, tokenizers refuses before that.
    gap_s, took_s = await largest_gap_s(lambda: mixtral.encode(text))
    assert gap_s < took_s / 3
    tokenizer = saved(library, tmp_path)

    def refused() -> None:
        with pytest.raises(MoeServerError, match=r"has \d{6,} tokens; .* at most 16383 fit"):
            tokenizer.encode(text, 16383)

    gap_s, took_s = await largest_gap_s(refused)
    assert gap_s < took_s / 3


def test_a_directory_without_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


def test_tokenizer_model_comes_first(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").symlink_to(MIXTRAL_V1)
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None
    assert loaded.vocab_size == 32000


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"{}", b"[1]", b"\xff\xfe"]
)
def test_a_broken_file_is_named_with_its_remedy(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MoeServerError, match=f"{name}.*git-lfs"):
        load_tokenizer(tmp_path)


def strip_before_fuse(library: LibraryTokenizer) -> None:
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])


def word_piece(library: LibraryTokenizer) -> None:
    library.decoder = decoders.WordPiece()


def nothing(library: LibraryTokenizer) -> None:
    library.decoder = None


@pytest.mark.parametrize(
    ("change", "named"),
    [(word_piece, "WordPiece"), (strip_before_fuse, "Replace \\+ Strip"), (nothing, "null")],
)
def test_a_decoder_that_cannot_stream_is_refused(
    tmp_path: Path, change: Callable[[Any], None], named: str
) -> None:
    library = byte_fallback()
    change(library)
    with pytest.raises(MoeServerError, match=f"decoder {named},.*token_ids"):
        saved(library, tmp_path)


def test_the_front_door_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from pathlib import Path; from moe_server.tokenizer import load_tokenizer; "
        f"load_tokenizer(Path({str(MIXTRAL_V1.parent)!r})); "
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
