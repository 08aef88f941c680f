"""Which way a checkpoint's conversations become token ids.

`load_chat` decides it once, before the port opens. Called by the commands that serve.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from moe_server.chat.message import Message
from moe_server.chat.mistral_v1 import SHA256 as MISTRAL_V1_SHA256
from moe_server.chat.mistral_v1 import MistralV1Chat
from moe_server.errors import MoeServerError, Reason
from moe_server.json_file import read_json
from moe_server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from moe_server.chat.template import ChatTemplate
    from moe_server.chat.template_chat import TemplateChat

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
NO_LIMIT = 2**31


Chat: TypeAlias = "TemplateChat | MistralV1Chat"
"""`prepare` (blocks; off the event loop), `is_prepared`, `encode(messages, max_tokens, answer)`."""


def load_chat(path: Path, tokenizer: Tokenizer | None) -> "Chat | None":
    """How the checkpoint directory `path` wants conversations; None where it does not say.

    A template comes first. But where it is only the stock template of Mistral's first tokenizer,
    or there is none, mistral-common knows the format better.

    Raises:
        MoeServerError: A template that does not compile, or a file that does not parse.
    """
    if tokenizer is None or tokenizer.special.encode_sections is None:
        return None
    config = read_json(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else {}
    template = _load_template(path, config)
    sentencepiece_file = path / "tokenizer.model"
    if _is_mistral_v1(sentencepiece_file) and (template is None or _is_stock(template)):
        return MistralV1Chat(sentencepiece_file)
    if template is None:
        return None
    from moe_server.chat.template_chat import TemplateChat  # noqa: PLC0415

    return TemplateChat(template, tokenizer)


def _load_template(path: Path, config: Mapping[str, Any]) -> "ChatTemplate | None":
    source, origin = _template_source(path, config)
    if source is None:
        return None
    # It brings jinja2 along, a tenth of a second of a start.
    from moe_server.chat.template import ChatTemplate  # noqa: PLC0415

    is_sentencepiece = (path / "tokenizer.model").is_file()
    return ChatTemplate(source, origin, _special_names(config, is_sentencepiece=is_sentencepiece))


def _template_source(path: Path, config: Mapping[str, Any]) -> tuple[str | None, str]:
    """The template and where it stands."""
    file = path / TEMPLATE_FILE
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8"), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise MoeServerError(f"Cannot read {file}: {error}.", "Copy the file again.") from None
    origin = str(path / CONFIG_FILE)
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source}
        if "default" not in named:
            raise MoeServerError(
                f"The chat templates in {origin} are {sorted(map(str, named))}; none is 'default'.",
                "Name one so, or take them out to serve without chat.",
                reason=Reason.UNSUPPORTED,
            )
        source = named["default"]
    return None if source is None else str(source), origin


def _special_names(config: Mapping[str, Any], *, is_sentencepiece: bool) -> dict[str, str]:
    """`bos_token` and so on, as a template calls them."""
    # What transformers takes for these where nothing is said.
    names = {"bos_token": "<s>", "eos_token": "</s>"} if is_sentencepiece else {}
    for key, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            names[key] = content
    return names


def _is_mistral_v1(file: Path) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == MISTRAL_V1_SHA256


def _is_stock(template: "ChatTemplate") -> bool:
    """Whether it writes what Mistral's stock templates do; they differ in blanks only."""
    turns = [Message("user", "U"), Message("assistant", "A"), Message("user", "V")]
    system = Message("system", "S")
    try:
        if _squeezed(template.render(turns, NO_LIMIT)) != "<s>[INST]U[/INST]A</s>[INST]V[/INST]":
            return False
    except MoeServerError:
        return False
    try:
        with_system = _squeezed(template.render([system, *turns], NO_LIMIT))
    except MoeServerError:
        return True  # The oldest ones know no system messages.
    return with_system in (
        "<s>[INST]SU[/INST]A</s>[INST]V[/INST]",
        "<s>[INST]U[/INST]A</s>[INST]SV[/INST]",  # That of Mistral's second tokenizer.
    )


def _squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)
