"""What a command says while it works: lines, tables and progress, all on stderr, so that stdout carries only answers.

On a terminal progress is a live bar (rich); elsewhere it is a plain line every few seconds. NO_COLOR is respected.
The stream is looked up at each call, so that redirecting `sys.stderr` works.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

PLAIN_SECONDS = 5.0  # between two plain progress lines


class Progress(Protocol):
    """A running job of known length."""

    def advance(self, n: int = 1, **shown: object) -> None:
        """`n` more units are done; `shown` are values to show beside the count, as in `advance(1, loss=0.5)`."""


def layout(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows as aligned plain text under a header; columns whose cells are all numbers are aligned to the right."""
    cells = [[_show(cell) for cell in row] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells)) if cells else len(name) for i, name in enumerate(columns)]
    right = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()

    return "\n".join([line(columns), line(["-" * width for width in widths]), *map(line, cells)])


class Log:
    """Writes to stderr. One instance, `log`, serves the process."""

    def __init__(self) -> None:
        self._hushed = False

    @contextmanager
    def hushed(self) -> Iterator[None]:
        """Inside, only warnings and errors are written: for a job that is one of many."""
        before, self._hushed = self._hushed, True
        try:
            yield
        finally:
            self._hushed = before

    @property
    def color(self) -> bool:
        """Whether what is written here may be colored."""
        return _terminal() and not os.environ.get("NO_COLOR")

    def say(self, text: str) -> None:
        """One line, or several, in plain words."""
        if not self._hushed:
            _write(text)

    def warn(self, text: str) -> None:
        """Something that goes on but that the user should know."""
        _write(_paint(f"warning: {text}", "33"))

    def error(self, text: str) -> None:
        """Why a command failed."""
        _write(_paint(f"error: {text}", "31"))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A titled table; cells are shown with `str`, floats with four significant digits."""
        self.say(f"{_paint(title, '1')}\n{layout(columns, rows)}")

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Progress]:
        """Shows how much of `total` units is done until the block ends."""
        if self._hushed or not _terminal():
            yield _Lines(description, total, silent=self._hushed)
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
        )
        with Bar(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(description, total=total, shown="")

            class Live:
                def advance(self, n: int = 1, **shown: object) -> None:
                    bar.advance(task, n)
                    if shown:
                        bar.update(task, shown=_pairs(shown))

            yield Live()


class _Lines:
    """Progress without a terminal: a line now and then, and one at the end."""

    def __init__(self, description: str, total: int, *, silent: bool):
        self.description, self.total, self.silent = description, total, silent
        self.done, self.start = 0, time.monotonic()
        self.last = self.start

    def advance(self, n: int = 1, **shown: object) -> None:
        self.done += n
        now = time.monotonic()
        if not self.silent and (self.done >= self.total or now - self.last >= PLAIN_SECONDS):
            self.last = now
            tail = f"  {_pairs(shown)}" if shown else ""
            _write(f"{self.description}: {self.done}/{self.total}  {now - self.start:.1f} s{tail}")


def _write(text: str) -> None:
    """To stderr, if anyone still listens: a terminal that went away must not end a long run."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _pairs(shown: dict[str, object]) -> str:
    return "  ".join(f"{name} {_show(value)}" for name, value in shown.items())


def _terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _paint(text: str, code: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if log.color else text


log = Log()
