"""`trivium data inspect`, `prepare`, `convert`, `curate`, `decontaminate` and `synthesize`."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from .options import Configs, Flags, UsageError, answer, resolve, separate

Files = Annotated[str, Parameter(name="DATA")]
Rows = Annotated[str, Parameter(name="DATA", allow_leading_hyphen=True)]  # as *data: with options of a spec among them


def inspect(
    *data: Files, model: str = "smollm2", rows: int = 3, length: int = 1024, format: str | None = None,
    turns: Literal["all", "last"] = "all", too_long: Literal["drop", "truncate"] = "drop", json: bool = False,
) -> None:  # fmt: skip
    """Shows what rows become for a model: their format, tokens, duplicates, what is empty or too long, and real rows.

    Pairs are shown side after side. What is trained is green (between ⟦ ⟧ where there is no color), special tokens included: it is read off the very
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
    too_long
        What happens to rows longer than a packed row; how many there are is counted either way.
    json
        Answer as JSON: the numbers, and rows as lists of [text, trained].
    """
    from ..data.inspect import inspect as count
    from ..data.inspect import paint, spans
    from ..recipes.data import text_side
    from ..recipes.rewrite import seen

    named = _named(data)
    tokenizer, prompt = text_side(model)
    found, together = seen(named, prompt, length=length, format=format, turns=turns, too_long=too_long)
    counted = count(found, alike=range(0, len(found), together))
    shown = [spans(found, row, tokenizer) for row in range(min(rows, len(found)))]
    if json:
        answer({**counted.to_dict(), "shown": [[[span.text, span.trained] for span in row] for row in shown]}, as_json=True)
        return
    answer([{"what": what, "value": value} for what, value in counted.table()], as_json=False)
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


def convert(
    *data: Files, out: Path, to: str, format: str | None = None, sides: Literal["messages", "strings"] | None = None,
    drop: tuple[str, ...] = (), overwrite: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Writes rows in another format: messages, prompt-completion, alpaca, sharegpt, preference, labeled, prompt or text.

    Each new row is read back, and must say the same: turns, tools, loss flags. What the other format has no place for is an error
    that names it; nothing is dropped but what --drop names. Prints where the rows are.

    Try:
      trivium data convert rows.jsonl --to sharegpt --out sharegpt.jsonl
      trivium data convert pairs.parquet --to preference --drop score --out pairs.jsonl
      trivium data convert strings.jsonl --to messages --sides messages --out rows.jsonl

    Parameters
    ----------
    data
        Files (JSONL, Parquet, text; also compressed), folders or globs.
    out
        The file to write, a .jsonl.
    to
        The format of the new rows.
    format
        The rows' format, if their columns do not tell.
    sides
        What prompts and answers become: turns, which a chat template renders, or plain strings, which none does.
    drop
        A column to leave out; may be given more than once.
    overwrite
        Replace what is there.
    json
        Answer as JSON: path, rows.
    """
    from ..core.log import log
    from ..recipes.rewrite import convert as run

    count = run(_named(data), out, to=to, format=format, sides=sides, drop=drop, overwrite=overwrite)
    log.say(f"{count} rows")
    answer({"path": str(out), "rows": count} if json else str(out), as_json=json)


def curate(
    *data: Rows, config: Configs = (), overwrite: bool = False, dry_run: bool = False, json: bool = False
) -> None:  # fmt: skip
    """Keeps the good rows: takes out duplicates, rows of the wrong length, rows that score low, rows that are like others.

    The steps run in the order given; each is a part with fields of its own: exact, near, length, best (by a scorer: features,
    ifd, gain, likelihood, blend), diverse. What went lies beside the result with the reason, and so does a report.

    Try:
      trivium data curate rows.jsonl --out kept.jsonl
      trivium data curate rows.jsonl --steps "[exact, {kind: length, max: 512}, {kind: best, by: ifd, count: 1000}]" --out kept.jsonl
      trivium data curate rows.jsonl --steps "[near, {kind: diverse, count: 500}]" --encoder models/minilm --dry-run

    Parameters
    ----------
    data
        Files (JSONL, Parquet, text; also compressed), folders or globs.
    config
        YAML or JSON with the fields below; given more than once, later ones win, and options come last.
    overwrite
        Replace what is there.
    dry_run
        Show what each step would take out, and write nothing.
    json
        Answer as JSON: path (null with --dry-run) and the report.
    """
    from ..core.log import log
    from ..recipes.curate import Curate
    from ..recipes.curate import curate as run

    named, flags = separate(data)
    job = resolve(Curate, config, [*_list("data", named), *flags], aliases={}, command=curate)
    found = run(job, overwrite=overwrite, write=not dry_run)
    if json:
        answer({"path": None if dry_run else job.out, **found.report}, as_json=True)
        return
    table = found.table()
    log.table("curated", list(table[0]), [list(row.values()) for row in table])
    log.say(f"{found.report['kept']} of {found.report['rows']} rows stay")
    if not dry_run:
        answer(job.out, as_json=False)


