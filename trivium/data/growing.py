"""A token bank while it grows: flat arrays that rows are appended to, and what went wrong with which of them.

No Python object is kept for a token or a row. Who reads rows (`prepare`, `pairs`) fills one of these, has it checked, and closes it.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import ConfigError, DataError
from .bank import INDEX, TALLIES, Facts, Prepared, Tally
from .formats import Format
from .packing import Bins, pack
from .rows import Record

if TYPE_CHECKING:
    from ..text.prompt import Row

PEEKED = 16  # rows that must agree on a format
LISTED = 10  # places that are named for each kind of trouble


def numbered(rows: Iterable[Record | Mapping[str, Any]]) -> Iterator[Record]:
    """Plain mappings as records that know their place."""
    for number, row in enumerate(rows, start=1):
        yield row if isinstance(row, Record) else Record(dict(row), "rows", number)


class _Tallies(dict[str, tuple[int, list[str]]]):
    """Counts by kind of trouble, with the first places."""

    def note(self, kind: str, where: str) -> None:
        count, first = self.get(kind, (0, []))
        self[kind] = (count + 1, first if len(first) == LISTED else [*first, where])

    def tally(self, kind: str) -> Tally:
        count, first = self.get(kind, (0, []))
        return Tally(count, tuple(first))


class Bank:
    """The growing arrays. `limits`: how many rows may be `empty`, `dropped` or the `same` on both sides; None is any number."""

    def __init__(self, length: int, *, truncate: bool, stops: frozenset[int], limits: Mapping[str, int | None]):
        if length < 2:
            raise ConfigError(f"length: {length} leaves no room for a token and the one before it", field="length", value=length)
        self.length, self.truncate, self.stops, self.limits = length, truncate, stops, limits
        self.tokens, self.targets = array("I"), bytearray()
        self.columns = {name: array("q") for name in ("length", "supervised", "source", "line")}
        self.sources: dict[str, int] = {}
        self.numbers: dict[str, int] = {}  # of the sources
        self.examples = 0
        self.tallies = _Tallies()
        assert self.tokens.itemsize == 4

    def add(self, record: Record, rows: list[Row], *, splits: bool) -> None:
        """Take the rows of one example."""
        self.count(record)
        kept = dropped = False
        for row in rows:
            assert len(row.ids) == len(row.targets), "a target for each id"
            ids, targets = row.ids, row.targets
            place = f"{record.where} ({len(ids)} tokens)"
            if len(ids) > self.length and not splits:
                if not self.truncate:
                    dropped = True
                    self.tallies.note("dropped", place)
                    continue
                self.tallies.note("truncated", place)
                ids, targets = ids[: self.length], targets[: self.length]
            if not any(on and token not in self.stops for token, on in itertools.islice(zip(ids, targets, strict=True), 1, None)):
                continue  # counted below, unless another row of the same example does train something
            kept = True
            if len(ids) > self.length:
                self.tallies.note("split", place)
            for start in range(0, len(ids) - 1, self.length - 1):
                self.append(record, ids[start : start + self.length], targets[start : start + self.length])
        if not kept and not dropped:
            self.tallies.note("empty", record.where)

    def count(self, record: Record) -> None:
        """One more example was read."""
        self.examples += 1
        self.sources[record.path] = self.sources.get(record.path, 0) + 1
        self.numbers.setdefault(record.path, len(self.numbers))

    def append(self, record: Record, ids: list[int], targets: list[bool]) -> None:
        """Take one row. The first token of a row has none before it to be predicted from, so it is never a target."""
        self.tokens.extend(ids)
        self.targets.append(0)
        self.targets.extend(targets[1:])
        row = {"length": len(ids), "supervised": sum(targets[1:]), "source": self.numbers[record.path], "line": record.line}
        for name, value in row.items():
            self.columns[name].append(value)

    def check(self, *, kept: int | None = None) -> None:
        """Raise if more went wrong than was allowed, or nothing is left. `kept`: how much is, where rows are yet to be taken."""
        told = {
            "empty": "have no token to train on; mend them, or allow them with --max-empty",
            "dropped": f"are longer than {self.length} tokens; raise the length, cut them, or allow --max-dropped",
            "same": "have the same answer as chosen and as rejected, so nothing can be learned from them; allow --max-same",
        }
        troubles = []
        for kind, trouble in told.items():
            limit, tally = self.limits[kind], self.tallies.tally(kind)
            if limit is not None and tally.count > limit:
                more = ", ..." if tally.count > len(tally.first) else ""
                troubles.append(f"{tally.count} of {self.examples} rows {trouble} {tally.count}: {', '.join(tally.first)}{more}")
        if troubles:
            raise DataError("\n".join(troubles))
        if not (len(self.tokens) if kept is None else kept):
            alike = ", or the same on both sides" if self.tallies.tally("same").count else ""
            raise DataError(f"nothing to train on: all {self.examples} rows were empty or too long{alike}")

    def close(
        self, format: Format, *, prompt: str, packing: str, together: int = 1, values: Mapping[str, np.ndarray] | None = None
    ) -> Prepared:
        """The finished bank. So many rows at a time stay `together`, in one bin that has room for each; `values`: see `Prepared`."""
        index = np.zeros(len(self.columns["length"]), INDEX)
        for name, column in self.columns.items():
            index[name] = np.frombuffer(column, np.int64)
        np.cumsum(index["length"][:-1], out=index["offset"][1:])
        tallies = {kind: self.tallies.tally(kind) for kind in TALLIES}
        facts = Facts(format.name, packing, prompt, self.examples, self.sources, **tallies)
        bits = np.packbits(np.frombuffer(self.targets, np.uint8), bitorder="little")
        bins = pack(index["length"].reshape(-1, together).sum(1), together * self.length, method=packing)
        bins = Bins((bins.rows[:, None] * together + np.arange(together)).ravel(), bins.starts * together)
        tokens = np.frombuffer(self.tokens, np.uint32)
        return Prepared.of(tokens, bits, index, bins, length=together * self.length, facts=facts, values=values)
