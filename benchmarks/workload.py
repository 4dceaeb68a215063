"""Sensor requests as the field sends them: a fixed system prompt, a few readings, an answer by JSON schema.

`sensor_requests.json` has three parts: `systems` (prompts, by domain, as lines), `schemas`, and `requests`,
each with the names of its system prompt and schema, its kind (alarm, summary or classification) and its
readings. All were written for this project.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edge.protocol.messages import Request, parse_request

DATA = Path(__file__).with_name("sensor_requests.json")
KINDS = ("alarm", "summary", "classification")
MAX_TOKENS = 128


@dataclass(frozen=True)
class SensorRequest:
    """One request, without a model's prompt format."""

    id: str
    kind: str
    domain: str
    system: str
    readings: str
    schema: Mapping[str, Any]

    @property
    def prompt(self) -> str:
        """The request as text to go on from, for a base model: what changes stands last."""
        return f"{self.system}\n\nReadings:\n{self.readings}\n\nAnswer in JSON:\n"

    def request(self, chat: bool) -> Request:
        """The request as a daemon gets it: for a `chat` model with messages, else as a prompt."""
        data: dict[str, Any] = {"id": self.id, "max_tokens": MAX_TOKENS, "stream": False}
        data["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": self.kind, "schema": self.schema},
        }
        if chat:
            data["messages"] = [
                {"role": "system", "content": self.system},
                {"role": "user", "content": f"Readings:\n{self.readings}"},
            ]
        else:
            data["prompt"] = self.prompt
        return parse_request(json.dumps(data))


@cache
def load() -> tuple[SensorRequest, ...]:
    """All requests of the file, in its order."""
    data = json.loads(DATA.read_text("utf-8"))
    systems = {name: "\n".join(lines) for name, lines in data["systems"].items()}
    return tuple(
        SensorRequest(
            id=item["id"],
            kind=item["kind"],
            domain=item["system"],
            system=systems[item["system"]],
            readings="\n".join(item["readings"]),
            schema=data["schemas"][item["schema"]],
        )
        for item in data["requests"]
    )


def of(domain: str, kind: str) -> tuple[SensorRequest, ...]:
    """The requests of one domain and kind; they share system prompt and schema."""
    return tuple(item for item in load() if (item.domain, item.kind) == (domain, kind))
