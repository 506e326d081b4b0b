"""The rolling cache: what a window can still see, in a ring of constant size, and the first tokens where they are seen too.

Places count a row's own tokens, so rows of different lengths roll each at its own pace; where each place's token stands is read
off the store's account, never kept twice. One token is written in place and the ring read as it lies; several are read beside
what the ring held, and enter it at commit. arXiv:2310.06825 (rolling buffer), arXiv:2309.17453 (first tokens kept).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import TriviumError
from .keepers import Cut, Keeper, Pending, Room, Slots

Memo = Callable[[Any, Callable[[], Any]], Any]


@dataclass(frozen=True)
class Rolling:
    """State of tokens that can be forgotten: a tensor of `shape` for each of a row's `last` tokens, and for the `first` ones of
    the document that it is in. With `rollback`, as many more are kept, so that what `drop_last` brings back is there."""

    shape: tuple[int, ...]
    last: int
    first: int = 0

    def keeper(self, room: Room) -> Ring:
        ring = min(self.last + room.rollback, max(room.capacity - self.first, 1))
        return Ring(
            torch.zeros(room.rows, *self.shape[:-1], self.first + ring, self.shape[-1], dtype=room.dtype, device=room.device),
            last=self.last,
            first=self.first,
        )

    def per_token(self, dtype: torch.dtype) -> int:
        return 0

    def constant(self, dtype: torch.dtype) -> int:
        """That of a store that holds at least as many tokens and rolls none back."""
        return (self.last + self.first) * math.prod(self.shape) * dtype.itemsize


class Ring(Keeper):
    """[B, *, first + ring, D]: the token at position p < first of a row's document at place p; of the others, the row's n-th at
    first + n modulo ring. `high`: the tokens that each row ever held; `floor`: each row's count when first tokens of an
    earlier document were last written over."""

    def __init__(self, tensor: Tensor, *, last: int, first: int):
        self.tensor, self.last, self.first = tensor, last, first
        self.high, self.floor = [0] * len(tensor), [0] * len(tensor)
        self.new: Tensor | None = None

    @property
    def size(self) -> int:
        return self.tensor.shape[-2] - self.first

    def roll(self, new: Tensor, pending: Pending) -> Tensor:
        """Add [B, *, T, D]; returns [B, *, S, D], of which `slots` tells where each stands."""
        start, end = pending.slots.start, pending.slots.end
        self.new = new
        if start == 0:
            return new
        if end - start == 1:
            self._enter(pending)
            return self._held(end, pending)
        return torch.cat([self._held(start, pending), new], -2)

    def slots(self, pending: Pending, memo: Memo) -> Slots | None:
        """Where the tokens that `roll` returned stand; None: they are this forward's own."""
        if pending.slots.start == 0:
            return None
        return memo(("ring", self.size, self.first), lambda: self._slots(pending))

    def _slots(self, pending: Pending) -> Slots:
        start, end = pending.slots.start, pending.slots.end
        known = end if end - start == 1 else start  # the slots whose tokens are in the ring as it is read
        if pending.slots.segments is None:
            device = self.tensor.device
            place = torch.arange(min(known, self.first + self.size), device=device)
            latest = known - 1 - (known - 1 - place) % self.size  # the last token that is at this place
            positions = torch.where(place < self.first, place, latest)[None]
            if known == start:
                positions = torch.cat([positions, torch.arange(start, end, device=device)[None]], 1)
            return Slots(start, end, positions, None)
        assert pending.slots.positions is not None
        positions, segments = pending.slots.positions, pending.slots.segments
        slot = _slots_of_places(positions[:, :known], segments[:, :known], first=self.first, size=self.size)
        held = slot >= 0
        slot = slot.clamp_min(0)
        found = [torch.where(held, x.gather(1, slot), none) for x, none in ((positions, 0), (segments, -1))]
        if known == start:
            found = [torch.cat([x, y[:, start:end]], 1) for x, y in zip(found, (positions, segments), strict=True)]
        return Slots(start, end, found[0], found[1])

    def _held(self, used: int, pending: Pending) -> Tensor:
        """Places with a token in them; all of them where rows differ."""
        return self.tensor[..., :used, :] if pending.slots.segments is None and used < self.tensor.shape[-2] else self.tensor

    def _enter(self, pending: Pending) -> None:
        """Put the new tokens in their places. A single one replaces a token that nothing can see any more, even if it is forgotten."""
        assert self.new is not None
        start, end = pending.slots.start, pending.slots.end
        places = self.tensor.movedim(-2, 1)  # [B, places, *, D]
        new = self.new.movedim(-2, 1).to(self.tensor.dtype)
        self.high = [max(high, length) for high, length in zip(self.high, pending.lengths, strict=True)]
        if pending.slots.segments is None:
            token = torch.arange(start, end, device=new.device)
            token = token[(token < self.first) | (token >= end - self.size)]
            places[:, torch.where(token < self.first, token, self.first + (token - self.first) % self.size)] = new[:, token - start]
            return
        assert pending.slots.positions is not None
        positions, segments = pending.slots.positions, pending.slots.segments
        slot = _slots_of_places(positions, segments, first=self.first, size=self.size)
        rows, at = (slot >= start).nonzero(as_tuple=True)
        places[rows, at] = new[rows, slot[rows, at] - start]
        if self.first:
            self._note_overwritten(segments[:, start:].cpu().numpy(), pending)

    def _note_overwritten(self, segments: np.ndarray, pending: Pending) -> None:
        """Where a document began after another one, it took the places of that one's first tokens."""
        assert pending.last is not None
        for row, (line, before, count) in enumerate(zip(segments, pending.last.tolist(), pending.held, strict=True)):
            names = np.append([before] * (count > 0), line[line >= 0])
            if len(begun := np.flatnonzero(np.diff(names))):
                self.floor[row] = count + int(begun[-1]) + (count == 0)

    def commit(self, pending: Pending) -> None:
        if self.new is None:
            return
        if pending.slots.start == 0 or pending.slots.end - pending.slots.start > 1:
            self.new = self.new.detach()
            self._enter(pending)
        self.new = None

    def tensors(self) -> list[Tensor]:
        return [self.tensor]

    def reorder(self, rows: Tensor) -> None:
        self.tensor = self.tensor.index_select(0, rows)
        self.high, self.floor = ([x[row] for row in rows.tolist()] for x in (self.high, self.floor))

    def drop(self, cut: Cut) -> None:
        for row, (count, length) in enumerate(zip(cut.counts, cut.lengths, strict=True)):
            lost = self.high[row] > self.first + self.size and self.high[row] - length > self.size - self.last + 1
            if count and length and (lost or length <= self.floor[row]):
                raise TriviumError(
                    f"a row cannot forget {count} tokens: this model's layers keep a window of {self.last} tokens, and this cache rolls at "
                    f"most {self.size - self.last} back; open it with a larger rollback"
                )
        for row, length in enumerate(cut.lengths):
            if not length:
                self.high[row] = self.floor[row] = 0

    def fork(self) -> Ring:
        other = Ring(self.tensor.clone(), last=self.last, first=self.first)
        other.high, other.floor = list(self.high), list(self.floor)
        return other

    def mark(self) -> tuple[Tensor, list[int], list[int]]:
        return self.tensor.clone(), list(self.high), list(self.floor)

    def restore(self, mark: tuple[Tensor, list[int], list[int]]) -> None:
        self.tensor, self.high, self.floor = mark[0].clone(), list(mark[1]), list(mark[2])


def _slots_of_places(positions: Tensor, segments: Tensor, *, first: int, size: int) -> Tensor:
    """[B, first + size]: the slot whose token is at each place of a ring, -1 for none; of `positions` and `segments` [B, S]."""
    real = segments >= 0
    slots = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    found = torch.full((len(segments), first + size), -1, dtype=torch.int64, device=segments.device)
    for place in range(first):
        found[:, place] = torch.where(real & (positions == place), slots, -1).amax(1)
    others = real & (positions >= first)
    number = others.cumsum(1) - 1
    rows, at = (others & (number >= others.sum(1, keepdim=True) - size)).nonzero(as_tuple=True)
    found[rows, first + number[rows, at] % size] = at
    return found


def held(slots: Slots, *, last: int, first: int) -> int:
    """How many keys a forward over `slots` reads from a ring that rolls none back."""
    if slots.start == 0:
        return slots.end
    count = slots.end - slots.start
    return min(slots.end, first + last) if count == 1 else min(slots.start, first + last) + count
