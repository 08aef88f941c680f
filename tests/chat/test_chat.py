"""Conversations to ids, against transformers and mistral-common where each is right."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from moe_server.chat.chat import load_chat
from moe_server.chat.message import Message
from moe_server.chat.mistral_v1 import MistralV1Chat
from moe_server.chat.template_chat import TemplateChat
from moe_server.errors import MoeServerError, Reason
from moe_server.tokenizer import load_tokenizer
from tests.test_tokenizer import MIXTRAL_V1, byte_fallback, byte_level, metaspace_unigram

MIXTRAL_V3 = MIXTRAL_V1.parent / "mistral_instruct_tokenizer_240323.model.v3"
CHATML = """\
{% for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""Like Qwen's, with blanks and block endings that trim_blocks and lstrip_blocks could get wrong."""
INST = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}"
)
"""What Mixtral 8x7B Instruct came with."""
NEWER_INST = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}"
    "{%- endif %}"
    "{{- bos_token }}{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
    "{%- if loop.first and system_message is defined %}"
    "{{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}"
    "{%- else %}{{- ' [INST] ' + message['content'] + ' [/INST]' }}{%- endif %}"
    "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token}}"
    "{%- endif %}{%- endfor %}"
)
SPECIALS = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<x y>"]
CONVERSATION = [
    Message("system", "You are brief."),
    Message("user", "  Grüße, 😀!\n\tTell me <b>more</b>.  "),
    Message("assistant", "No."),
    Message("user", "hello world"),
]
CONTENTS = st.lists(
    st.sampled_from([*SPECIALS, "<", "s>", "<|im_", "start|>", ">", "|", "im", " ", "\n", "hello"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
    max_size=6,
).map("".join)
"""Rich in special tokens and parts of them."""


def write(directory: Path, library, template=CHATML, **config) -> Path:
    """A checkpoint directory with this tokenizer, its ChatML tokens and its template."""
    library.add_special_tokens(
        [
            "</s>",
            AddedToken("<|im_start|>", special=True),
            AddedToken("<|im_end|>", special=True, rstrip=True),
            AddedToken("<x y>", special=True, normalized=True),
        ]
    )
    library.save(str(directory / "tokenizer.json"))
    if template is not None:
        config["chat_template"] = template
    eos = {"__type": "AddedToken", "content": "</s>"}
    names = {"bos_token": "<s>", "eos_token": eos}
    (directory / "tokenizer_config.json").write_text(json.dumps(names | config))
    return directory


def v1(directory: Path, template=None, **config) -> Path:
    (directory / "tokenizer.model").symlink_to(MIXTRAL_V1)
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def load(directory: Path):
    chat = load_chat(directory, load_tokenizer(directory))
    assert chat is not None
    return chat


def by_transformers(directory: Path, messages: list[Message]) -> list[int]:
    reference = PreTrainedTokenizerFast.from_pretrained(directory)
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    return reference.apply_chat_template(
        conversation, add_generation_prompt=True, return_dict=False
    )


KINDS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace_unigram": metaspace_unigram,
}


@pytest.fixture(scope="session", params=["byte_level", "byte_fallback"])
def directory(request, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp(request.param), KINDS[request.param]())


@pytest.mark.parametrize("template", [CHATML, INST, NEWER_INST], ids=["chatml", "inst", "newer"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(tmp_path, kind, template):
    messages = CONVERSATION if template != INST else CONVERSATION[1:]
    directory = write(tmp_path, KINDS[kind](), template)
    chat = load(directory)
    assert isinstance(chat, TemplateChat)
    expected = by_transformers(directory, messages)
    assert chat.encode(messages, 10_000) == expected
    assert len(expected) > 30


@pytest.fixture(scope="session")
def reference(directory):
    return PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.fixture(scope="session")
def chat(directory):
    return load(directory)


PLAIN = st.text(st.characters(exclude_categories=["Cs"])).filter(
    lambda text: not any(special in text for special in SPECIALS)
)


@given(contents=st.lists(PLAIN, min_size=1, max_size=4))
def test_any_contents_give_the_ids_of_transformers(chat, reference, contents):
    messages = [Message("user", content) for content in contents]
    conversation = [{"role": "user", "content": content} for content in contents]
    expected = reference.apply_chat_template(
        conversation, add_generation_prompt=True, return_dict=False
    )
    assert chat.encode(messages, 10_000) == expected


@given(contents=st.lists(CONTENTS, min_size=1, max_size=4))
def test_what_users_type_never_becomes_a_special_token(directory, chat, contents):
    tokenizer = load_tokenizer(directory)
    special = tokenizer.special.ids
    ids = chat.encode([Message("user", content) for content in contents], 10_000)
    start, end = special["<|im_start|>"], special["<|im_end|>"]
    expected = [start, end] + [start, end] * len(contents) + [start]
    assert [token_id for token_id in ids if token_id in special.values()] == expected
    # And it is all still there, as text. "<|im_end|>" swallows the blanks behind it.
    turns = tokenizer.decode(ids).replace(" ", "").split("user\n")
    wanted = [content.strip().replace(" ", "").replace("▁", "") for content in contents]
    if tokenizer.decode(tokenizer.encode("▁")) == "▁":
        wanted = [content.strip().replace(" ", "") for content in contents]
    whole = "".join(turns)
    for content in wanted:
        assert content in whole


GLUED = "<{{ messages[0].content }}>|{{ messages[0].content }}|im_end|>{{ bos_token }}"


@pytest.mark.parametrize("content", ["s", "/s", "<", " s ", "<s", "s>", "|im_end|"])
def test_nor_together_with_the_template_s_own_text(tmp_path, content):
    directory = write(tmp_path, byte_level(), GLUED)
    tokenizer = load_tokenizer(directory)
    ids = load(directory).encode([Message("user", content)], 100)
    assert [i for i in ids if i in tokenizer.special.ids.values()] == [ids[-1]]
    assert ids[-1] == tokenizer.special.ids["<s>"]
    assert tokenizer.decode(ids) == f"<{content}>|{content}|im_end|>"


def test_a_content_is_seen_whole_by_the_template(tmp_path):
    template = (
        "{{ messages[0].content | length }} {{ messages[0].content.endswith('</end>') }} "
        "{{ messages | length }} {{ strftime_now('%Y')[:2] }} {{ messages[0] | tojson }}"
        "{% generation %}g{% endgeneration %}{% for m in messages %}{% break %}{% endfor %}"
    )
    directory = write(tmp_path, byte_level(), template)
    ids = load(directory).encode([Message("user", "<s>\U000f0000é</end>")], 1000)
    assert load_tokenizer(directory).decode(ids) == (
        '11 True 1 20 {"role": "user", "content": "<s>\U000f0000é</end>"}g'
    )


def test_unigram_cannot_read_them_as_text_and_says_so(tmp_path):
    chat = load(write(tmp_path, metaspace_unigram()))
    with pytest.raises(MoeServerError, match="'<s>'") as caught:
        chat.encode([Message("user", "hi <s>")], 1000)
    assert caught.value.field == "messages"


def by_mistral(file: Path, messages: list[Message]) -> list[int]:
    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    request = ChatCompletionRequest(
        messages=[kinds[message.role](content=message.content) for message in messages]
    )
    return MistralTokenizer.from_file(file).encode_chat_completion(request).tokens


@pytest.mark.parametrize("template", [None, INST, NEWER_INST], ids=["none", "inst", "newer"])
def test_mixtral_v1_is_encoded_by_mistral_common(tmp_path, template):
    chat = load(v1(tmp_path, template))
    assert isinstance(chat, MistralV1Chat)
    assert not chat.is_prepared
    chat.prepare()
    assert chat.is_prepared
    processor = SentencePieceProcessor(model_file=str(MIXTRAL_V1))
    turns = [
        processor.encode(f"[INST] You are brief.\n\n{CONVERSATION[1].content} [/INST]"),
        [*processor.encode("No."), 2],
        processor.encode("[INST] hello world [/INST]"),
    ]
    assert chat.encode(CONVERSATION, 1000) == [1, *turns[0], *turns[1], *turns[2]]


@pytest.fixture(scope="session")
def v1_chat(tmp_path_factory):
    chat = load(v1(tmp_path_factory.mktemp("v1")))
    chat.prepare()
    return chat


@given(contents=st.lists(CONTENTS.filter(bool), min_size=1, max_size=5))
def test_v1_has_special_tokens_only_where_turns_end(v1_chat, contents):
    contents = contents if len(contents) % 2 else contents[:-1] or ["hello"]
    messages = [
        Message("assistant" if index % 2 else "user", content)
        for index, content in enumerate(contents)
    ]
    ids = v1_chat.encode(messages, 1000)
    assert [i for i in ids if i < 3] == [1] + [2] * (len(contents) // 2)


def test_an_answer_is_text_that_goes_on_where_the_template_ends(directory, chat, reference):
    tokenizer = load_tokenizer(directory)
    for answer in ("Hello", " hello world", "<s>", "end|>"):
        ids = chat.encode(CONVERSATION, 10_000, answer)
        rendered = reference.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in CONVERSATION],
            add_generation_prompt=True,
            tokenize=False,
        )
        if "<" not in answer:
            expected = reference(rendered + answer, add_special_tokens=False)["input_ids"]
            assert ids == expected
        prompt = chat.encode(CONVERSATION, 10_000)
        specials = [
            [token_id for token_id in some if token_id in tokenizer.special.ids.values()]
            for some in (ids, prompt)
        ]
        assert specials[0] == specials[1]
        assert tokenizer.decode(ids) == tokenizer.decode(prompt) + answer


def test_v1_encodes_an_answer_as_it_does_the_assistant_s_turns(v1_chat):
    question = CONVERSATION[1:2]
    whole = v1_chat.encode([*question, Message("assistant", "No."), *CONVERSATION[3:]], 1000)
    ids = v1_chat.encode(question, 1000, "No.")
    assert ids == whole[: len(ids)]
    assert whole[len(ids)] == 2


def test_v1_refuses_a_conversation_without_a_question(tmp_path):
    chat = load(v1(tmp_path))
    with pytest.raises(MoeServerError, match="refuses the messages") as caught:
        chat.encode([Message("user", "a"), Message("assistant", "b")], 1000)
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID, "messages")


def test_a_fine_tuned_v1_goes_by_its_template_and_its_added_tokens(tmp_path):
    added = {"32000": {"content": "<|im_end|>", "special": True}}
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 32001}))
    directory = v1(tmp_path, CHATML, added_tokens_decoder=added)
    processor = SentencePieceProcessor(model_file=str(MIXTRAL_V1))

    def inside(text: str) -> list[int]:
        # Without the space that sentencepiece puts before a text: "\n" is one byte piece.
        return processor.encode("\n" + text)[2:]

    ids = load(directory).encode([Message("system", "Hi."), Message("user", "<|im_end|>")], 1000)
    assert ids == [
        *(32001, *inside("system\nHi."), 32000, *inside("\n")),
        *(32001, *inside("user\n<|im_end|>"), 32000, *inside("\n")),
        *(32001, *inside("assistant\n")),
    ]


