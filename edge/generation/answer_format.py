"""The part of a request that a grammar is made of, in a form that can be sent to another process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from edge.protocol.messages import Request
from edge.text.prompt import begins_in_thought


class AnswerFormat(NamedTuple):
    """What an answer must look like: the fields of a request that say so.

    `in_thought`: the prompt ends inside the model's reasoning, so the answer starts there.
    """

    response_format: Mapping[str, Any] | None
    tools: tuple[Mapping[str, Any], ...]
    reasoning: bool
    in_thought: bool

    @classmethod
    def of(cls, request: Request) -> AnswerFormat | None:
        """Return the format of `request`; None if any text will do."""
        if request.response_format is None and not request.tools:
            return None
        return cls(request.response_format, request.tools, request.reasoning, begins_in_thought(request))

    @classmethod
    def from_json(cls, text: str) -> AnswerFormat:
        """Read what `to_json` wrote."""
        response_format, tools, reasoning, in_thought = json.loads(text)
        return cls(response_format, tuple(tools), reasoning, in_thought)

    def to_json(self) -> str:
        """Return JSON that is the same for equal formats."""
        return json.dumps(self)

    @property
    def fields(self) -> str:
        """The request's fields that describe the format, for messages."""
        names = []
        if self.response_format is not None:
            names.append(f"response_format.{self.response_format['type']}")
        if self.tools:
            names.append("tools")
        return " or ".join(names)
