"""Where cached state lives. Mixers declare what they keep; a store keeps it and knows nothing of attention.

`begin` reserves slots for a forward, each layer writes through its handle, `commit` makes the slots count, so a
forward that fails changes nothing. Slots are appended for all rows at once; a slot that a row does not use (padding,
or tokens dropped again) is a hole: its segment is -1. Until a hole or a second document appears, a store is *even*:
slot i holds position i of every row, and no mask needs to be read. Each entry of each layer has its keeper.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core.errors import TriviumError
from .keepers import Cut, FixedKeeper, Keeper, OnceKeeper, Pending, Room, Slots, Slotted, State
from .ring import Memo, Ring
from .strided import Entries, StridedKeeper

K = TypeVar("K", bound=Keeper)


class Handle:
    """One layer's state in one forward. This one keeps nothing: it serves a forward without a cache."""

    wanted = 0  # how many of the last slots' fixed states `write` is to be given

    def extend(self, **new: Tensor) -> list[Tensor]:
        """Append the new tokens' state [B, *, T, D] and return all of it [B, *, S, D], in the order given."""
        return list(new.values())

    def recall(self, memo: Memo, /, **new: Tensor) -> tuple[list[Tensor], Slots | None]:
        """As `extend`, for state that is declared as `Rolling`: what is still there, [B, *, S, D], and where each of it stands;
        None: they are this forward's own. `memo`: the step's, so that layers share the latter."""
        return list(new.values()), None

    def accrue(self, name: str, found: Entries) -> Entries:
        """Append entries that this forward completed, for state that is declared as `Strided`, and return all there are."""
        return found

    def read(self, name: str) -> Tensor | None:
        """A fixed state [B, *shape] as the last forward left it; None where nothing came yet, and it is zero."""
        return None

    def write(self, **states: Tensor) -> None:
        """Fixed states [B, wanted, *shape] after each of the last `wanted` slots; where `wanted` is 0, nothing is kept."""

    def once(self, name: str) -> Tensor | None:
        """What was written under `name` before, None where nothing was."""
        return None

    def write_once(self, **values: Tensor) -> None:
        """Values [B, *] to be read in later forwards."""


class StoreHandle(Handle):
    def __init__(self, keepers: Mapping[str, Keeper], prefix: str, pending: Pending, rollback: int):
        self.keepers, self.prefix, self.pending = keepers, prefix, pending
        self.wanted = min(pending.slots.end - pending.slots.start, rollback + 1)

    def extend(self, **new: Tensor) -> list[Tensor]:
        return [self._keeper(name, Slotted).extend(value, self.pending.slots) for name, value in new.items()]

    def recall(self, memo: Memo, /, **new: Tensor) -> tuple[list[Tensor], Slots | None]:
        rings = {name: self._keeper(name, Ring) for name in new}
        rolled = [rings[name].roll(value, self.pending) for name, value in new.items()]
        return rolled, next(iter(rings.values())).slots(self.pending, memo)

    def accrue(self, name: str, found: Entries) -> Entries:
        return self._keeper(name, StridedKeeper).add(found, self.pending)

    def read(self, name: str) -> Tensor | None:
        return self._keeper(name, FixedKeeper).read()

    def write(self, **states: Tensor) -> None:
        for name, value in states.items():
            self._keeper(name, FixedKeeper).write(value)

    def once(self, name: str) -> Tensor | None:
        return self._keeper(name, OnceKeeper).value

    def write_once(self, **values: Tensor) -> None:
        for name, value in values.items():
            self._keeper(name, OnceKeeper).new = value

    def _keeper(self, name: str, kind: type[K]) -> K:
        keeper = self.keepers[self.prefix + name]
        assert isinstance(keeper, kind), f"{name} is declared as another kind of state"
        return keeper


@dataclass(frozen=True)
class Mark:
    """A point to go back to: see `Store.snapshot`."""

    used: int
    reorders: int
    lengths: tuple[int, ...]
    positions: Tensor | None
    segments: Tensor | None
    memory_segments: Tensor | None
    kept: tuple[Any, ...]


