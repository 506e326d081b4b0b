"""`trivium classify train` and `trivium classify predict`."""

from __future__ import annotations

from pathlib import Path

from .options import Configs, Flags, UsageError, answer, resolve, teach


def train(*flags: Flags, config: Configs = (), dry_run: bool = False, json: bool = False) -> None:
    """Trains a classifier on rows of texts and labels (JSONL, CSV, Parquet): a model with a head for classes.

    Trained are the head and the last layer (--tune last), the head alone (--tune head), everything (--tune all), or an adapter
    beside the head (--adapter lora). Accuracy, F1 and the confusion table are of the rows of --validation. Prints where the result is.

    Try:
      trivium classify train --model smollm2 --data train.csv --validation test.csv --out runs/spam
      trivium classify train --model smollm2 --data train.jsonl --tune head --optim.lr 5e-3
      trivium classify train --model smollm2 --data train.jsonl --adapter lora --label category

    Parameters
    ----------
    config
        YAML or JSON with the fields below; given more than once, later ones win, and options come last.
    dry_run
        Show the rows and what the run would need, print the resolved config, and do not train.
    json
        Answer as JSON: path and metrics, or with --dry-run config, data and needs.
    """
    from ..recipes.classify import ALIASES, Classify, classify, plan

    job = resolve(Classify, config, flags, aliases=ALIASES, command=train)
    said = 'use it: trivium classify predict {path} "A text"'
    teach(job, run=classify, plan=plan, dry_run=dry_run, try_=said, as_json=json)


def predict(
    model: str, text: str | None = None, /, *, data: tuple[str, ...] = (), column: str = "text", label: str = "label",
    out: Path | None = None, length: int | None = None, device: str | None = None, json: bool = False,
) -> None:  # fmt: skip
    """Says which class a text is of, or each row of a file, and how likely. With --out, measures how often that is right.

    Try:
      trivium classify predict runs/spam/model "You have won a prize"
      trivium classify predict runs/spam/model --data new.jsonl --json
      trivium classify predict runs/spam/model --data test.csv --out result.json

    Parameters
    ----------
    model
        A classifier's folder.
    text
        The text.
    data
        Files, folders or globs of rows, instead of a text.
    column
        The column of the text; without it, messages are read.
    label
        The column of the right class; read with --out alone.
    out
        A result file: accuracy, F1 and confusion table of rows that have labels.
    length
        Longer texts are cut to so many tokens.
    device
        cpu or cuda; otherwise a GPU if there is one.
    json
        Answer as JSON: label and probabilities of each; or the whole result.
    """
    if (text is None) == (not data):
        raise UsageError("give a text, or rows with --data")
    if out is not None and not data:
        raise UsageError("--out measures rows: name them with --data")
    from ..recipes import classify as recipe
    from ..recipes.evaluate import table
    from ..recipes.load import load

    bundle = load(model, device=device)
    if out is not None:
        result = recipe.measure(bundle, data, out, text=column, label=label, length=length)
        answer(result.to_dict(defaults=True) if json else table(result), as_json=json)
        return
    places, texts = ([""], [text]) if text is not None else recipe.texts(data, column=column)
    found = recipe.predict(bundle, texts, length=length)
    if json:
        rows = [{"label": one.label, "probabilities": one.probabilities} for one in found]
        answer(rows[0] if text is not None else [{"where": at, **row} for at, row in zip(places, rows, strict=True)], as_json=True)
    elif text is not None:
        answer(f"{found[0].label} ({found[0].probability:.1%})", as_json=False)
    else:
        told = [{"row": at, "label": one.label, "probability": f"{one.probability:.4f}"} for at, one in zip(places, found, strict=True)]
        answer(told, as_json=False)
