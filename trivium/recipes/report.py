"""`report.html`: what the demo did, in one self-contained file: results, curves, checks, machine, hashes, commands."""

from __future__ import annotations

import html
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


COLORS = ("#2a6fdb", "#d1495b", "#2e8b57", "#b8860b", "#8a4fbf", "#444444")


def curve(points: Sequence[tuple[float, float]], x_name: str, y_name: str) -> str:
    """One line, without a legend; see `curves`."""
    return curves({"": points}, x_name, y_name)


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str) -> str:
    """An SVG of one line a name, from the first to the last x and from 0 to the largest y."""
    every = [point for points in lines.values() for point in points]
    if len(every) < 2:
        return "<p>No curve: fewer than two steps were made.</p>"
    first, last, top = min(x for x, _ in every), max(x for x, _ in every), max(y for _, y in every) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (WIDTH - LEFT - 10) * (x - first) / (last - first or 1), (HEIGHT - BOTTOM) * (1 - y / top) + 5

    parts = [f'<text x="{LEFT - 8}" y="{place(first, y)[1] + 4:.1f}" text-anchor="end">{y:.3g}</text>' for y in (0, top / 2, top)]
    for number, (name, points) in enumerate(lines.items()):
        color = COLORS[number % len(COLORS)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(x, y) for x, y in points))
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{path}"/>')
        parts.append(f'<text x="{WIDTH - 10}" y="{16 + 16 * number}" text-anchor="end" style="fill:{color}">{html.escape(name)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + 10}" role="img" aria-label="{html.escape(y_name)} by {x_name}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="currentColor">'
        f'<line stroke="#8884" x1="{LEFT}" x2="{WIDTH}" y1="{HEIGHT - BOTTOM + 5}" y2="{HEIGHT - BOTTOM + 5}"/>{"".join(parts)}'
        f'<text x="{LEFT}" y="{HEIGHT}">{x_name} {first:g} to {last:g}</text><text x="{LEFT}" y="12">{html.escape(y_name)}</text></svg>'
    )
