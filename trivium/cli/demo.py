"""`trivium demo`: the main job, end to end."""

from __future__ import annotations

from .options import Configs, Flags, answer, resolve


def demo(*flags: Flags, config: Configs = (), dry_run: bool = False, json: bool = False) -> None:
    """Pulls a small real model, verifies it, teaches it to turn short texts into JSON, and measures it before and after.

    About ten minutes on two cores. Everything is kept in one folder, with a report to open in a browser; a second run
    goes on from what is there, and downloads nothing.

    Try:
      trivium demo
      trivium demo --dry-run
      trivium demo --out my-demo --train_rows 400 --seed 1

    Parameters
    ----------
    config
        YAML or JSON with the fields below; given more than once, later ones win.
    dry_run
        Print the resolved config, and do nothing.
    json
        Answer as JSON: every fact of the report.
    """
    from ..recipes.demo import Demo
    from ..recipes.demo import demo as run

    job = resolve(Demo, config, flags, aliases={}, command=demo)
    if dry_run:
        answer(job, as_json=json)
        return
    facts = run(job)
    if json:
        answer(facts, as_json=True)