def test_control_pieces_are_special_tokens(tmp_path):
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}"
        "[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    (tmp_path / "tokenizer.model").symlink_to(MIXTRAL_V3)
    (tmp_path / "chat_template.jinja").write_text(template)
    ids = load(tmp_path).encode(CONVERSATION[1:], 1000)
    # Whose encoding of turns is what the template says, blanks at the end of the first aside.
    assert ids == by_mistral(MIXTRAL_V3, CONVERSATION[1:])
    typed = load(tmp_path).encode([Message("user", "[/INST]</s>")], 1000)
    assert [token_id for token_id in typed if token_id < 10] == [1, 3, 4]


def test_the_template_file_comes_before_the_configuration(tmp_path):
    directory = write(tmp_path, byte_level(), "{{ 'config' }}")
    chat = load(directory)
    assert load_tokenizer(directory).decode(chat.encode([Message("user", "x")], 99)) == "config"
    (directory / "chat_template.jinja").write_text("{{ 'file' }}")
    chat = load(directory)
    assert load_tokenizer(directory).decode(chat.encode([Message("user", "x")], 99)) == "file"


def test_of_named_templates_the_default_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    directory = write(tmp_path, byte_level(), named)
    ids = load(directory).encode([Message("user", "x")], 99)
    assert load_tokenizer(directory).decode(ids) == "d"
    write(tmp_path, byte_level(), named[:1])
    with pytest.raises(MoeServerError, match=r"\['tool_use'\]; none is 'default'"):
        load(directory)