class Store:
    """The contiguous store: `capacity` slots a row, allocated once.

    `states`: by layer, what it declares, by name. `lengths` counts the tokens that each row holds; it lives on the host.
    `rollback`: how many tokens `drop_last` can take from a model that has state of a fixed size, windows among it; others need none.
    `memory_segments` [B, M]: which places of the memory that was attended to in the first forward are padding (-1).
    """

    def __init__(self, states: Sequence[State], *, rows: int, capacity: int, dtype: torch.dtype, device: torch.device, rollback: int = 0):
        self.capacity, self.rollback = capacity, rollback
        self.lengths = [0] * rows
        self.used = 0
        room = Room(rows, capacity, rollback, dtype, device)
        self._keepers = [{name: entry.keeper(room) for name, entry in state.items()} for state in states]
        self.memory_segments: Tensor | None = None
        self._device = device
        self._positions: Tensor | None = None  # [rows, capacity] once the store is uneven
        self._segments: Tensor | None = None
        self._pending: Pending | None = None
        self._reorders = 0

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def even(self) -> bool:
        return self._segments is None

    @property
    def bytes(self) -> int:
        """Bytes allocated for state, bookkeeping aside."""
        return sum(tensor.numel() * tensor.element_size() for keeper in self._all() for tensor in keeper.tensors())

    def tensor(self, layer: int, name: str) -> Tensor:
        """What layer `layer` holds for each token under `name`: [B, *, slots in use, D], holes included."""
        keeper = self._keepers[layer][name]
        assert isinstance(keeper, Slotted)
        return keeper.tensor[..., : self.used, :]

    def _all(self) -> Iterator[Keeper]:
        return (keeper for layer in self._keepers for keeper in layer.values())

    def begin(self, positions: Tensor | None, segments: Tensor | None, rows: int, count: int) -> tuple[Slots, Tensor, Tensor | None]:
        """Reserve `count` slots. Returns the slots, and the new tokens' positions [B|1, T] and segments [B, T] or None."""
        if rows != self.rows:
            raise TriviumError(f"the cache was made for {self.rows} rows, the batch has {rows}")
        start, end = self.used, self.used + count
        if end > self.capacity:
            raise TriviumError(f"the cache holds {self.capacity} tokens a row; {self.used} are used and {count} more were given")
        lengths = [length + count for length in self.lengths]
        if self.even and segments is None and positions is None:
            fresh = torch.arange(start, end, device=self._device)[None]
            slots = Slots(start, end, None, None)
            self._pending = Pending(slots, fresh, None, tuple(self.lengths), tuple(lengths), None)
            return slots, fresh, None
        self._make_uneven()
        assert self._positions is not None and self._segments is not None
        last_segment, next_position = self._ends()
        if segments is None:
            segments = last_segment[:, None].expand(-1, count)
        else:
            lengths = [held + new for held, new in zip(self.lengths, (segments >= 0).sum(1).tolist(), strict=True)]
        if positions is None:
            positions = continued_positions(segments, last_segment, next_position)
        self._positions[:, start:end] = positions
        self._segments[:, start:end] = segments
        slots = Slots(start, end, self._positions[:, :end], self._segments[:, :end])
        self._pending = Pending(slots, positions, segments, tuple(self.lengths), tuple(lengths), last_segment)
        return slots, positions, segments

    def handle(self, layer: int, prefix: str = "") -> Handle:
        return StoreHandle(self._keepers[layer], prefix, self.pending, self.rollback)

    @property
    def pending(self) -> Pending:
        """What the forward that is under way reserved."""
        assert self._pending is not None, "begin() comes first"
        return self._pending

    def commit(self, memory_segments: Tensor | None = None) -> None:
        """The forward succeeded: its slots count. `memory_segments`: those of the memory that it was given, if any."""
        pending = self.pending
        for keeper in self._all():
            keeper.commit(pending)
        self.used, self.lengths = pending.slots.end, list(pending.lengths)
        if memory_segments is not None:
            self.memory_segments = memory_segments
        self._pending = None

    def reorder(self, index: Sequence[int]) -> None:
        """Row i becomes what row `index[i]` was; rows may be repeated or left out."""
        if list(index) == list(range(self.rows)):
            return
        rows = torch.tensor(list(index), dtype=torch.int64, device=self._device)
        for keeper in self._all():
            keeper.reorder(rows)
        if self.memory_segments is not None:
            self.memory_segments = self.memory_segments[rows]
        if not self.even:
            assert self._positions is not None and self._segments is not None
            self._positions, self._segments = self._positions[rows], self._segments[rows]
        self.lengths = [self.lengths[i] for i in index]
        self._reorders += 1

    def drop_last(self, count: int | Sequence[int]) -> None:
        """Forget each row's last `count` tokens (one number, or one a row)."""
        counts = [count] * self.rows if isinstance(count, int) else list(count)
        if len(counts) != self.rows or any(not 0 <= n <= length for n, length in zip(counts, self.lengths, strict=True)):
            raise TriviumError(f"cannot drop {counts} tokens from rows that hold {self.lengths}")
        before, lengths = self.used, [length - n for length, n in zip(self.lengths, counts, strict=True)]
        if self.even and len(set(counts)) == 1:
            segments, used = None, self.used - counts[0]
            first = [used] * self.rows
        else:
            segments = torch.zeros(self.rows, self.capacity, dtype=torch.int64, device=self._device)
            if self._segments is not None:
                segments[:, :before] = self._segments[:, :before]
            first = [before] * self.rows
            for row, n in enumerate(counts):
                held = (segments[row, :before] >= 0).nonzero()[:, 0]
                if n:
                    first[row] = int(held[len(held) - n])
                segments[row, held[len(held) - n :]] = -1
            taken = (segments[:, :before] >= 0).any(0).nonzero()
            used = int(taken[-1]) + 1 if len(taken) else 0
        cut = Cut(tuple(counts), first, before, used, tuple(lengths))
        for keeper in self._all():
            keeper.drop(cut)
        if segments is not None:
            self._make_uneven()
            self._segments = segments
        self.used, self.lengths = used, lengths

    def fork(self) -> Store:
        """An independent copy."""
        other = copy.copy(self)
        other._keepers = [{name: keeper.fork() for name, keeper in layer.items()} for layer in self._keepers]
        other._positions = None if self._positions is None else self._positions.clone()
        other._segments = None if self._segments is None else self._segments.clone()
        other.lengths = list(self.lengths)
        return other

    def snapshot(self) -> Mark:
        """A mark to `restore` later; cheap, since slots past it are only ever written again (fixed states are copied).
        `reorder` voids it."""
        positions, segments = (None if x is None else x[:, : self.used].clone() for x in (self._positions, self._segments))
        kept = tuple(keeper.mark() for keeper in self._all())
        return Mark(self.used, self._reorders, tuple(self.lengths), positions, segments, self.memory_segments, kept)

    def restore(self, mark: Mark) -> None:
        """Go back to a mark: the tokens that came since are forgotten."""
        if mark.reorders != self._reorders or mark.used > self.used:
            raise TriviumError("this snapshot is void: rows were reordered or tokens dropped since it was taken")
        self.used, self.lengths, self.memory_segments = mark.used, list(mark.lengths), mark.memory_segments
        for keeper, kept in zip(self._all(), mark.kept, strict=True):
            keeper.restore(kept)
        self._positions = self._segments = None
        if mark.segments is not None and mark.positions is not None:
            self._make_uneven()
            assert self._positions is not None and self._segments is not None
            self._positions[:, : mark.used], self._segments[:, : mark.used] = mark.positions, mark.segments

    def _make_uneven(self) -> None:
        if self._segments is None:
            self._positions = torch.arange(self.capacity, device=self._device).repeat(self.rows, 1)
            self._segments = torch.zeros(self.rows, self.capacity, dtype=torch.int64, device=self._device)

    def _ends(self) -> tuple[Tensor, Tensor]:
        """Each row's last segment and the position that comes next; 0 and 0 for an empty row."""
        assert self._positions is not None and self._segments is not None
        held = self._segments[:, : self.used] >= 0
        if not self.used:
            zeros = torch.zeros(self.rows, dtype=torch.int64, device=self._device)
            return zeros, zeros
        last = self.used - 1 - held.flip(1).int().argmax(1)  # [B]: the last slot that is no hole
        some = held.any(1)
        segment = self._segments.gather(1, last[:, None])[:, 0]
        position = self._positions.gather(1, last[:, None])[:, 0] + 1
        return torch.where(some, segment, 0), torch.where(some, position, 0)


def continued_positions(segments: Tensor, last_segment: Tensor | None = None, next_position: Tensor | None = None) -> Tensor:
    """Positions [B, T] of tokens with these segments [B, T]: each document counts from 0; a row's first document
    counts on from `next_position` [B] if it is `last_segment` [B]. Padding gets 0."""
    batch, count = segments.shape
    index = torch.arange(count, device=segments.device).expand(batch, count)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = torch.where(starts, index, 0).cummax(1).values  # [B, T]: where each token's run began
    positions = index - first
    if last_segment is not None and next_position is not None:
        # the row's first document: every real token so far is of this run (padding may stand before it)
        real = (segments >= 0).int().cumsum(1)
        continues = (segments == last_segment[:, None]) & (real == positions + 1)
        positions = torch.where(continues, positions + next_position[:, None], positions)
    return torch.where(segments >= 0, positions, 0)
