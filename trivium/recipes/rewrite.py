"""Rows into other rows, in files: another format, or without what an evaluation asks; and what `data inspect` looks at.

A file is there whole or not at all, and what was taken out lies beside it with the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ..core.errors import DataError
from ..data import rows
from ..data.bank import META, Prepared
from ..data.decontaminate import COMMON, LEAST, WORDS, Clean
from ..data.decontaminate import decontaminate as clean
from ..data.growing import PEEKED
from ..data.prepare import Feeds
from ..data.reshape import Sides, reshape, told
from ..io import files
from ..text.prompt import Prompt
from .data import bank


def seen(
    data: Sequence[str | Path],
    prompt: Prompt,
    *,
    length: int,
    format: str | None = None,
    turns: Literal["all", "last"] = "all",
    too_long: Literal["drop", "truncate"] = "drop",
) -> tuple[Prepared, int]:
    """What `data inspect` looks at: the token bank of rows of any format that something is trained on, however much of it is empty or
    too long; and how many rows of tokens stand together: 2 for pairs and for judged answers, 1 for others."""
    if len(data) == 1 and (Path(data[0]) / META).is_file():
        found = bank(data, prompt, length=length)
        return found, 1
    kind = told([*islice(rows.read(data), PEEKED)], format).name
    feeds: Feeds = "preference" if kind == "preference" else "labels" if kind == "labeled" else "tokens"
    found = bank(
        data,
        prompt,
        length=length,
        feeds=feeds,
        format=format,
        turns=turns,
        too_long=too_long,
        max_dropped=None,
        max_empty=None,
        max_same=None,
    )
    return found, 1 if feeds == "tokens" else 2


@dataclass(frozen=True)
class Place:
    """Where rows go: `out`, a .jsonl; what was taken out, `removed`; and the numbers, `report`. `out` is written last."""

    out: Path

    @classmethod
    def of(cls, out: str | Path, data: Sequence[str | Path] = (), *, overwrite: bool = False) -> Place:
        """Raises `DataError` before the work for a place that is taken, that is one of the inputs, or that is no .jsonl."""
        out = Path(out)
        if out.suffix != ".jsonl":
            raise DataError(f"{out}: rows are written as JSON lines; name a file that ends in .jsonl", field="out", value=str(out))
        if data and out.resolve() in {path.resolve() for path in rows.files(data)}:
            raise DataError(f"{out}: is one of the files that are read; name another one", field="out", value=str(out))
        if out.exists() and not (overwrite and out.is_file()):
            raise DataError(f"{out}: is already there; name another file, or say --overwrite", field="out", value=str(out))
        return cls(out)

    @property
    def removed(self) -> Path:
        return self.out.with_suffix(".removed.jsonl")

    @property
    def report(self) -> Path:
        return self.out.with_suffix(".report.json")

    def write(self, kept: Iterable[Mapping[str, Any]], removed: Iterable[Mapping[str, Any]], report: Mapping[str, Any]) -> Path:
        """All three, each whole or not at all. A row that JSON cannot say is a `DataError`."""
        try:
            self.write_aside(removed, report)
            return files.write_lines(self.out, kept)
        except TypeError as error:
            raise DataError(f"{self.out}: a row holds what JSON cannot say ({error}); leave that column out first") from None

    def write_aside(self, removed: Iterable[Mapping[str, Any]], report: Mapping[str, Any]) -> None:
        """What was taken out and the numbers, without the rows."""
        files.write_lines(self.removed, removed)
        files.write_json(self.report, dict(report))


def convert(
    data: Sequence[str | Path],
    out: str | Path,
    *,
    to: str,
    format: str | None = None,
    sides: Sides | None = None,
    drop: Collection[str] = (),
    overwrite: bool = False,
) -> int:
    """Write the rows of files, folders or globs to `out` in the format `to` (see `data.reshape`); how many there were.

    Raises `DataError` at the first row that cannot be said in that format; then nothing is written.
    """
    place = Place.of(out, data, overwrite=overwrite)
    count = 0

    def counted(made: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        nonlocal count
        for row in made:
            count += 1
            yield row

    files.write_lines(place.out, counted(reshape(rows.read(data), to, format=format, sides=sides, drop=drop)))
    return count


def decontaminate(
    data: Sequence[str | Path],
    against: Sequence[str | Path],
    out: str | Path | None,
    *,
    size: int = WORDS,
    least: int = LEAST,
    common: int = COMMON,
    overwrite: bool = False,
) -> Clean:
    """Write the rows of `data` that hold nothing of `against` to `out`, the others beside it (see `data.decontaminate`); with `out`
    None, write nothing."""
    place = None if out is None else Place.of(out, [*data, *against], overwrite=overwrite)
    found = clean(rows.read(data), rows.read(against), size=size, least=least, common=common)
    if place is not None:
        place.write((record.value for record in found.kept), (hit.to_dict() for hit in found.hits), found.report)
    return found