def decontaminate(
    *data: Files, against: tuple[str, ...], out: Path | None = None, words: int = 13, least: int = 4, common: int = 10,
    overwrite: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Takes out training rows that hold what a model is asked later: a run of words, or a whole text, of an evaluation.

    Every string of a row is looked at. What went lies beside the result with the words that it shares. Without --out, only the
    report is shown. Paraphrases are not found.

    Try:
      trivium data decontaminate train.jsonl --against test.jsonl
      trivium data decontaminate 'data/*.jsonl' --against test.jsonl --against other.jsonl --words 8 --out clean.jsonl

    Parameters
    ----------
    data
        The training rows: files (JSONL, Parquet, text; also compressed), folders or globs.
    against
        Files of an evaluation; may be given more than once.
    out
        The file to write, a .jsonl.
    words
        Words of a run that is taken as proof.
    least
        Texts of fewer words are not looked for; those of fewer than --words are found only as a whole.
    common
        Runs in more rows of the evaluation than these are its boilerplate, and prove nothing.
    overwrite
        Replace what is there.
    json
        Answer as JSON: path (null without --out) and the report.
    """
    from ..core.log import log
    from ..recipes.rewrite import decontaminate as run

    found = run(_named(data), against, out, size=words, least=least, common=common, overwrite=overwrite)
    if json:
        answer({"path": None if out is None else str(out), **found.report}, as_json=True)
        return
    shown = [(what, str(value)) for what, value in found.report.items() if what not in ("examples", "boilerplate left out")]
    log.table("decontaminated", ("what", "value"), shown)
    for hit in found.report["examples"]:
        log.say(f"{hit['where']}: {hit['why']}")
    answer(f"{found.report['contaminated']} of {found.report['rows']} rows" if out is None else str(out), as_json=False)


def synthesize(*flags: Flags, config: Configs = (), overwrite: bool = False, json: bool = False) -> None:
    """Lets a model write instructions and answers, judges them, and keeps those that stand, as rows of messages.

    With --method magpie the model speaks as the user, from its own template's beginning of a user's turn, and then answers. With
    --method from_text it writes a question about a passage of --data, and the answer. Every row holds where it came from: model,
    seed, sampling. How many drafts parsed and what became of the others is told.

    Try:
      trivium data synthesize --model smollm2 --count 20 --out synthetic.jsonl
      trivium data synthesize --model smollm2 --method from_text --data book.txt --count 50 --sampling.max_tokens 200
      trivium data synthesize --model smollm2 --steps "[exact, near, {kind: best, by: features, share: 0.5}]"

    Parameters
    ----------
    config
        YAML or JSON with the fields below; given more than once, later ones win, and options come last.
    overwrite
        Replace what is there.
    json
        Answer as JSON: path and the report.
    """
    from ..core.log import log
    from ..recipes.synthesize import ALIASES, Synthesize
    from ..recipes.synthesize import synthesize as run

    job = resolve(Synthesize, config, flags, aliases=ALIASES, command=synthesize)
    made = run(job, overwrite=overwrite)
    if json:
        answer({"path": job.out, **made.report}, as_json=True)
        return
    told = ("asked", "parsed", "parsed share", "accepted", "troubles", "kept")
    log.table("synthesized", ("what", "value"), [(what, str(made.report[what])) for what in told])
    answer(job.out, as_json=False)


def _list(name: str, values: list[str]) -> list[str]:
    """A flag of several values, as the spec reads it; none where there are none."""
    return [f"--{name}", dumps(values)] if values else []


def _named(data: tuple[str, ...]) -> tuple[str, ...]:
    if not data:
        raise UsageError("name the data: files, folders or globs")
    return data
