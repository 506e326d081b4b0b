"""`trivium data inspect` and `trivium data prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from .options import UsageError, answer

Files = Annotated[str, Parameter(name="DATA")]


def inspect(
    *data: Files, model: str = "smollm2", rows: int = 3, length: int = 1024, format: str | None = None,
    turns: Literal["all", "last"] = "all", json: bool = False,
) -> None:  # fmt: skip
    """Shows what rows become for a model: their format, tokens, duplicates, what is empty or too long, and real rows.

    What is trained is green (between ⟦ ⟧ where there is no color), special tokens included: it is read off the very
    ids and targets that training sees.

    Try:
      trivium data inspect rows.jsonl
      trivium data inspect 'data/*.parquet' --model models/smollm2 --rows 1
      trivium data inspect rows.jsonl --json

    Parameters
    ----------
    data
        Files (JSONL, Parquet, text; also compressed), folders, globs, or a folder that data prepare wrote.
    model
        Whose tokenizer and chat template.
    rows
        How many rows to show.
    length
        Tokens in a packed row.
    format
        The rows' format, if their columns do not tell.
    turns
        Which assistant turns are trained.
    json
        Answer as JSON: the numbers, and rows as lists of [text, trained].
    """
    from ..data.inspect import inspect as count
    from ..data.inspect import paint, spans
    from ..recipes.data import bank, text_side

    named = _named(data)
    tokenizer, prompt = text_side(model)
    found = bank(named, prompt, length=length, format=format, turns=turns, max_dropped=None, max_empty=None)
    shown = [spans(found, row, tokenizer) for row in range(min(rows, len(found)))]
    if json:
        answer({**count(found).to_dict(), "shown": [[[span.text, span.trained] for span in row] for row in shown]}, as_json=True)
        return
    answer([{"what": what, "value": value} for what, value in count(found).table()], as_json=False)
    for row, marked in enumerate(shown):
        answer(f"\n{found.where(row)}\n{paint(marked)}", as_json=False)


def prepare(
    *data: Files, out: Path, model: str = "smollm2", length: int = 1024, format: str | None = None,
    turns: Literal["all", "last"] = "all", too_long: Literal["drop", "truncate"] = "drop", max_dropped: int | None = 0,
    max_empty: int | None = 0, dry_run: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Turns rows into a folder of tokens, targets and packed bins, whole or not at all; prints where it is.

    Training reads it as it reads the rows themselves (trivium sft --data FOLDER), without doing the work again. It
    belongs to the model's tokenizer, its template and --length.

    Try:
      trivium data prepare rows.jsonl --out prepared/rows
      trivium data prepare 'data/*.jsonl.gz' --model models/smollm2 --length 2048 --max-empty 10 --out prepared/all
      trivium data prepare rows.jsonl --out prepared/rows --dry-run

    Parameters
    ----------
    data
        Files (JSONL, Parquet, text; also compressed), folders or globs.
    out
        The folder to write; one that holds this same data is kept.
    model
        Whose tokenizer and chat template.
    length
        Tokens in a packed row.
    format
        The rows' format, if their columns do not tell.
    turns
        Which assistant turns are trained.
    too_long
        What happens to rows longer than a packed row.
    max_dropped
        How many rows may be dropped; none: any number.
    max_empty
        How many rows may have nothing to learn; none: any number.
    dry_run
        Count, and write nothing.
    json
        Answer as JSON: path (null with --dry-run) and the numbers.
    """
    from ..core.log import log
    from ..data.inspect import inspect as count
    from ..recipes.data import bank, text_side

    named = _named(data)
    _, prompt = text_side(model)
    found = bank(named, prompt, length=length, format=format, turns=turns, too_long=too_long, max_dropped=max_dropped, max_empty=max_empty)
    path = None if dry_run else str(found.save(out))
    if json:
        answer({"path": path, **count(found).to_dict()}, as_json=True)
        return
    log.table("prepared data", ("what", "value"), count(found).table())
    if path is not None:
        answer(path, as_json=False)


def _named(data: tuple[str, ...]) -> tuple[str, ...]:
    if not data:
        raise UsageError("name the data: files, folders or globs")
    return data
