"""`trivium runs`: what was trained here."""

from __future__ import annotations

from pathlib import Path

from .options import UsageError, answer


def runs(*paths: Path, plot: Path | None = None, metric: str = "loss", json: bool = False) -> None:
    """Lists the runs in a folder; compares several; draws their curves.

    One folder (runs by default) is searched for runs. Two or more are compared: the settings that differ, and how they ended.

    Try:
      trivium runs
      trivium runs runs/first runs/second
      trivium runs runs/first runs/second --plot curves.svg --metric validation.loss

    Parameters
    ----------
    paths
        A folder of runs, or several runs.
    plot
        Draw the metric by step into this SVG file.
    metric
        What to draw: a number of metrics.jsonl, with dots inside.
    json
        Answer as JSON.
    """
    from ..recipes.runs import compare, find
    from ..recipes.runs import plot as draw

    chosen = list(paths) or [Path("runs")]
    if len(chosen) == 1:
        found = find(chosen[0])
        chosen = [run.path for run in found]
        answer([run.summary() for run in found], as_json=json)
    else:
        answer(compare(chosen), as_json=json)
    if plot is not None:
        if not chosen:
            raise UsageError("there is no run to draw")
        draw(chosen, plot, metric=metric)
