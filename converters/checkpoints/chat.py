"""How a checkpoint says it is talked to, and under which licence it comes."""

from __future__ import annotations

from converters.architectures import gemma3
from converters.checkpoints.base import ChatInfo

_BOS, _EOS = 2, 1
_MARKERS = {gemma3.CHAT_MARKER: (gemma3.FAMILY, gemma3.STOP_IDS)}
_NOTICES = {
    "gemma": "Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms",
    "apache-2.0": "Apache License 2.0: https://www.apache.org/licenses/LICENSE-2.0",
}


def chat_info(family: str, template: str) -> ChatInfo:
    """What to do with a model of `family` whose chat template (Jinja source, perhaps empty) is `template`.

    The turn markers in the template decide; a template without Gemma's markers counts as none.
    """
    for marker, (prompt_format, stop_ids) in _MARKERS.items():
        if marker in template and prompt_format == family:
            return ChatInfo(prompt_format, _BOS, stop_ids)
    return ChatInfo("plain", _BOS, (_EOS,))


def licence_notice(name: str) -> str:
    """One line on the licence that a checkpoint names by its short `name`; "" if it names none."""
    return _NOTICES.get(name.lower(), f"Licence: {name}" if name else "")
