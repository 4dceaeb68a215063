"""The log is bounded, and gives the location of an exception without its text."""

import logging

import pytest

from edge import logs
from edge.logs import RepeatedLog, place_of

log = logging.getLogger("test")


def test_events_of_one_type_are_logged_once_a_minute_with_a_count(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    noise = RepeatedLog(log)
    for number in range(140_000):
        noise.warning("noise on %s", number)
    assert caplog.messages == ["noise on 0"]
    monkeypatch.setattr(logs, "REPEAT_S", 0.0)
    noise.warning("100%% noise on %s", "x")
    assert caplog.messages[1:] == ["100% noise on x (140000 times since the last such line)"]


def test_an_exception_is_located_without_its_text() -> None:
    try:
        dict[str, str]()["what was asked"]
    except KeyError as error:
        place = place_of(error)
    assert place.startswith("KeyError at test_logs.py:")
    assert "asked" not in place
