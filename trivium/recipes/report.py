"""`report.html`: what the demo did, in one self-contained file: results, curves, checks, machine, hashes, commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..io import files

PAGE = Path(__file__).with_name("report.html.jinja")
WIDTH, HEIGHT, LEFT, BOTTOM = 800, 260, 50, 30


def write(path: Path, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the report of a demo's `facts` and its training `rows` (metrics.jsonl)."""
    environment = jinja2.Environment(autoescape=True)
    page = environment.from_string(PAGE.read_text(encoding="utf-8")).render(
        facts=facts,
        test_rows=facts["config"]["test_rows"],
        percent=lambda value: f"{value:.1%}",
        interval=_interval,
        curve=jinja2.utils.markupsafe.Markup(
            curve([(row["step"], row["loss"]) for row in rows if "loss" in row], "step", "loss per token, nats")
        ),
    )
    with files.atomic_file(path) as sink:
        sink.write(page.encode())
    return path


def _interval(measured: Mapping[str, Any]) -> str:
    if measured["low"] is None:
        return f"{measured['value']:.3f}"
    return f"{measured['value']:.3f} ({measured['low']:.3f} to {measured['high']:.3f})"


def curve(points: Sequence[tuple[float, float]], x_name: str, y_name: str) -> str:
    """An SVG line through `points`, its axes from the data's first to last x and from 0 to the largest y."""
    if len(points) < 2:
        return "<p>No curve: fewer than two steps were made.</p>"
    first, last, top = points[0][0], points[-1][0], max(y for _, y in points) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (WIDTH - LEFT - 10) * (x - first) / (last - first or 1), (HEIGHT - BOTTOM) * (1 - y / top) + 5

    line = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(x, y) for x, y in points))
    ticks = "".join(f'<text x="{LEFT - 8}" y="{place(first, y)[1] + 4:.1f}" text-anchor="end">{y:.2f}</text>' for y in (0, top / 2, top))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 10}" role="img" aria-label="{y_name} by {x_name}">'
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{HEIGHT - BOTTOM + 5}" y2="{HEIGHT - BOTTOM + 5}"/>{ticks}'
        f'<polyline class="curve" points="{line}"/><text x="{LEFT}" y="{HEIGHT}">{x_name} {first:g} to {last:g}</text>'
        f'<text x="{LEFT}" y="12">{y_name}</text></svg>'
    )
