"""Where cached state lives. Mixers declare what they keep; a store keeps it and knows nothing of attention.

`begin` reserves slots for a forward, each layer writes through its handle, `commit` makes the slots count, so a
forward that fails changes nothing. Slots are appended for all rows at once; a slot that a row does not use (padding,
or tokens dropped again) is a hole: its segment is -1. Until a hole or a second document appears, a store is *even*:
slot i holds position i of every row, and no mask needs to be read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import TriviumError


@dataclass(frozen=True)
class PerToken:
    """State of one token in one row: a tensor of `shape`; kept as [B, *shape[:-1], slots, shape[-1]]."""

    shape: tuple[int, ...]


State = Mapping[str, PerToken]


class Handle:
    """One layer's state in one forward. This one keeps nothing: it serves a forward without a cache."""

    def extend(self, **new: Tensor) -> list[Tensor]:
        """Append the new tokens' state [B, *, T, D] and return all of it [B, *, S, D], in the order given."""
        return list(new.values())


class StoreHandle(Handle):
    def __init__(self, tensors: dict[str, Tensor], start: int, end: int):
        self.tensors, self.start, self.end = tensors, start, end

    def extend(self, **new: Tensor) -> list[Tensor]:
        for name, value in new.items():
            self.tensors[name][..., self.start : self.end, :] = value
        return [self.tensors[name][..., : self.end, :] for name in new]


@dataclass
class Slots:
    """The keys that one forward sees: how many slots, and for an uneven store each one's position and segment."""

    start: int
    end: int
    positions: Tensor | None  # [B, S]; None: slot i is position i
    segments: Tensor | None  # [B, S]; None: one document and no holes


@dataclass(frozen=True)
class Mark:
    """A point to go back to: see `Store.snapshot`."""

    used: int
    reorders: int
    lengths: tuple[int, ...]
    positions: Tensor | None
    segments: Tensor | None


class Store:
    """The contiguous store: one tensor per layer and entry, `capacity` slots a row, allocated once.

    `lengths` counts the tokens that each row holds; it lives on the host.
    """

    def __init__(self, states: Sequence[State], *, rows: int, capacity: int, dtype: torch.dtype, device: torch.device):
        self.capacity = capacity
        self.lengths = [0] * rows
        self.used = 0
        self._tensors = [
            {
                name: torch.zeros(rows, *entry.shape[:-1], capacity, entry.shape[-1], dtype=dtype, device=device)
                for name, entry in state.items()
            }
            for state in states
        ]
        self._device = device
        self._positions: Tensor | None = None  # [rows, capacity] once the store is uneven
        self._segments: Tensor | None = None
        self._pending: tuple[Slots, list[int]] | None = None
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
        return sum(tensor.numel() * tensor.element_size() for layer in self._tensors for tensor in layer.values())

    def tensor(self, layer: int, name: str) -> Tensor:
        """What layer `layer` holds under `name`: [B, *, slots in use, D], holes included."""
        return self._tensors[layer][name][..., : self.used, :]

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
            self._pending = (Slots(start, end, None, None), lengths)
            return self._pending[0], fresh, None
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
        self._pending = (Slots(start, end, self._positions[:, :end], self._segments[:, :end]), lengths)
        return self._pending[0], positions, segments

    def handle(self, layer: int) -> Handle:
        assert self._pending is not None, "begin() comes first"
        slots = self._pending[0]
        return StoreHandle(self._tensors[layer], slots.start, slots.end)

    def commit(self) -> None:
        assert self._pending is not None
        slots, self.lengths = self._pending
        self.used = slots.end
        self._pending = None

    def reorder(self, index: Sequence[int]) -> None:
        """Row i becomes what row `index[i]` was; rows may be repeated or left out."""
        if list(index) == list(range(self.rows)):
            return
        rows = torch.tensor(list(index), dtype=torch.int64, device=self._device)
        for layer in self._tensors:
            for name, tensor in layer.items():
                layer[name] = tensor.index_select(0, rows)
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
        if self.even and len(set(counts)) == 1:
            self.used -= counts[0]
        else:
            self._make_uneven()
            assert self._segments is not None
            for row, n in enumerate(counts):
                held = (self._segments[row, : self.used] >= 0).nonzero()[:, 0]
                self._segments[row, held[len(held) - n :]] = -1
            taken = (self._segments[:, : self.used] >= 0).any(0).nonzero()
            self.used = int(taken[-1]) + 1 if len(taken) else 0
        self.lengths = [length - n for length, n in zip(self.lengths, counts, strict=True)]

    def fork(self) -> Store:
        """An independent copy."""
        other = copy.copy(self)
        other._tensors = [{name: tensor.clone() for name, tensor in layer.items()} for layer in self._tensors]
        other._positions = None if self._positions is None else self._positions.clone()
        other._segments = None if self._segments is None else self._segments.clone()
        other.lengths = list(self.lengths)
        return other

    def snapshot(self) -> Mark:
        """A mark to `restore` later; cheap, since slots past it are only ever written again. `reorder` voids it."""
        positions, segments = (None if x is None else x[:, : self.used].clone() for x in (self._positions, self._segments))
        return Mark(self.used, self._reorders, tuple(self.lengths), positions, segments)

    def restore(self, mark: Mark) -> None:
        """Go back to a mark: the tokens that came since are forgotten."""
        if mark.reorders != self._reorders or mark.used > self.used:
            raise TriviumError("this snapshot is void: rows were reordered or tokens dropped since it was taken")
        self.used, self.lengths = mark.used, list(mark.lengths)
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
