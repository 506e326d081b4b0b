"""Sparse patterns: dilated windows, global tokens, attention sinks, and blocks that are local, strided, global or random.

Each is stated by positions alone, never by a length, so that a document sees the same however it is batched or cached.
Sparse Transformers, arXiv:1904.10509; Longformer, arXiv:2004.05150; BigBird, arXiv:2007.14062; StreamingLLM, arXiv:2309.17453.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .patterns import Pattern, band, band_block


class Dilated(Pattern):
    """`size` positions, the query's own included, each `dilation` from the next (Longformer's dilated window); where attention
    is not causal, as many to the other side. Blocks hold tokens `dilation` apart, so no more is computed than for a window."""

    kind: Literal["dilated"] = "dilated"
    size: int = Field(gt=0, description="positions seen, the query's own included")
    dilation: int = Field(gt=0, description="the distance between two neighbors that are seen")

    @classmethod
    def tiny(cls) -> Dilated:
        return cls(size=3, dilation=2)

    @property
    def keeps(self) -> tuple[int, int]:
        return (self.size - 1) * self.dilation + 1, 0

    def whole(self, length: int) -> bool:
        return length <= (self.size if self.dilation == 1 else 1)

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        distance = (queries - keys).abs()
        return (distance < self.size * self.dilation) & (distance % self.dilation == 0)

    @property
    def cut(self) -> tuple[int, int]:
        return band_block(self.size), self.dilation

    def needs(self, query: int, length: int) -> Collection[int]:
        return _band_of_run(query, length, self.size, self.dilation)


class Longformer(Pattern):
    """A window of `size` positions to each side, the query's own included, each `dilation` from the next, and the `first`
    positions of a document, which see all and are seen by all (of what causality leaves)."""

    kind: Literal["longformer"] = "longformer"
    size: int = Field(gt=0, description="positions seen to one side, the query's own included")
    dilation: int = Field(1, gt=0, description="the distance between two neighbors that are seen")
    first: int = Field(1, ge=0, description="positions at the start of a document that see all and are seen by all")

    @classmethod
    def tiny(cls) -> Longformer:
        return cls(size=2, dilation=2, first=1)

    @property
    def keeps(self) -> tuple[int, int]:
        return (self.size - 1) * self.dilation + 1, self.first

    def whole(self, length: int) -> bool:
        return length <= max(self.size if self.dilation == 1 else 1, self.first)

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        distance = (queries - keys).abs()
        local = (distance < self.size * self.dilation) & (distance % self.dilation == 0)
        return local | (queries < self.first) | (keys < self.first)

    @property
    def cut(self) -> tuple[int, int]:
        return band_block(self.size), self.dilation

    def needs(self, query: int, length: int) -> Collection[int]:
        block, run = band_block(self.size), _run(length, self.size, self.dilation)
        of_first = {token % self.dilation * run + token // self.dilation // block for token in range(min(self.first, length))}
        return range(run * self.dilation) if query in of_first else {*_band_of_run(query, length, self.size, self.dilation), *of_first}


class SinkWindow(Pattern):
    """The last `size` positions and the `first` ones of the document, which draw attention that has nowhere else to go
    (StreamingLLM). `rebase`: positions count as places in the cache: once the window has left the first tokens behind,
    these stand right before it however long the text is, so that no distance is beyond `first + size`; for rotary positions."""

    kind: Literal["sink_window"] = "sink_window"
    size: int = Field(gt=0, description="last positions seen, the query's own included")
    first: int = Field(4, ge=0, description="positions at the start of a document that all see")
    rebase: bool = Field(False, description="whether rotary positions are places in the cache")

    @classmethod
    def tiny(cls) -> SinkWindow:
        return cls(size=4, first=2, rebase=True)

    @property
    def keeps(self) -> tuple[int, int]:
        return self.size, self.first

    @property
    def places(self) -> int | None:
        return self.first + self.size if self.rebase else None

    def whole(self, length: int) -> bool:
        return length <= self.size

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        return ((queries - keys).abs() < self.size) | (keys < self.first)

    @property
    def cut(self) -> tuple[int, int]:
        return band_block(self.size), 1

    def needs(self, query: int, length: int) -> Collection[int]:
        return {*band(query, self.size), *range(-(-self.first // band_block(self.size)))}


class BlockSparse(Pattern):
    """By blocks of `size` positions: `local` blocks back, the query's own included (and as many to the other side); every
    `stride`-th block (the fixed pattern of Sparse Transformers); the `first` blocks, which see all and are seen by all; and
    `random` earlier blocks for each, drawn from `seed` and the block's number alone. Not causal, who is drawn sees too."""

    kind: Literal["block_sparse"] = "block_sparse"
    size: int = Field(64, gt=0, description="positions in a block")
    local: int = Field(2, gt=0, description="blocks seen to one side, the query's own included")
    stride: int = Field(0, ge=0, description="every how many blocks one is seen by all; 0: none")
    first: int = Field(1, ge=0, description="blocks at the start that see all and are seen by all")
    random: int = Field(0, ge=0, description="earlier blocks drawn for each block")
    seed: int = Field(0, description="what random blocks are drawn from")

    @classmethod
    def tiny(cls) -> BlockSparse:
        return cls(size=2, local=1, stride=3, first=1, random=1)

    def whole(self, length: int) -> bool:
        return length <= self.size * max(self.local, self.first)

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        q, k = (x.div(self.size, rounding_mode="floor") for x in (queries, keys))
        seen = ((q - k).abs() < self.local) | (q < self.first) | (k < self.first)
        if self.stride:
            seen = seen | (k % self.stride == self.stride - 1)
        for draw in range(self.random):
            seen = seen | (self.drawn(q, draw) == k) | (self.drawn(k, draw) == q)
        return seen

    def drawn(self, block: Tensor, draw: int) -> Tensor:
        """The number of an earlier block for each of `block`; the first block has none and gets itself."""
        mixed = block * 0x9E3779B97F4A7C1 + ((self.seed * 1_000_003 + draw + 1) * 0xBF58476D1CE4E5B & 0x3FFFFFFFFFFFFFFF)  # int64 wraps
        for shift in (31, 27, 33):
            mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * 0x94D049BB133111E
        return ((mixed >> 17) & 0x3FFFFFFFFFFF) % block.clamp_min(1)

    @property
    def cut(self) -> tuple[int, int]:
        return self.size, 1

    def needs(self, query: int, length: int) -> Collection[int]:
        total = -(-length // self.size)
        if query < self.first:
            return range(total)
        strided = range(self.stride - 1, total, self.stride) if self.stride else ()
        return {*range(self.first), *range(query - self.local + 1, query + self.local), *strided, *_partners(self, total)[query]}


@lru_cache(maxsize=64)
def _partners(pattern: BlockSparse, total: int) -> list[set[int]]:
    """For each of `total` blocks, those that it drew and those that drew it."""
    found: list[set[int]] = [set() for _ in range(total)]
    for draw in range(pattern.random):
        for block, other in enumerate(pattern.drawn(torch.arange(total), draw).tolist()):
            found[block].add(other)
            found[other].add(block)
    return found


def _run(length: int, size: int, dilation: int) -> int:
    """How many blocks hold the tokens of one remainder."""
    return -(-length // (dilation * band_block(size)))


def _band_of_run(query: int, length: int, size: int, dilation: int) -> set[int]:
    """The blocks of the same remainder within reach of any token of the block `query`."""
    run = _run(length, size, dilation)
    start = query // run * run
    return {start + key for key in band(query - start, size) if 0 <= key < run}
