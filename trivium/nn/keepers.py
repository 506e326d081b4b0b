"""How a store keeps each kind of state that a mixer declares: one keeper for each layer and entry.

`PerToken`: an entry for each token. `Fixed`: state of constant size, as recurrent mixers have. `Once`: what is written
the first time and read ever after, such as keys and values of an encoder's output. A new kind of entry is a class with
`keeper`; the store asks nothing else of it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core.errors import TriviumError


@dataclass
class Slots:
    """The keys that one forward sees: how many slots, and for an uneven store each one's position and segment."""

    start: int
    end: int
    positions: Tensor | None  # [B, S]; None: slot i is position i
    segments: Tensor | None  # [B, S]; None: one document and no holes


@dataclass(frozen=True)
class Pending:
    """What `Store.begin` reserved. `positions` [B|1, T] and `segments` [B, T] (None: no padding, one document) of the new
    tokens; `held` and `lengths`: the tokens of each row before and after; `last`: each row's segment so far [B], None
    where rows hold one document without holes."""

    slots: Slots
    positions: Tensor
    segments: Tensor | None
    held: tuple[int, ...]
    lengths: tuple[int, ...]
    last: Tensor | None


@dataclass(frozen=True)
class Cut:
    """What `Store.drop_last` forgets: `counts` tokens of each row. `first` [B]: the first slot forgotten, `used` where a row
    loses none. Slots in use before and after; tokens of each row after."""

    counts: tuple[int, ...]
    first: Sequence[int]
    before: int
    used: int
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Room:
    """What a keeper is made for."""

    rows: int
    capacity: int
    rollback: int
    dtype: torch.dtype
    device: torch.device


class Keeper:
    """Keeps one entry of one layer. What a forward writes counts from `commit` on."""

    def tensors(self) -> list[Tensor]:
        """All that is held, for `bytes`."""
        raise AssertionError

    def commit(self, pending: Pending) -> None:
        """The forward succeeded."""

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        raise AssertionError

    def drop(self, cut: Cut) -> None:
        """Forget each row's last tokens; a `TriviumError` where that is no longer known."""

    def fork(self) -> Keeper:
        """An independent copy."""
        raise AssertionError

    def mark(self) -> Any:
        """What `restore` needs beside the store's own account."""
        return None

    def restore(self, mark: Any) -> None:
        """Go back to `mark`."""


class Entry(Protocol):
    """A kind of state, as a mixer declares it."""

    def keeper(self, room: Room) -> Keeper: ...

    def per_token(self, dtype: torch.dtype) -> int:
        """Bytes that each further token of a row takes."""
        ...

    def constant(self, dtype: torch.dtype) -> int:
        """Bytes that a row takes however long it is."""
        ...


State = Mapping[str, Entry]


@dataclass(frozen=True)
class PerToken:
    """State of one token in one row: a tensor of `shape`; kept as [B, *shape[:-1], slots, shape[-1]]."""

    shape: tuple[int, ...]

    def keeper(self, room: Room) -> Slotted:
        return Slotted(torch.zeros(room.rows, *self.shape[:-1], room.capacity, self.shape[-1], dtype=room.dtype, device=room.device))

    def per_token(self, dtype: torch.dtype) -> int:
        return math.prod(self.shape) * dtype.itemsize

    def constant(self, dtype: torch.dtype) -> int:
        return 0


class Slotted(Keeper):
    """One place for each slot. Nothing to do at commit: slots past those in use are only ever written again."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def extend(self, new: Tensor, slots: Slots) -> Tensor:
        """Append [B, *, T, D]; returns all of it [B, *, S, D]."""
        self.tensor[..., slots.start : slots.end, :] = new
        return self.tensor[..., : slots.end, :]

    def tensors(self) -> list[Tensor]:
        return [self.tensor]

    def reorder(self, rows: Tensor) -> None:
        self.tensor = self.tensor.index_select(0, rows)

    def fork(self) -> Slotted:
        return Slotted(self.tensor.clone())


@dataclass(frozen=True)
class Fixed:
    """State of constant size, [B, *shape], zero at the start of a document. `dtype`: None is the model's."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    def keeper(self, room: Room) -> FixedKeeper:
        return FixedKeeper(
            torch.zeros(room.rows, room.rollback + 1, *self.shape, dtype=self.dtype or room.dtype, device=room.device),
        )

    def per_token(self, dtype: torch.dtype) -> int:
        return 0

    def constant(self, dtype: torch.dtype) -> int:
        return math.prod(self.shape) * (self.dtype or dtype).itemsize


