"""A checkpoint's prompt format and licence."""

from __future__ import annotations

import re
from pathlib import Path

from converters.architectures import gemma3, gemma4
from converters.checkpoints.base import ChatInfo
from converters.checkpoints.text_files import read_bytes, read_json

_BOS, _EOS = 2, 1
_FAMILIES = {gemma3.FAMILY: gemma3, gemma4.FAMILY: gemma4}
_NOTICES = {
    "gemma": "Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms",
    "apache-2.0": "Apache License 2.0: https://www.apache.org/licenses/LICENSE-2.0",
}
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
_LICENCE_LINE = re.compile(r"^license\s*:\s*['\"]?([\w.+-]+)", re.MULTILINE)


def chat_info(family: str, template: str) -> ChatInfo:
    """The prompt format of a model of `family` whose chat template is `template` (Jinja source, or "").

    The family's turn marker in the template decides; without it, the format is "plain".
    """
    module = _FAMILIES[family]
    if module.CHAT_MARKER in template:
        return ChatInfo(family, _BOS, module.STOP_IDS)
    return ChatInfo("plain", _BOS, (_EOS,))


def licence_notice(name: str) -> str:
    """One line on the licence that a checkpoint names by its short `name`; "" if it names none."""
    return _NOTICES.get(name.lower(), f"Licence: {name}" if name else "")


def folder_template(path: Path) -> str:
    """The chat template of a Hugging Face folder, in a file of its own or in a JSON file; "" if none."""
    jinja = path / "chat_template.jinja"
    if jinja.exists():
        return _text(jinja)
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (path / name).exists():
            template = read_json(path / name).get("chat_template")
            if isinstance(template, list):  # several, by name; they share the turn markers
                template = "\n".join(str(item.get("template")) for item in template if isinstance(item, dict))
            if isinstance(template, str):
                return template
    return ""


def folder_licence(path: Path) -> str:
    """The licence notice of a Hugging Face folder, from README or LICENSE; "" if none."""
    if (path / "README.md").exists():
        front = _FRONT_MATTER.search(_text(path / "README.md"))
        named = _LICENCE_LINE.search(front.group(1)) if front else None
        if named:
            return licence_notice(named.group(1))
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        if (path / name).exists():
            lines = (line.strip() for line in _text(path / name).splitlines())
            return next((f"Licence: {line[:200]}" for line in lines if line), "")
    return ""


def _text(path: Path) -> str:
    return read_bytes(path).decode("utf-8", errors="replace")
