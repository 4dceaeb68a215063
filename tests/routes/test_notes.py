"""Notes: what arithmetic can tell about readings, written next to them in a question."""

from __future__ import annotations

import itertools
import math
import re
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import ConfigError
from edge.routes.config import parse_routes
from edge.routes.router import READINGS_SHOWN, Question, Router

NOTED = """
[[route]]
name = "store"
topics = ["cold/+"]
answer_topic = "answers"
[route.trigger]
silence_s = 1000
min_interval_s = 0
[route.ask]
limit = { above = 8 }
question = "{sensor}, alarm {limit}: {notes}"
"""


def router(toml: str) -> Router:
    return Router(parse_routes(tomllib.loads(toml)["route"]), plain=True, wall_clock=lambda: 1_700_000_000.25)


readings = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([8.0, math.nextafter(8, 0), math.nextafter(8, 9)]),
)


def noted(*values: str, after: float = 1000.0, limit: str = "above = 8") -> str:
    """The question about readings that are 100 s apart, asked `after` seconds of silence."""
    store = router(NOTED.replace("silence_s = 1000", f"silence_s = {after}").replace("above = 8", limit))
    for index, value in enumerate(values):
        assert store.reading("cold/3", value.encode(), 100.0 * index) == []
    (question,) = store.tick(100.0 * (len(values) - 1) + after)
    assert isinstance(question, Question)
    return question.request.prompt or ""


def test_notes_show_changes_and_values_beyond_the_limit() -> None:
    assert noted("7.9", "8.4", "8.4", "8.0", after=120) == (
        "3, alarm above 8: 7.9, 8.4 (+0.5, beyond), 8.4 (same, beyond), 8 (-0.4), newest 120 s old"
    )
    assert noted("4.1", "41", "-41", "0", after=120) == (
        "3, alarm above 8: 4.1, 41 (jump, beyond), -41 (-82), 0 (+41), newest 120 s old"
    )


def test_a_reading_is_overdue_after_three_times_the_median_pause() -> None:
    assert noted("1", "2", "3", after=301).endswith(", newest 301 s old, overdue")
    assert noted("1", "2", "3", after=299).endswith(", newest 299 s old")
    assert noted("1", "2", after=900).endswith(", newest 900 s old")  # one pause does not predict the next


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{ above = 8 }", "{ above = 8, below = 2 }", r"route\[0\].ask.limit is not valid; allowed: either"),
        ("{ above = 8 }", "{}", r"route\[0\].ask.limit is not valid; allowed: either"),
        ("{ above = 8 }", "{ above = nan }", r"route\[0\].ask.limit.above "),
        (
            "limit = { above = 8 }\n",
            "",
            r"route\[0\].ask.question has the unknown field 'limit'; allowed: sens",
        ),
    ],
)
def test_an_invalid_limit_is_refused_by_name(old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        router(NOTED.replace(old, new))


@pytest.mark.parametrize("side", ["above", "below"])
@given(st.lists(readings, min_size=1, max_size=20))
def test_notes_are_one_line_with_a_mark_for_each_reading(side: str, values: list[float]) -> None:
    text = noted(*(repr(value) for value in values), limit=f"{side} = 8").removeprefix(f"3, alarm {side} 8: ")
    shown = values[-READINGS_SHOWN:]
    assert text.isprintable()
    assert len(re.findall(r"(?:^|, )-?\d", text)) == len(shown)
    assert text.count("beyond") == sum(value > 8 if side == "above" else value < 8 for value in shown)
    assert text.count("same") == sum(before == value for before, value in itertools.pairwise(shown))