class FixedKeeper(Keeper):
    """The state after each of the last `rollback + 1` slots, in a ring: [B, rollback + 1, *shape], that after slot s at
    place s modulo its length. After a hole, the state is the one before it."""

    def __init__(self, ring: Tensor):
        self.ring = ring
        self.used = 0
        self.oldest = -1  # the first slot whose state is known; -1: the start, which is zero
        self.new: Tensor | None = None

    @property
    def depth(self) -> int:
        return self.ring.shape[1]

    def read(self) -> Tensor | None:
        """[B, *shape] as it stands; None where nothing came yet."""
        return self.ring[:, (self.used - 1) % self.depth] if self.used else None

    def write(self, states: Tensor) -> None:
        """[B, n, *shape]: after each of the last n slots of this forward, n the lesser of its length and `rollback + 1`."""
        self.new = states

    def commit(self, pending: Pending) -> None:
        assert self.new is not None, "a mixer that declares fixed state writes it in every forward"
        start, end = pending.slots.start, pending.slots.end
        wanted = min(end - start, self.depth)
        assert self.new.shape[1] == wanted, f"{wanted} states were asked for, {self.new.shape[1]} written"
        for offset in range(wanted):
            self.ring[:, (end - wanted + offset) % self.depth] = self.new[:, offset].detach()
        self.used, self.new = end, None
        self.oldest = max(self.oldest, end - self.depth) if end >= self.depth else self.oldest

    def tensors(self) -> list[Tensor]:
        return [self.ring]

    def reorder(self, rows: Tensor) -> None:
        self.ring = self.ring.index_select(0, rows)

    def drop(self, cut: Cut) -> None:
        for row, count in enumerate(cut.counts):
            if not count:
                continue
            last = cut.first[row] - 1  # the last slot that stays: a token of this row or a hole after one
            if last < self.oldest and cut.lengths[row]:
                raise TriviumError(
                    f"a row cannot forget {count} tokens: this model has state of a fixed size, and this cache keeps what it was for the "
                    f"last {self.depth - 1} tokens; open it with a larger rollback"
                )
            state = self.ring[row, last % self.depth].clone() if cut.lengths[row] else torch.zeros_like(self.ring[row, 0])
            for slot in range(max(min(last, cut.used - 1), cut.before - self.depth, 0), cut.before):
                self.ring[row, slot % self.depth] = state
        self.used = cut.used

    def fork(self) -> FixedKeeper:
        other = copy.copy(self)
        other.ring = self.ring.clone()
        return other

    def mark(self) -> tuple[Tensor, int, int]:
        return self.ring.clone(), self.used, self.oldest

    def restore(self, mark: tuple[Tensor, int, int]) -> None:
        self.ring, self.used, self.oldest = mark[0].clone(), mark[1], mark[2]


@dataclass(frozen=True)
class Once:
    """State written in the first forward, [B, *], and read from then on; its size is that of what is written."""

    def keeper(self, room: Room) -> OnceKeeper:
        return OnceKeeper()

    def per_token(self, dtype: torch.dtype) -> int:
        return 0

    def constant(self, dtype: torch.dtype) -> int:
        return 0


class OnceKeeper(Keeper):
    """Holds a tensor, or nothing yet."""

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.new: Tensor | None = None

    def commit(self, pending: Pending) -> None:
        if self.new is not None:
            self.value, self.new = self.new.detach(), None

    def tensors(self) -> list[Tensor]:
        return [] if self.value is None else [self.value]

    def reorder(self, rows: Tensor) -> None:
        if self.value is not None:
            self.value = self.value.index_select(0, rows)

    def fork(self) -> OnceKeeper:
        return copy.copy(self)  # never written in place

    def mark(self) -> Tensor | None:
        return self.value

    def restore(self, mark: Tensor | None) -> None:
        self.value = mark