def test_without_a_template_there_is_no_chat_and_no_jinja(tmp_path):
    code = "import sys, moe_server.service.server; sys.exit('jinja2' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert load_chat(tmp_path, None) is None
    write(tmp_path, byte_level(), None)
    assert load_chat(tmp_path, load_tokenizer(tmp_path)) is None


def test_a_template_that_does_not_compile_is_refused_at_the_start(tmp_path):
    with pytest.raises(MoeServerError, match=r"tokenizer_config.json does not compile"):
        load(write(tmp_path, byte_level(), "{% for x in %}"))


FAILURES = [
    ("{{ raise_exception('Only cats.') }}", Reason.INVALID, "refuses the messages: Only cats."),
    ("{{ messages[0].content + 1 }}", Reason.UNSUPPORTED, "fails for these messages: TypeError"),
    ("{{ nothing.at.all }}", Reason.UNSUPPORTED, "UndefinedError"),
    ("{{ messages.append(1) }}", Reason.UNSUPPORTED, "SecurityError"),
    (
        "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}",
        Reason.INVALID,
        "cannot fit",
    ),
]


@pytest.mark.parametrize(("template", "reason", "message"), FAILURES)
def test_rendering_fails_for_messages(tmp_path, template, reason, message):
    chat = load(write(tmp_path, byte_level(), template))
    with pytest.raises(MoeServerError, match=re.escape(message)) as caught:
        chat.encode([Message("user", "hello")], 1000)
    assert (caught.value.reason, caught.value.field) == (reason, "messages")


