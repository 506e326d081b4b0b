"""Batches by number: batch i is a pure function of (data fingerprints, weights, seed, rows, i).

No state is kept between batches, so a resumed run, another number of processes and a second run see the same rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from math import ceil, prod

import numpy as np
import torch

from ..core.errors import ConfigError
from ..core.log import log
from ..core.seed import derive
from .bank import Prepared
from .batch import Batch
from .order import Mixture, permuted


class Batches:
    """An endless run over one or more data sets, in global batches of `rows` bins.

    `sets` pairs each data set with its weight, an integer share of tokens; each goes through its own epochs, every one a new
    permutation that holds each bin once. Of every global batch this process, `rank` of `world`, sees its slice of the rows.
    """

    def __init__(self, sets: Sequence[tuple[Prepared, int]], *, seed: int, rows: int, rank: int = 0, world: int = 1):
        if not sets:
            raise ConfigError("no data set was given to make batches of")
        if any(weight < 1 for _, weight in sets):
            raise ConfigError(f"weights: {[weight for _, weight in sets]}: a share of tokens is a whole number from 1", field="weights")
        if rows < 1 or rows % world:
            raise ConfigError(f"rows: {rows} rows cannot be shared out evenly to {world} processes", field="rows", value=rows)
        assert 0 <= rank < world
        self.sets = [prepared for prepared, _ in sets]
        self.seed, self.rows, self.rank, self.world = seed, rows, rank, world
        # A set's rate of bins is its weight over its mean tokens per bin, brought to whole numbers.
        tokens = [len(prepared.tokens) for prepared in self.sets]
        self._mixture = Mixture(
            [weight * len(prepared.bins) * prod(tokens[:i] + tokens[i + 1 :]) for i, (prepared, weight) in enumerate(sets)]
        )
        identity = [[[prepared.fingerprint, weight] for prepared, weight in sets], seed, rows]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def bins(self, i: int) -> list[tuple[int, int]]:
        """The (data set, bin) of each row of global batch `i`."""
        return [self._bin(slot) for slot in range(i * self.rows, (i + 1) * self.rows)]

    def batch(self, i: int) -> Batch:
        """This process's rows of global batch `i`, as wide as the longest of them."""
        share = self.rows // self.world
        own = self.bins(i)[self.rank * share : (self.rank + 1) * share]
        return collate([(self.sets[number], bin_) for number, bin_ in own])

    def steps(self, epochs: float) -> int:
        """Batches that hold as many bins as `epochs` passes over every set: exactly that for one set, at its share for several."""
        return max(1, ceil(epochs * sum(len(prepared.bins) for prepared in self.sets) / self.rows))

    def dealt(self, steps: int) -> list[int]:
        """How many bins of each set the first `steps` global batches hold."""
        return self._mixture.turns(steps * self.rows)

    def held(self, number: int, bins: int, *, what: str = "length") -> int:
        """The tokens in the first `bins` bins that are taken of a set, or with `what="supervised"` the targets; exactly."""
        prepared = self.sets[number]
        epochs, rest = divmod(bins, len(prepared.bins))
        column = prepared.index[what]
        last = [int(row) for turn in range(bins - rest, bins) for row in prepared.bins[self._turn(number, turn)]]
        return epochs * int(column.sum(dtype=np.int64)) + int(column[last].sum(dtype=np.int64))

    def _bin(self, slot: int) -> tuple[int, int]:
        number, turn = self._mixture.turn(slot)
        return number, self._turn(number, turn)

    def _turn(self, number: int, turn: int) -> int:
        """The bin of a set's turn."""
        prepared = self.sets[number]
        epoch, position = divmod(turn, len(prepared.bins))
        return permuted(position, len(prepared.bins), key=derive(self.seed, "epoch", prepared.fingerprint, epoch))


def ordered(prepared: Prepared, *, rows: int) -> Iterator[Batch]:
    """Every bin once, in order, `rows` to a batch; the last may hold fewer. For validation."""
    for start in range(0, len(prepared.bins), rows):
        yield collate([(prepared, bin_) for bin_ in range(start, min(start + rows, len(prepared.bins)))])


def by_row(prepared: Prepared, numbers: Callable[[Batch], torch.Tensor], *, rows: int, what: str) -> np.ndarray:
    """A number for each row, [rows] fp32 in the rows' order, where `numbers` gives those of the documents of a batch, [B, D]. `what`
    is being computed, `rows` bins at a time, is shown."""
    found, bin_ = np.zeros(len(prepared), np.float32), 0
    with log.progress(what, len(prepared.bins)) as progress:
        for batch in ordered(prepared, rows=rows):
            made = numbers(batch).float().cpu().numpy()
            for row in made:
                own = prepared.bins[bin_]
                found[own] = row[: len(own)]
                bin_ += 1
            progress.advance(len(made))
    return found


def collate(bins: Sequence[tuple[Prepared, int]]) -> Batch:
    """Bins as a batch, one a row, as wide as the longest."""
    rows = [[prepared.row(int(row)) for row in prepared.bins[bin_]] for prepared, bin_ in bins]
    width = max(sum(len(ids) for ids, _ in documents) for documents in rows)
    tokens = np.zeros((len(rows), width), np.int64)
    segments = np.full((len(rows), width), -1, np.int64)
    targets = np.zeros((len(rows), width), bool)
    for b, documents in enumerate(rows):
        at = 0
        for segment, (ids, predicted) in enumerate(documents):
            span = slice(at, at + len(ids))
            tokens[b, span], segments[b, span], targets[b, span] = ids, segment, predicted
            at += len(ids)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(segments), torch.from_numpy(targets), _values(bins))


def _values(bins: Sequence[tuple[Prepared, int]]) -> dict[str, torch.Tensor]:
    """What the data sets keep of their rows beside tokens, by name, each [B, D]."""
    names = sorted({name for prepared, _ in bins for name in prepared.values})
    found = {name: torch.zeros(len(bins), max(len(prepared.bins[bin_]) for prepared, bin_ in bins)) for name in names}
    for b, (prepared, bin_) in enumerate(bins):
        rows = prepared.bins[bin_]
        for name, value in prepared.values.items():
            found[name][b, : len(rows)] = torch.from_numpy(value[rows])
    return found
