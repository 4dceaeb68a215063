"""The regression gate: compares the ratios of a run with the committed ones.

Both parts of a ratio are measured in the same rounds, and larger is better: our rates over the limit of the
read bandwidth, a bare interpreter's start over ours, a peer's time over ours. So the gate holds on another
machine of the same kind. On a busy one it does not: a decode step waits for its slowest thread every few
microseconds, a bandwidth measurement does not.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import click

from benchmarks.results import COMPARED, MACHINE, MEASURES, Results, pairs

BASELINE = Path(__file__).with_name("baseline.json")
TOLERANCE = 0.25
BUSY = 0.05
"""If other programs take a larger share of processor time, they can be the cause of a worse ratio."""

_RATES = [row for row in MEASURES if row.unit == "tok/s" and row.key != "bound"]
_STARTS = [row for row in MEASURES if row.unit == "s" and not row.once]


def ratios(results: Results) -> dict[str, float]:
    """Median ratio of each comparison in the run, by a readable name."""
    found = {name: values for name, values in _all_ratios(results) if values}
    return {name: round(statistics.median(values), 4) for name, values in found.items()}


def _all_ratios(results: Results) -> Iterator[tuple[str, list[float]]]:
    for engine in results.engines():
        if not results.facts[engine].get("ours"):
            continue
        bound = results.of(engine, "bound")
        for row in _RATES:
            yield (
                f"{engine}: {row.label.strip()} / bandwidth bound",
                _divided(results.of(engine, row.key), bound),
            )
        interpreter = results.of(MACHINE, "interpreter")
        for row in _STARTS:
            name = f"{engine}: bare interpreter / {row.label.strip()}"
            yield name, _divided(interpreter, results.of(engine, row.key))
        new, repeated = (results.of(engine, f"first_token_{which}") for which in ("new", "repeated"))
        yield f"{engine}: first token, new / repeated system prompt", _divided(new, repeated)
        yield f"{engine}: 100 MB / RssAnon", [1e8 / value for value in results.of(engine, "anonymous")]
    for ours, peer in pairs(results):
        for row in COMPARED:
            yield f"{ours}: {row.label.strip()}, times {peer}", results.advantage(row, ours, peer)


def _divided(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=False)]


def save(results: Results) -> None:
    """Save this run as the baseline of later runs."""
    BASELINE.write_text(json.dumps(ratios(results), indent=1) + "\n")


def check(results: Results) -> list[str]:
    """A line for each ratio that is worse than the committed one by more than the tolerance.

    Ratios to peers that this run did not measure are left out. Raises ClickException without a baseline.
    """
    try:
        committed: dict[str, float] = json.loads(BASELINE.read_text())
    except OSError:
        raise click.ClickException(f"{BASELINE}: not there; make one with --save and commit it") from None
    now = ratios(results)
    return [
        f"{name}: {now[name]:.3g}, committed {was:.3g}: worse by {100 * (1 - now[name] / was):.0f}%,"
        f" {100 * TOLERANCE:.0f}% are allowed"
        for name, was in committed.items()
        if name in now and now[name] < was * (1 - TOLERANCE)
    ]