def test_rendering_takes_a_bounded_time(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_server.chat.template.MAX_RENDER_S", 0.05)
    slow = "{% for i in range(99999) %}{% for j in range(999) %}{% endfor %}{{ '.' }}{% endfor %}"
    chat = load(write(tmp_path, byte_level(), slow))
    with pytest.raises(MoeServerError, match=r"takes more than 0\.05 s"):
        chat.encode([Message("user", "hello")], 10**9)


def test_too_many_tokens_are_refused(tmp_path):
    chat = load(write(tmp_path, byte_level()))
    with pytest.raises(MoeServerError, match=r"at most 10 fit") as caught:
        chat.encode([Message("user", "x")], 10)
    assert caught.value.field == "messages"


@pytest.mark.parametrize("kind", ["template", "v1"])
def test_chat_loads_neither_torch_nor_transformers(tmp_path, kind):
    if kind == "v1":
        v1(tmp_path)
    else:
        write(tmp_path, byte_level())
    code = (
        "import sys; from pathlib import Path; from moe_server.chat.chat import load_chat; "
        "from moe_server.chat.message import Message; "
        "from moe_server.tokenizer import load_tokenizer; "
        f"path = Path({str(tmp_path)!r}); chat = load_chat(path, load_tokenizer(path)); "
        "chat.encode([Message('user', 'x')], 99); "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
