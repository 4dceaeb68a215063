"""Size against fidelity of several bundles, as one HTML page that loads nothing else.

A chart (size of the bundle against the increase of its perplexity over the checkpoint's), a table of all
measurements, and each layer's error as a row of bars. It fits a phone's screen without scrolling sideways.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from converters.evaluate import Report

WIDTH, HEIGHT = 480, 340
"""Of the chart, in its own units; it is scaled to the screen."""
LABEL_SIZE, CHARACTER = 14, 8
"""Height of the text, and the width of a character that is never exceeded on average."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 24, 48
_LONGEST_NAME = 16
_COLUMNS = (
    "bundle",
    "recipe",
    "MB",
    "perplexity",
    "KL, nats",
    "same top token",
    "tokens/s",
    "error of each layer's keys",
)
_STYLE = f"""
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 1em auto; padding: 0 1em }}
body {{ max-width: 60em; color: #222 }}
p, td:first-child {{ overflow-wrap: anywhere }}
td {{ white-space: nowrap }}
td:first-child {{ white-space: normal }}
.chart {{ width: 100%; max-width: 640px }}
.chart text {{ font: {LABEL_SIZE}px system-ui, sans-serif; fill: #444 }}
table {{ border-collapse: collapse }}
td, th {{ padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd }}
td:first-child, th:first-child {{ text-align: left }}
@media (max-width: 700px) {{
  tr:first-child {{ display: none }}
  table, tbody, tr, td {{ display: block; text-align: left }}
  tr {{ padding: .5em 0; border-bottom: 1px solid #ddd }}
  td {{ padding: 0; border: 0; white-space: normal }}
  td::before {{ content: attr(data-column) ": "; color: #666 }}
}}
"""


def picture(reports: Sequence[Report], checkpoint: str) -> str:
    """The page, for reports of one or more bundles of a checkpoint, measured on the same text."""
    first = reports[0].fidelity
    rows = "\n".join(_row(report) for report in reports)
    heads = "".join(f"<th>{head}</th>" for head in _COLUMNS)
    notes = "\n".join(
        f"<p>{escape(report.name)}: {escape(report.adapter_note)}</p>"
        for report in reports
        if report.adapter_note
    )
    return f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Size and fidelity: {escape(checkpoint)}</title>
<style>{_STYLE}</style>
<h1>Size and fidelity</h1>
<p>Bundles of {escape(checkpoint)} compared with its float weights
(perplexity {first.checkpoint_perplexity:.3f}) on a text of {first.tokens:,} tokens,
{first.scored_tokens:,} of them scored. Lower left is better.</p>
{_chart(reports)}
<table><tr>{heads}</tr>
{rows}
</table>
{notes}
</html>
"""


def _chart(reports: Sequence[Report]) -> str:
    sizes = [report.bytes / 1e6 for report in reports]
    rises = [100 * report.fidelity.perplexity_rise for report in reports]
    across, up = _ticks(min(0.0, *sizes), max(sizes)), _ticks(min(0.0, *rises), max(*rises, 1.0))
    wide, high = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def x(size: float) -> float:
        return _LEFT + wide * (size - across[0]) / (across[-1] - across[0])

    def y(rise: float) -> float:
        return _TOP + high * (1 - (rise - up[0]) / (up[-1] - up[0]))

    lines = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for tick in up:
        lines.append(f'<path d="M{_LEFT} {y(tick):.1f}h{wide}" stroke="#ddd"/>')
        lines.append(_text(_LEFT - 6, y(tick) + 5, f"{tick:+g}%", "end"))
    lines += [_text(x(tick), HEIGHT - 28, f"{tick:g}", "middle") for tick in across]
    lines.append(_text(_LEFT + wide / 2, HEIGHT - 8, "MB", "middle"))
    points = [(x(size), y(rise)) for size, rise in zip(sizes, rises, strict=True)]
    lines += [f'<circle cx="{at:.1f}" cy="{height:.1f}" r="5" fill="#2a6fb0"/>' for at, height in points]
    names = [f"{_shortened(report.name)} ({rise:+.1f}%)" for report, rise in zip(reports, rises, strict=True)]
    return "\n".join([*lines, *_labels(points, names), "</svg>"])


def _labels(points: Sequence[tuple[float, float]], texts: Sequence[str]) -> list[str]:
    """A label next to each point, on the side with more space; moved up to avoid other labels."""
    lines: list[str] = []
    placed: list[tuple[float, float, float]] = []
    for (x, point_y), text in sorted(zip(points, texts, strict=True), key=lambda label: -label[0][1]):
        width, y = CHARACTER * len(text), point_y - 4
        anchor, at = ("start", x + 9) if x < WIDTH / 2 else ("end", x - 9)
        left = at if anchor == "start" else at - width
        while y > 2 * LABEL_SIZE and any(
            left < end and start < left + width and abs(y - other) < LABEL_SIZE
            for start, end, other in placed
        ):
            y -= LABEL_SIZE
        placed.append((left, left + width, y))
        lines.append(_text(at, y, text, anchor))
    return lines


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _shortened(name: str) -> str:
    """The name, shortened in the middle to fit next to a point; the table has the full name."""
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:half]}…{name[-half + 1 :]}"


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers, the first not above `low` and the last not below `high`."""
    rough = (high - low) / 6
    unit: float = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [step * at for at in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _row(report: Report) -> str:
    fidelity = report.fidelity
    cells = (
        escape(report.name),
        escape(report.recipe),
        f"{report.bytes / 1e6:,.1f}",
        f"{fidelity.bundle_perplexity:.3f} ({fidelity.perplexity_rise:+.2%})",
        f"{fidelity.kl_divergence:.4f}",
        f"{fidelity.top1_agreement:.1%}",
        f"{report.tokens_per_second:.1f}",
        _bars(list(report.layer_errors.values())),
    )
    named = zip(_COLUMNS, cells, strict=True)
    return "<tr>" + "".join(f'<td data-column="{column}">{cell}</td>' for column, cell in named) + "</tr>"


def _bars(errors: Sequence[float]) -> str:
    """A bar for each layer, on a scale that ends at the largest error."""
    largest = max(*errors, 1e-9)
    heights = [20 * error / largest for error in errors]
    bars = "".join(
        f'<rect x="{5 * i}" y="{20 - height:.1f}" width="4" height="{height:.1f}" fill="#2a6fb0"/>'
        for i, height in enumerate(heights)
    )
    return f'<svg width="{5 * len(errors)}" height="20">{bars}</svg> to {largest:.1%}'
