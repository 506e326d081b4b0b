"""State of which several tokens make one entry, such as keys that stand for a whole stretch of tokens.

A row's entries stand one after another, each with the position and document of the token that completed it, so rows whose
stretches end at different times each fill up at their own pace. What is dropped with its token is made again with the next.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import TriviumError
from .keepers import Cut, Keeper, Pending, Room


@dataclass(frozen=True)
class Entries:
    """`values` [B, E, W], and of the token that completed each: its position [B|1, E] and its segment [B, E], -1 where there is
    none; None: all are there, of one document. `at` [B|1, E]: which token of this forward it was, where that is known."""

    values: Tensor
    positions: Tensor
    segments: Tensor | None
    at: Tensor | None = None


@dataclass(frozen=True)
class Strided:
    """An entry of `width` channels for each `stride` tokens of a document."""

    width: int
    stride: int

    def keeper(self, room: Room) -> StridedKeeper:
        size = (room.rows, room.capacity // self.stride)
        return StridedKeeper(torch.zeros(*size, self.width, dtype=room.dtype, device=room.device), self.stride)

    def per_token(self, dtype: torch.dtype) -> int:
        """That of `stride` tokens, divided among them; a fraction is rounded up."""
        return math.ceil(self.width * dtype.itemsize / self.stride)

    def constant(self, dtype: torch.dtype) -> int:
        return 0


class StridedKeeper(Keeper):
    """`ordinals` [B, E]: how many tokens a row held when an entry was complete; `counts` [B]: its entries."""

    def __init__(self, tensor: Tensor, stride: int):
        self.tensor, self.stride = tensor, stride
        shape = tensor.shape[:2]
        self.positions, self.segments, self.ordinals = (torch.zeros(shape, dtype=torch.int64, device=tensor.device) for _ in range(3))
        self.counts = torch.zeros(shape[0], dtype=torch.int64, device=tensor.device)
        self.new = self.counts

    def add(self, found: Entries, pending: Pending) -> Entries:
        """Append what this forward completed; returns all there are. In a store without holes, rows are alike."""
        assert found.at is not None
        if pending.segments is None:
            start, end = pending.slots.start // self.stride, pending.slots.end // self.stride
            self.tensor[:, start:end] = found.values
            self.positions[:, start:end] = found.positions
            self.segments[:, start:end] = 0
            self.ordinals[:, start:end] = pending.slots.start + found.at + 1
            self.new = torch.full_like(self.counts, end)
            return Entries(self.tensor[:, :end], self.positions[:1, :end], None)
        assert found.segments is not None
        real = found.segments >= 0
        held = torch.tensor(pending.held, device=real.device)[:, None] + (pending.segments >= 0).cumsum(1)
        row, rank = real.nonzero(as_tuple=True)
        self.new = self.counts + real.sum(1)
        place = (self.counts[:, None] + real.cumsum(1) - 1)[row, rank]
        if int(self.new.max()) > self.tensor.shape[1]:
            raise TriviumError(
                f"positions do not start at 0, and this cache has no room for one more entry; open it {self.stride} tokens larger"
            )
        self.tensor[row, place] = found.values[row, rank].to(self.tensor.dtype)
        self.positions[row, place] = found.positions[row, rank]
        self.segments[row, place] = found.segments[row, rank]
        self.ordinals[row, place] = held.gather(1, found.at)[row, rank]
        end = int(self.new.max())
        there = torch.arange(end, device=real.device) < self.new[:, None]
        return Entries(self.tensor[:, :end], self.positions[:, :end], torch.where(there, self.segments[:, :end], -1))

    def commit(self, pending: Pending) -> None:
        self.counts = self.new

    def tensors(self) -> list[Tensor]:
        return [self.tensor]

    def reorder(self, rows: Tensor) -> None:
        self.tensor, self.positions, self.segments, self.ordinals, self.counts = (
            x.index_select(0, rows) for x in (self.tensor, self.positions, self.segments, self.ordinals, self.counts)
        )

    def drop(self, cut: Cut) -> None:
        there = torch.arange(self.tensor.shape[1], device=self.counts.device) < self.counts[:, None]
        lengths = torch.tensor(cut.lengths, device=self.counts.device)[:, None]
        self.counts = (there & (self.ordinals <= lengths)).sum(1)

    def fork(self) -> StridedKeeper:
        other = copy.copy(self)
        other.tensor, other.positions, other.segments, other.ordinals = (
            x.clone() for x in (self.tensor, self.positions, self.segments, self.ordinals)
        )
        return other

    def mark(self) -> Tensor:
        return self.counts

    def restore(self, mark: Tensor) -> None:
        self.counts = mark
