"""What one forward shares among its layers: positions, segments, who sees whom, tables built once.

Documents are found once per batch, on the host. A backend that can use them computes each document alone (gathered
into groups of like length), so nothing builds a T x T mask from segments.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from .blocked import Blocks, Later, Plan, blocks, later
from .inputs import Aux, Inputs, Prefix
from .inserted import Inserted
from .keepers import Slots
from .store import Handle, continued_positions

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """Documents of like length, to be computed together. `slots` [n, L] indexes tokens of the flattened batch [B*T];
    `lengths` [n]; `ragged`: some document is shorter than L, and its places past the end repeat its last token."""

    slots: Tensor
    lengths: Tensor
    ragged: bool


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch lie. `places` [B*T]: each token's place in the groups' concatenated slots, padding
    at place 0. `padding` [B*T] and `spare` [sum n*L] mark tokens and places that stand for nothing, and `again` those of the
    spare places where a token of the document before stands once more, since this one begins with it."""

    groups: tuple[Group, ...]
    slots: Tensor  # [sum n*L]: all groups' slots in one row
    places: Tensor
    padding: Tensor | None
    spare: Tensor | None
    again: Tensor | None = None


class Reach(Protocol):
    """Which positions are in reach of which, beside causality and documents (see `patterns`); hashable."""

    def whole(self, length: int) -> bool:
        """Whether everything within the first `length` positions is in reach of everything there."""
        ...

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Bool, of positions `queries` [..., T, 1] and `keys` [..., 1, S]."""
        ...

    def plan(self, length: int, *, causal: bool, start: int = 0, keys: int | None = None) -> Plan | None:
        """Which blocks of the first `length` positions must be computed for queries from `start` on, which are given `keys` of
        them; None where that would not halve the work."""
        ...


@dataclass(frozen=True)
class View:
    """Which keys each query may see, as one attention kind sees it. Queries and keys are those of this forward's step, or
    keys are in other `slots`. `causal`: keys of later positions are hidden. `reach`: what else hides keys; None: nothing.
    """

    step: Step
    causal: bool
    reach: Reach | None
    slots: Slots

    @property
    def even(self) -> bool:
        """Positions simply count on, in one document a row, without padding."""
        return self.slots.positions is None and self.slots.segments is None

    @property
    def bounded(self) -> Reach | None:
        """The reach, if this step is long enough for it to hide anything."""
        if self.reach is None or (self.even and self.reach.whole(self.slots.end)):
            return None
        return self.reach

    @property
    def plain(self) -> bool:
        """Every query sees every key: no mask at all."""
        return self.even and self.bounded is None and (not self.causal or self.step.count == 1) and self.prefix is None

    @property
    def triangle(self) -> bool:
        """Queries and keys are the same tokens, one document a row: the plain causal triangle."""
        return self.even and self.bounded is None and self.causal and self.slots.start == 0 and self.prefix is None

    @property
    def prefix(self) -> Tensor | None:
        """[B]: how many tokens of each document see one another although later ones are hidden."""
        mask = self.step.inputs.mask
        return mask.lengths if self.causal and isinstance(mask, Prefix) else None

    @property
    def documents(self) -> Documents | None:
        """The documents, where this step has any, holds nothing from before and hides nothing inside them but the future and what
        is out of reach, which is known of a document alone where its positions count from 0."""
        step = self.step
        if step.segments is None or self.slots.start or self.prefix is not None:
            return None
        return step.documents if self.reach is None or step.inputs.positions is None else None

    def hides(self, length: int) -> Reach | None:
        """The reach, if it hides anything within the first `length` positions."""
        return None if self.reach is None or self.reach.whole(length) else self.reach

    def plan(self, length: int) -> Plan | None:
        """Which blocks must be computed of a document, or an even row, of this length that starts here; None: all of it."""
        return None if self.hides(length) is None or self.reach is None else self.reach.plan(length, causal=self.causal)

    @property
    def row_plan(self) -> Plan | None:
        """The plan of whole rows, where they hold one document each, without padding."""
        slots = self.slots
        if self.reach is None or self.prefix is not None or slots.segments is not None or self.step.inputs.positions is not None:
            return None
        if slots.start == 0:
            return self.plan(slots.end)
        if self.hides(slots.end) is None or self.step.count == 1:
            return None
        return self.reach.plan(slots.end, causal=self.causal, start=slots.start, keys=self.key_positions.shape[1])

    def blocks(self, plan: Plan) -> Blocks:
        """The indices and masks of a plan of this view's, once per forward."""
        assert self.reach is not None
        build = partial(blocks, plan, self.reach, causal=self.causal, device=self.step.positions.device)
        return self.step.memo(("blocks", self.reach, self.causal, plan.length), build)

    def later_blocks(self, plan: Plan) -> Later:
        """As `blocks`, of a plan for queries that come after some of their keys."""
        assert self.reach is not None
        build = partial(later, plan, self.reach, causal=self.causal, keys=self.key_positions[0])
        return self.step.memo(("later", self.reach, self.causal, id(self.slots)), lambda: (self.slots, build()))[1]

    @property
    def pairs(self) -> int:
        """How many query-key products of one head this view takes, those that are masked or stand for padding included."""
        if self.documents is not None:
            return sum(rows * _pairs(self.plan(length), length) for rows, length in (group.slots.shape for group in self.documents.groups))
        batch, count = self.step.inputs.shape
        if self.row_plan is not None:
            return batch * self.row_plan.pairs
        return batch * count * (self.slots.end if self.slots.positions is None else self.slots.positions.shape[1])

    @property
    def key_positions(self) -> Tensor:
        """[B|1, S]."""
        if self.slots.positions is not None:
            return self.slots.positions
        if self.slots.start == 0:
            return self.step.positions
        return self.step.memo(
            ("key_positions", self.slots.end), lambda: torch.arange(self.slots.end, device=self.step.positions.device)[None]
        )

    def mask(self) -> Tensor | None:
        """[B|1, 1, T, S] bool, true where a query may see a key; None where everything is seen. The naive statement."""
        if self.plain:
            return None
        # the memo holds the slots too, so that their id stays theirs
        key = ("mask", self.causal, self.bounded, id(self.slots))
        return self.step.memo(key, lambda: (self.slots, self.tile(slice(None), slice(None))))[1]

    def rows(self, start: int, end: int) -> Tensor:
        """[B|1, end - start, S] bool: `mask` for these queries alone, for what must not hold the whole."""
        return self.tile(slice(start, end), slice(None))[:, 0]

    def tile(self, queries: slice, keys: slice) -> Tensor:
        """The part [B|1, 1, t, s] of `mask` that lies at these queries and keys; nothing larger is built."""
        within, names, forks = self.prefix, self._names, self.step.inputs.forks
        mine, theirs = self.step.positions[:, queries, None], self.key_positions[:, None, keys]
        seen = self._sees(
            mine,
            theirs,
            None if within is None else within[:, None, None],
            None if names is None else (names[0][:, queries, None], names[1][:, None, keys]),
            None if forks is None else forks[:, queries, None],
        )
        return seen.expand(-1, mine.shape[1], theirs.shape[2])[:, None]

    def at(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether query number `query` of `row` may see key number `key`: index tensors that broadcast."""
        within, names, forks = self.prefix, self._names, self.step.inputs.forks
        return self._sees(
            pick(self.step.positions, row, query),
            pick(self.key_positions, row, key),
            None if within is None else within[row],
            None if names is None else (pick(names[0], row, query), pick(names[1], row, key)),
            None if forks is None else pick(forks, row, query),
        )

    @property
    def _names(self) -> tuple[Tensor, Tensor] | None:
        """The segments of queries [B, T] and of keys [B, S], if there are any."""
        if self.step.segments is None:
            return None
        assert self.slots.segments is not None
        return self.step.segments, self.slots.segments

    def _sees(
        self, queries: Tensor, keys: Tensor, within: Tensor | None, segments: tuple[Tensor, Tensor] | None, forks: Tensor | None
    ) -> Tensor:
        """Of positions, prefixes' lengths, (queries', keys') segments and queries' forks that broadcast."""
        seen = torch.ones((1,) * queries.dim(), dtype=torch.bool, device=queries.device)
        if self.causal:
            seen = seen & (keys <= queries)
            if within is not None:
                seen = seen | ((queries < within) & (keys < within))
        if self.bounded is not None:
            seen = seen & self.bounded.sees(queries, keys)
        if segments is not None:
            mine, theirs = segments
            own = mine == theirs
            if forks is not None:
                own = own | ((theirs == mine - 1) & (keys < forks))
            seen = seen & own & (mine >= 0)
        return seen


@dataclass
class Step:
    """One forward. `positions` [B|1, T]; `segments` [B, T] or None; `adapters` [B] or None; `slots`: the keys.
    `wants_weights`: attention is to record its weights in `aux`. `virtual`: tokens that an adapter put in.
    `hand` and `handed` are how a layer gives a later one what it computed, under a key that names the layer, so that a layer
    that is computed again gives the same."""

    positions: Tensor
    segments: Tensor | None
    slots: Slots
    adapters: Tensor | None
    inputs: Inputs
    causal: bool
    aux: Aux = field(default_factory=Aux)
    wants_weights: bool = False
    virtual: Inserted | None = None
    _channel: dict[Hashable, Any] = field(default_factory=dict)
    _memo: dict[Hashable, Any] = field(default_factory=dict)

    @staticmethod
    def begin(inputs: Inputs, *, causal: bool, weights: bool = False) -> Step:
        """Settle positions and segments, and reserve slots in the cache if there is one."""
        batch, count = inputs.shape
        positions, segments = inputs.positions, inputs.segments
        if inputs.cache is not None:
            slots, positions, segments = inputs.cache.begin(positions, segments, batch, count)
        else:
            slots = Slots(0, count, positions, segments)
            if positions is None and segments is None:
                positions = torch.arange(count, device=inputs.device)[None]
            elif positions is None:
                assert segments is not None
                positions = continued_positions(segments)
                if inputs.forks is not None:
                    positions = positions + inputs.forks
        return Step(positions, segments, slots, inputs.adapters, inputs, causal and inputs.mask != "full", wants_weights=weights)

    def outer(self) -> Step:
        """This step as what stands behind the layers sees it: without the virtual tokens that an adapter put in."""
        if (virtual := self.virtual) is None:
            return self
        segments = None if self.segments is None else virtual.outer(self.segments)
        return replace(self, positions=virtual.outer(self.positions), segments=segments, inputs=virtual.given, virtual=None, _memo={})

    @property
    def count(self) -> int:
        return self.inputs.shape[1]

    @property
    def even(self) -> bool:
        """Positions simply count on, in one document a row, without padding."""
        return self.slots.positions is None and self.slots.segments is None

    @property
    def memory_segments(self) -> Tensor | None:
        """[B, M]: -1 where what cross-attention reads is padding; None: nowhere."""
        if self.inputs.memory is None and self.inputs.cache is not None:
            return self.inputs.cache.memory_segments
        return self.inputs.memory_segments

    @property
    def documents(self) -> Documents:
        assert self.segments is not None
        device = self.positions.device
        return self.memo("documents", lambda: find_documents(self.runs, *self.inputs.shape, device=device, before=self.before))

    @property
    def runs(self) -> np.ndarray:
        """[documents, 2]: each document's first token in the flattened batch, and its length. Read on the host, once."""
        assert self.segments is not None
        segments = self.segments
        return self.memo("runs", lambda: find_runs(segments.cpu().numpy()))

    @property
    def before(self) -> np.ndarray | None:
        """[documents, 2]: the run that each document begins with, in the one before it; None: nowhere."""
        forks, segments = self.inputs.forks, self.segments
        if forks is None or segments is None:
            return None
        return self.memo("before", lambda: find_forks(self.runs, segments.cpu().numpy(), forks.cpu().numpy()))

    @property
    def longest(self) -> int:
        lengths = self.runs[:, 1] if self.before is None else self.runs[:, 1] + self.before[:, 1]
        return int(lengths.max(initial=0))

    @property
    def adapter_rows(self) -> list[tuple[int, Tensor]]:
        """For each adapter that the batch uses, its number and its rows; rows of the base alone (-1) are in none."""
        assert self.adapters is not None
        adapters = self.adapters
        return self.memo("adapters", lambda: [(i, (adapters == i).nonzero()[:, 0]) for i in adapters.unique().tolist() if i >= 0])

    def view(self, reach: Reach | None = None, *, causal: bool | None = None, slots: Slots | None = None) -> View:
        """What one attention kind sees; by default by the model's causality, over the step's own keys."""
        return View(self, self.causal if causal is None else causal, reach, self.slots if slots is None else slots)

    def hand(self, key: Hashable, value: Any) -> None:
        self._channel[key] = value

    def handed(self, key: Hashable) -> Any:
        return self._channel[key]

    def handle(self, layer: int, *, prefix: str = "") -> Handle:
        """What a layer's mixer keeps its state through; `prefix` stands before the names of its entries."""
        return self.inputs.cache.handle(layer, prefix) if self.inputs.cache is not None else Handle()

    def commit(self) -> None:
        if self.inputs.cache is not None:
            self.inputs.cache.commit(self.inputs.memory_segments)

    def memo(self, key: Hashable, build: Callable[[], T]) -> T:
        """`build()`, once per forward and key."""
        if key not in self._memo:
            self._memo[key] = build()
        return self._memo[key]


def _pairs(plan: Plan | None, length: int) -> int:
    return length**2 if plan is None else plan.pairs


def pick(x: Tensor, row: Tensor, place: Tensor) -> Tensor:
    """What stands in `x` [B|1, T] at these places."""
    return x[row, place] if len(x) > 1 else x[0, place]


def find_runs(segments: np.ndarray) -> np.ndarray:
    """[B, T] segments -> [documents, 2] int64 (first token in the flattened batch, length). A document is one run."""
    batch, count = segments.shape
    edges = np.ones((batch, count), dtype=bool)
    edges[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = np.flatnonzero(edges.ravel())
    lengths = np.diff(starts, append=batch * count)
    names = segments.ravel()[starts]
    real = names >= 0
    keys = np.stack([starts // count, names], 1)[real]
    if len(np.unique(keys, axis=0)) != len(keys):
        raise ValueError("a document of a batch must be one run of its row: a segment number stands in two places of one row")
    return np.stack([starts, lengths], 1)[real]


def find_forks(runs: np.ndarray, segments: np.ndarray, forks: np.ndarray) -> np.ndarray:
    """Where in the flattened batch what each document begins with lies, [documents, 2] (first token, length), of segments and
    forks [B, T]."""
    counts, names, row = forks.ravel()[runs[:, 0]], segments.ravel()[runs[:, 0]], runs[:, 0] // forks.shape[1]
    there = (row == np.roll(row, 1)) & (names == np.roll(names, 1) + 1) & (np.roll(counts, 1) == 0) & (counts <= np.roll(runs[:, 1], 1))
    there[:1] = False
    if (counts < 0).any() or (counts[~there] > 0).any():
        raise ValueError("forks: a document can begin with tokens of the one before it, numbered one less, that forks from none itself")
    return np.stack([np.roll(runs[:, 0], 1), counts], 1)


def find_documents(
    runs: np.ndarray, batch: int, count: int, *, device: torch.device, before: np.ndarray | None = None, waste: float = 0.15
) -> Documents:
    """Group runs by like length: a group is closed when more than `waste` of its places would stand for nothing. `before`: the
    runs that they begin with."""
    before = np.zeros_like(runs) if before is None else before
    whole = runs[:, 1] + before[:, 1]
    order = np.argsort(-whole, kind="stable")
    groups: list[list[int]] = []
    for run in order:
        if groups:
            longest = whole[groups[-1][0]]
            total = sum(whole[i] for i in groups[-1]) + whole[run]
            if longest * (len(groups[-1]) + 1) * (1 - waste) <= total:
                groups[-1].append(run)
                continue
        groups.append([run])
    built, all_slots, spare, again, base = [], [], [], [], 0
    places = np.zeros(batch * count, dtype=np.int64)
    padding = np.ones(batch * count, dtype=bool)
    for members in groups:
        starts, first, shared, lengths = (x[:, None] for x in (runs[members, 0], *before[members].T, whole[members]))
        steps = np.arange(int(lengths.max()))[None]
        ahead = steps < shared
        slots = np.where(ahead, first + steps, starts + np.minimum(steps, lengths - 1) - shared)
        real = steps < lengths
        own = real & ~ahead
        places[slots[own]] = base + np.flatnonzero(own.ravel())
        padding[slots[own]] = False
        base += slots.size
        built.append(Group(torch.from_numpy(slots).to(device), torch.from_numpy(lengths[:, 0].copy()).to(device), bool((~real).any())))
        all_slots.append(slots.ravel())
        spare.append(~own.ravel())
        again.append(ahead.ravel())
    none = np.zeros(0, dtype=np.int64)
    flat_spare, flat_again = (np.concatenate(part) if part else np.zeros(0, dtype=bool) for part in (spare, again))
    return Documents(
        groups=tuple(built),
        slots=torch.from_numpy(np.concatenate(all_slots) if all_slots else none).to(device),
        places=torch.from_numpy(places).to(device),
        padding=torch.from_numpy(np.flatnonzero(padding)).to(device) if padding.any() else None,
        spare=torch.from_numpy(np.flatnonzero(flat_spare)).to(device) if flat_spare.any() else None,
        again=torch.from_numpy(np.flatnonzero(flat_again)).to(device) if flat_again.any() else None,
    )
