"""`trivium eval run` and `trivium eval diff`."""

from __future__ import annotations

from pathlib import Path

from .options import Configs, Flags, answer, resolve


def run(*flags: Flags, config: Configs = (), dry_run: bool = False, json: bool = False) -> None:
    """Measures a model on a task, with intervals, and keeps the result with all that it depended on.

    Tasks: perplexity of documents; choices, scored by log-likelihood; generate, scored as text or as JSON. The result
    file holds hashes of weights, tokenizer, template and data; every row's answer lies beside it.

    Try:
      trivium eval run --model smollm2 --task.kind perplexity --task.data text.txt
      trivium eval run --model runs/first/adapter --task.kind generate --task.scorer json --task.data test.jsonl --out after.json
      trivium eval diff before.json after.json

    Parameters
    ----------
    config
        YAML or JSON with the fields below; given more than once, later ones win, and options come last.
    dry_run
        Read the rows, print the resolved config, and do not measure.
    json
        Answer as JSON: the whole result.
    """
    from ..core.log import log
    from ..recipes.evaluate import ALIASES, Eval, evaluate, table

    job = resolve(Eval, config, flags, aliases=ALIASES, command=run)
    if dry_run:
        log.say(f"would measure {job.model} on {len(job.task.records())} rows")
        answer(job, as_json=json)
        return
    result = evaluate(job)
    answer(result.to_dict(defaults=True) if json else table(result), as_json=json)
    log.say(f"the result is in {job.out}, every row beside it")


def diff(a: Path, b: Path, /, *, flips: int = 3, seed: int = 0, json: bool = False) -> None:
    """Compares two results row by row: what was set otherwise, how far the metrics moved, which rows changed sides.

    The interval of a difference is over pairs of the same row, so it is narrower than the two results' own.

    Try:
      trivium eval diff before.json after.json
      trivium eval diff before.json after.json --flips 10
      trivium eval diff before.json after.json --json

    Parameters
    ----------
    a
        A result file.
    b
        The result to compare with it.
    flips
        How many of the rows that changed sides to show.
    seed
        Of the bootstrap.
    json
        Answer as JSON, with every row that changed sides.
    """
    from dataclasses import asdict

    from ..core.log import log
    from ..evaluate.results import diff as compare

    found = compare(a, b, seed=seed)
    if json:
        answer(asdict(found), as_json=True)
        return
    log.table("settings that differ", ("setting", "a", "b"), found.settings)
    rows = [
        {"metric": name, "b - a": round(moved.value, 4), "low": round(moved.low, 4), "high": round(moved.high, 4)}
        for name, moved in found.metrics.items()
    ]
    answer(rows, as_json=False)
    alone = f"; {found.only_a} only in {a}, {found.only_b} only in {b}" if found.only_a or found.only_b else ""
    answer(f"\n{found.rows} rows in both{alone}; {len(found.flips)} changed sides", as_json=False)
    for flip in found.flips[:flips]:
        answer(
            f"\n{flip.metric} {flip.a:g} -> {flip.b:g}\n  a: {flip.shown_a.get('answer')}\n  b: {flip.shown_b.get('answer')}", as_json=False
        )
