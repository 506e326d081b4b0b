"""`trivium demo`: the main job, end to end."""

from __future__ import annotations

from .options import Configs, Flags, answer, resolve


def demo(*flags: Flags, config: Configs = (), from_scratch: bool = False, dry_run: bool = False, json: bool = False) -> None:
    """Pulls a small real model, verifies it, teaches it to turn short texts into JSON, and measures it before and after.

    About ten minutes on two cores. Everything is kept in one folder, with a report to open in a browser; a second run
    goes on from what is there, and downloads nothing.

    With --from-scratch: a tokenizer and a model trained from the Python standard library's source alone, measured on files that
    were held out, beside an n-gram model and a compressor; its options are --out, --vocab, --preset, --train.* and so on.

    Try:
      trivium demo
      trivium demo --from-scratch
      trivium demo --dry-run
      trivium demo --out my-demo --train_rows 400 --seed 1

    Parameters
    ----------
    config
        YAML or JSON with the fields below; given more than once, later ones win.
    from_scratch
        Train a tokenizer and a model of its own instead.
    dry_run
        Print the resolved config, and do nothing.
    json
        Answer as JSON: every fact of the report.
    """
    if from_scratch:
        from ..recipes.from_scratch import FromScratch
        from ..recipes.from_scratch import from_scratch as run_scratch

        scratch = resolve(FromScratch, config, flags, aliases={}, command=demo)
        if dry_run:
            answer(scratch, as_json=json)
            return
        facts = run_scratch(scratch)
    else:
        from ..recipes.demo import Demo
        from ..recipes.demo import demo as run

        job = resolve(Demo, config, flags, aliases={}, command=demo)
        if dry_run:
            answer(job, as_json=json)
            return
        facts = run(job)
    if json:
        answer(facts, as_json=True)
