"""`report.html`: what the demo did, in one self-contained file: results, curves, checks, machine, hashes, commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..io import files

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Trivium: demo report</title>
<style>
:root { color-scheme: light dark; --line: #8884; --accent: #2a6fdb; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { text-align: left; padding: .25rem .75rem; border-bottom: 1px solid var(--line); }
td.n { text-align: right; font-variant-numeric: tabular-nums; } pre { background: var(--soft); padding: .75rem; overflow-x: auto; }
svg { width: 100%; height: auto; } .bar { fill: var(--accent); } .axis { stroke: var(--line); } .curve { fill: none; stroke: var(--accent); stroke-width: 1.5; }
text { font: 12px system-ui, sans-serif; fill: currentColor; } .big { font-size: 1.4rem; }
</style></head><body>
<h1>A model learned a task</h1>
<p class="big">Exact match on {{ test_rows }} held-out texts: {{ percent(facts.gain.before) }} before, <b>{{ percent(facts.gain.after) }}</b> after
(look-up alone: {{ percent(facts.baseline.value) }}).</p>
<h2>Results</h2>
<table><tr><th>metric</th><th>before</th><th>after</th></tr>
{% for name in facts.before %}<tr><td>{{ name }}</td>{% for side in (facts.before, facts.after) %}<td class="n">{{ interval(side[name]) }}</td>{% endfor %}</tr>
{% endfor %}</table>
<p>Intervals are 95% bootstrap intervals over texts.</p>
<h2>Training</h2>
{{ curve }}
<h2>The task</h2>
{% for message in facts.example %}<p><b>{{ message.role }}</b></p><pre>{{ message.content }}</pre>{% endfor %}
<h2>A new text</h2>
{% for message in facts.answer.messages %}<p><b>{{ message.role }}</b></p><pre>{{ message.content }}</pre>{% endfor %}
<p><b>the taught model</b></p><pre>{{ facts.answer.answer }}</pre>
<h2>What was verified</h2>
<table><tr><th>check</th><th>against</th><th>difference</th><th>tolerance</th><th>pass</th></tr>
{% for c in facts.checks %}<tr><td>{{ c.check }}</td><td>{{ c.against }}</td><td class="n">{{ '%.3g' % c.difference }} {{ c.unit }}</td><td class="n">{{ '%.3g' % c.tolerance }}</td><td>{{ 'yes' if c.pass else 'no' }}</td></tr>
{% endfor %}
<tr><td>merged against adapter beside the base</td><td>the same model before</td><td class="n">{{ '%.3g' % facts.merge.mean_kl }} nats mean KL</td><td class="n">{{ facts.config.tolerance }}</td><td>yes</td></tr>
{% for c in facts.reload %}<tr><td>saved and reloaded in a new process</td><td>{{ c.by }}</td><td class="n">{{ '%.3g' % c.difference }} deviations</td><td class="n">{{ c.tolerance }}</td><td>{{ 'yes' if c.pass else 'no' }}</td></tr>
{% endfor %}</table>
<h2>How it was run</h2>
<pre>{% for command in facts.commands %}{{ command }}
{% endfor %}</pre>
<table>{% for name, value in facts.seconds.items() %}<tr><td>{{ name }}</td><td class="n">{{ value }} s</td></tr>{% endfor %}</table>
<h2>Environment</h2>
<table>{% for group in (facts.machine, facts.versions) %}{% for name, value in group.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}{% endfor %}</table>
<h2>Hashes</h2>
<table>{% for side, hashes in facts.hashes.items() %}{% for name, value in hashes.items() %}<tr><td>{{ side }}</td><td>{{ name }}</td><td><code>{{ value }}</code></td></tr>{% endfor %}{% endfor %}</table>
</body></html>
"""
WIDTH, HEIGHT, LEFT, BOTTOM = 800, 260, 50, 30


def write(path: Path, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the report of a demo's `facts` and its training `rows` (metrics.jsonl)."""
    environment = jinja2.Environment(autoescape=True)
    page = environment.from_string(PAGE).render(
        facts=facts,
        test_rows=facts["config"]["test_rows"],
        percent=lambda value: f"{value:.1%}",
        interval=_interval,
        curve=jinja2.utils.markupsafe.Markup(curve([(row["step"], row["loss"]) for row in rows if "loss" in row], "step", "loss per token, nats")),
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
