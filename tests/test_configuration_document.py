"""docs/configuration.md has every key with its default and range, and an example that is accepted."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from edge.cli.exit_codes import MEANINGS, ExitCode
from edge.config import MQTT_KEYS, REQUIRED, SERIAL_KEYS, TOP_KEYS, Key, load
from edge.errors import ConfigError
from edge.protocol.checks import FieldError
from edge.protocol.messages import Request
from edge.routes.config import ASK_KEYS, ROUTE_KEYS, TRIGGER_KEYS, Route, parse_routes

DOCUMENT = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text()
SECTIONS = {"Top level": "", "[mqtt]": "mqtt", "[[serial]]": "serial", "[[route]]": "route"} | {
    "[route.trigger]": "route.trigger",
    "[route.ask]": "route.ask",
}


class Row(NamedTuple):
    """A row of the document's tables."""

    section: str
    key: str
    allowed: str
    default: str
    example: str


def rows() -> list[Row]:
    """All rows of the tables of keys."""
    result, section = [], None
    for line in DOCUMENT.splitlines():
        if line.startswith("#"):
            section = SECTIONS.get(line.strip("#` "))
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if section is not None and len(cells) == 5 and cells[0].startswith("`"):
            key, _, allowed, default, example = cells
            result.append(Row(section, code(key), allowed, default, code(example)))
    return result


def code(cell: str) -> str:
    """The content of a code span."""
    return cell.strip("`") if not cell.startswith("``") else cell[2:-2].strip()


def ids(row: Row) -> str:
    return f"{row.section}.{row.key}".strip(".")


KEYS: dict[str, Mapping[str, Key]] = {"": TOP_KEYS, "mqtt": MQTT_KEYS, "serial": SERIAL_KEYS}
SIMPLE = [row for row in rows() if row.section in KEYS]
OF_ROUTES = [row for row in rows() if row.section not in KEYS]
COMPUTED = {
    "node": "the host name",
    "cache_directory": "`$CACHE_DIRECTORY`, else `~/.cache/edge-gemma`",
    "state_directory": "`$STATE_DIRECTORY`, else `~/.local/state/edge-gemma`",
    "threads": "processor cores, at most 4",
}


def test_every_key_is_documented_once() -> None:
    tables = ("mqtt", "serial", "route")
    known = [("", key) for key in TOP_KEYS if key not in tables]
    known += [("mqtt", key) for key in MQTT_KEYS] + [("serial", key) for key in SERIAL_KEYS]
    known += [("route", key) for key in ROUTE_KEYS] + [("route.trigger", key) for key in TRIGGER_KEYS]
    known += [
        ("route.ask", key) for key in ("instructions", "question", "limit", "schema", "state", *ASK_KEYS)
    ]
    assert sorted((row.section, row.key) for row in rows()) == sorted(known)


@pytest.mark.parametrize("row", SIMPLE, ids=ids)
def test_ranges_and_defaults_match_the_code(row: Row) -> None:
    key = KEYS[row.section][row.key]
    with pytest.raises(FieldError) as refused:
        key.check(row.key, 3 if row.allowed == "true or false" else True)
    assert str(refused.value).partition("allowed: ")[2] == row.allowed
    if key.default is REQUIRED:
        assert row.default == "required"
    elif callable(key.default):
        assert row.default == COMPUTED[row.key]
    elif key.default is None:
        assert row.default
        assert not row.default.startswith("`")
    else:
        default = tomllib.loads(f"x = {code(row.default)}")["x"]
        assert (tuple(default) if isinstance(default, list) else default) == key.default


SMALLEST = {
    "name": "r",
    "topics": ["s/#"],
    "trigger": {"every_s": 1},
    "event_topic": "e",
    "answer_topic": "a",
}


def route(section: str, **values: Any) -> Route:
    """The smallest valid route, with `values` in one of its tables."""
    table: dict[str, Any] = SMALLEST | {"ask": {"question": "?"}, "trigger": {"every_s": 1, "when": "last"}}
    target = table if section == "route" else table[section.partition(".")[2]]
    target.update(values)
    (parsed,) = parse_routes([table])
    return parsed


DEFAULTS: dict[str, Any] = {
    "parse_text": lambda: route("route").parse_text,
    "max_sensors": lambda: route("route").max_sensors,
    "min_interval_s": lambda: route("route").trigger.min_interval_s,
    "window": lambda: {
        "readings": route("route").window_readings,
        "seconds": route("route").window_seconds,
    },
    "instructions": lambda: route("route").ask.instructions,  # type: ignore[union-attr]  # the route has an ask table
} | {
    field.name: (lambda default=field.default: list(default) if isinstance(default, tuple) else default)
    for field in fields(Request)
    if field.name in ASK_KEYS and field.default is not None
}


@pytest.mark.parametrize("row", OF_ROUTES, ids=ids)
def test_ranges_and_defaults_of_routes_match_the_code(row: Row) -> None:
    with pytest.raises(ConfigError) as refused:
        route(row.section, **{row.key: 3 if row.allowed == "true or false" else True})
    assert str(refused.value).partition("allowed: ")[2] == row.allowed
    if row.key in DEFAULTS:
        assert tomllib.loads(f"x = {code(row.default)}")["x"] == DEFAULTS[row.key]()
    else:
        assert row.default
        assert not re.match(r"`[^`]*`$", row.default)


def test_the_examples_form_a_configuration(tmp_path: Path) -> None:
    headers = {"": "", "mqtt": "[mqtt]", "serial": "[[serial]]", "route": "[[route]]"}
    lines = []
    for section in SECTIONS.values():
        lines.append(headers.get(section, f"[{section}]"))
        nested = ("trigger", "ask") if section == "route" else ()  # separate tables, below
        lines += [
            f"{row.key} = {row.example}" for row in rows() if row.section == section and row.key not in nested
        ]
    (tmp_path / "edge.toml").write_text("\n".join(lines))
    (tmp_path / "mqtt-password").write_text("secret")
    config = load(tmp_path / "edge.toml")
    assert (config.queue, len(config.serial), len(config.routes)) == (16, 1, 1)
    for row in rows():
        if row.section == "route" and row.key in ("trigger", "ask"):
            route("route", **{row.key: tomllib.loads(f"x = {row.example}")["x"]})


def test_the_first_example_is_accepted(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```toml\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    (tmp_path / "edge.toml").write_text(example)
    (tmp_path / "mqtt-password").write_text("secret")
    assert load(tmp_path / "edge.toml").mqtt is not None


def test_every_exit_code_is_documented() -> None:
    documented = re.findall(r"^\| (\d+) \| (.*) \|$", DOCUMENT, re.MULTILINE)
    assert documented == [(str(code.value), MEANINGS[code]) for code in ExitCode]
