"""Size against fidelity of several bundles, as one HTML page that needs nothing else.

A chart (bytes of the bundle against how much higher its perplexity is than the checkpoint's), a table of all
that was measured, and each layer's error as a row of bars.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from converters.evaluate import Report

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 720, 380, 64, 44, 16, 150
_COLUMNS = (
    "",
    "recipe",
    "MB",
    "perplexity",
    "KL, nats",
    "same top token",
    "tokens/s",
    "error of each layer's keys",
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; color: #222 }
svg text { font: 12px system-ui, sans-serif; fill: #444 }
table { border-collapse: collapse }
td, th { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
"""


def picture(reports: Sequence[Report], checkpoint: str) -> str:
    """The page, for reports of one or more bundles of a checkpoint, measured on the same text."""
    first = reports[0].fidelity
    rows = "\n".join(_row(report) for report in reports)
    heads = "".join(f"<th>{head}</th>" for head in _COLUMNS)
    return f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>Size and fidelity: {escape(checkpoint)}</title>
<style>{_STYLE}</style>
<h1>Size and fidelity</h1>
<p>Bundles of {escape(checkpoint)} against its float weights (perplexity {first.checkpoint_perplexity:.3f})
on a text of {first.tokens:,} tokens, {first.scored_tokens:,} of them scored. Low and left is best.</p>
{_chart(reports)}
<table><tr>{heads}</tr>
{rows}
</table>
</html>
"""


def _chart(reports: Sequence[Report]) -> str:
    sizes = [report.bytes / 1e6 for report in reports]
    rises = [100 * report.fidelity.perplexity_rise for report in reports]
    across, up = _ticks(min(0.0, *sizes), max(sizes)), _ticks(min(0.0, *rises), max(*rises, 1.0))
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(size: float) -> float:
        return _LEFT + wide * (size - across[0]) / (across[-1] - across[0])

    def y(rise: float) -> float:
        return _TOP + high * (1 - (rise - up[0]) / (up[-1] - up[0]))

    lines = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img">']
    for tick in up:
        lines.append(
            f'<path d="M{_LEFT} {y(tick):.1f}h{wide}" stroke="#ddd"/>'
            f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:+g}%</text>'
        )
    for tick in across:
        lines.append(f'<text x="{x(tick):.1f}" y="{_HEIGHT - 24}" text-anchor="middle">{tick:g}</text>')
    lines.append(f'<text x="{_LEFT + wide / 2}" y="{_HEIGHT - 6}" text-anchor="middle">MB</text>')
    for report, size, rise in zip(reports, sizes, rises, strict=True):
        lines.append(
            f'<circle cx="{x(size):.1f}" cy="{y(rise):.1f}" r="5" fill="#2a6fb0"/>'
            f'<text x="{x(size) + 9:.1f}" y="{y(rise) + 4:.1f}">{escape(report.name)} ({rise:+.1f}%)</text>'
        )
    return "\n".join([*lines, "</svg>"])


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers, the first not above `low` and the last not below `high`."""
    rough = (high - low) / 6
    unit: float = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [step * at for at in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _row(report: Report) -> str:
    found = report.fidelity
    cells = (
        escape(report.name),
        escape(report.recipe),
        f"{report.bytes / 1e6:,.1f}",
        f"{found.bundle_perplexity:.3f} ({found.perplexity_rise:+.2%})",
        f"{found.kl_divergence:.4f}",
        f"{found.top1_agreement:.1%}",
        f"{report.tokens_per_second:.1f}",
        _bars(list(report.layer_errors.values())),
    )
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _bars(errors: Sequence[float]) -> str:
    """A bar for each layer, on a scale that ends at the largest error."""
    largest = max(*errors, 1e-9)
    heights = [20 * error / largest for error in errors]
    bars = "".join(
        f'<rect x="{5 * i}" y="{20 - height:.1f}" width="4" height="{height:.1f}" fill="#2a6fb0"/>'
        for i, height in enumerate(heights)
    )
    return f'<svg width="{5 * len(errors)}" height="20">{bars}</svg> to {largest:.1%}'
