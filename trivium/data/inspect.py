"""What is in a prepared data set: its numbers, and real rows with the tokens that are trained set apart.

The display is built from the ids and targets that training will see, never from the text that was given.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .bank import Facts, Prepared, Tally
from .likeness import near, shingles

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

OPEN, CLOSE = "⟦", "⟧"  # around trained tokens where there is no color
ALIKE, RUN = 0.8, 5  # rows that share this much of their runs of so many tokens are near duplicates
COMPARED = 20_000  # rows that are compared with each other
TRAINED, CONTEXT, RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class Lengths:
    """Tokens a row."""

    min: int
    median: float
    p95: float
    max: int


@dataclass(frozen=True)
class Inspection:
    """The numbers of a prepared data set. `coverage` and `fill` are shares from 0 to 1."""

    facts: Facts
    rows: int
    tokens: int
    supervised: int
    coverage: float  # supervised tokens of all tokens
    lengths: Lengths
    duplicates: int  # rows whose ids an earlier row has too
    near_duplicates: int  # other rows that share most runs of tokens with an earlier one
    compared: int  # rows among which these were looked for
    length: int
    bins: int
    fill: float  # tokens of the room in all bins
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def table(self) -> list[tuple[str, str]]:
        """(what, how much) in plain words."""
        facts, lengths = self.facts, self.lengths
        expanded = "" if self.rows == facts.examples else f", as {self.rows} rows"
        return [
            ("format", facts.format),
            ("examples", f"{facts.examples}{expanded}, from {_listed([f'{path} ({n})' for path, n in facts.sources.items()])}"),
            ("tokens", f"{self.tokens}, {self.supervised} of them trained ({self.coverage:.1%})"),
            ("tokens a row", f"min {lengths.min}, median {lengths.median:.0f}, 95% {lengths.p95:.0f}, max {lengths.max}"),
            ("bins", f"{self.bins} of {self.length} tokens, {self.fill:.1%} full ({facts.packing})"),
            ("duplicates", str(self.duplicates)),
            *([("near duplicates", f"{self.near_duplicates}, among {self.compared} rows")] if self.compared else []),
            ("nothing to train on", _tally(facts.empty)),
            ("too long, dropped", _tally(facts.dropped)),
            ("too long, cut", _tally(facts.truncated)),
            ("documents split", _tally(facts.split)),
            ("fingerprint", self.fingerprint),
        ]


@dataclass(frozen=True)
class Span:
    """A run of tokens that are all trained, or all not, as text."""

    text: str
    trained: bool


def inspect(prepared: Prepared, *, alike: Sequence[int] = ()) -> Inspection:
    """Count what a prepared data set holds. `alike`: rows among which near duplicates are looked for, the first `COMPARED` at most;
    that costs about a second for each million tokens."""
    lengths = prepared.index["length"]
    hashes = np.fromiter((_hash(prepared.row(row)[0]) for row in range(len(prepared))), np.uint64, len(prepared))
    tokens = len(prepared.tokens)
    compared = list(alike[:COMPARED])
    _, first = np.unique(hashes[compared], return_index=True)
    sets = [shingles(prepared.row(compared[at])[0].astype(np.uint64), RUN) for at in np.sort(first)]
    return Inspection(
        facts=prepared.facts,
        rows=len(prepared),
        tokens=tokens,
        supervised=prepared.supervised,
        coverage=prepared.supervised / tokens,
        lengths=Lengths(int(lengths.min()), float(np.median(lengths)), float(np.percentile(lengths, 95)), int(lengths.max())),
        duplicates=len(prepared) - len(np.unique(hashes)),
        near_duplicates=len(near(sets, threshold=ALIKE)),
        compared=len(compared),
        length=prepared.length,
        bins=len(prepared.bins),
        fill=tokens / (len(prepared.bins) * prepared.length),
        fingerprint=prepared.fingerprint,
    )


def spans(prepared: Prepared, row: int, tokenizer: Tokenizer) -> list[Span]:
    """A row as text, special tokens included; a character belongs to the token that completes it."""
    ids, targets = prepared.row(row)
    stream = tokenizer.stream()
    pieces: list[tuple[str, bool]] = []
    for token, trained in zip(ids.tolist(), targets.tolist(), strict=True):
        pieces.append((tokenizer.token(token) if token in tokenizer.special else stream.push(token), trained))
    pieces.append((stream.finish(), pieces[-1][1]))
    joined: list[Span] = []
    for text, trained in pieces:
        if joined and (joined[-1].trained == trained or not text):
            joined[-1] = Span(joined[-1].text + text, joined[-1].trained)
        else:
            joined.append(Span(text, trained))
    return joined


def paint(row: Sequence[Span], *, color: bool | None = None) -> str:
    """Trained text in bold green and the rest dim, or without color trained text in ⟦ ⟧. None: color on a terminal unless NO_COLOR."""
    if color is None:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if color:
        return "".join(f"{TRAINED if span.trained else CONTEXT}{_printable(span.text)}{RESET}" for span in row)
    return "".join(f"{OPEN}{_printable(span.text)}{CLOSE}" if span.trained else _printable(span.text) for span in row)


def _printable(text: str) -> str:
    """Control characters as escapes: a row of data must not drive the terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text)


def _hash(ids: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")


def _tally(tally: Tally) -> str:
    return f"{tally.count}: {_listed(tally.first, of=tally.count)}" if tally.count else "0"


def _listed(names: Sequence[str], *, of: int | None = None, most: int = 5) -> str:
    rest = (len(names) if of is None else of) - min(len(names), most)
    return ", ".join(names[:most]) + (f" and {rest} more" if rest else "")
