"""Which positions attention may reach, beside causality and documents.

A pattern states who sees whom (`sees`, naively), what a cache must keep for it (`keeps`), and which blocks of keys a block of
queries needs (`plan`), so that nothing else is computed where that saves half the work. Sparse ones are in `patterns_sparse`.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Literal

from pydantic import Field
from torch import Tensor

from ..core.registry import Registry
from ..core.spec import Part
from . import blocked
from .blocked import Plan
from .step import Reach


class Pattern(Part, registry=Registry("pattern", "trivium.nn")):
    """Root of the attention patterns: the naive statement of who is in reach of whom, in positions within a document."""

    @property
    def reach(self) -> Reach | None:
        """The pattern itself, or None where it hides nothing."""
        return self

    @property
    def keeps(self) -> tuple[int, int] | None:
        """How many of the last tokens, the query's own included, and how many of a document's first hold all that a query sees;
        None: there are no such numbers, and a cache keeps everything."""
        return None

    @property
    def places(self) -> int | None:
        """How many places there are if rotary positions are to count as places in the cache (see `rebased`); None: they do not."""
        return None

    def whole(self, length: int) -> bool:
        """Whether everything within the first `length` positions is in reach of everything there."""
        raise AssertionError

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Bool, of positions `queries` [..., T, 1] and `keys` [..., 1, S]. Causality is not its business."""
        raise AssertionError

    def plan(self, length: int, *, causal: bool, start: int = 0, keys: int | None = None) -> Plan | None:
        """What must be computed of the first `length` positions, for queries from `start` on that are given `keys` of them (by
        default all); None where a plan would not halve the work."""
        return _planned(self, length, causal=causal, start=start, keys=keys)

    @property
    def cut(self) -> tuple[int, int] | None:
        """How a plan cuts a document: tokens in a block, and how far apart they are; None: there is no plan."""
        return None

    def needs(self, query: int, length: int) -> Collection[int]:
        """The blocks of keys that the block `query` of the first `length` positions needs, at least; others may be named."""
        raise AssertionError


@lru_cache(maxsize=256)
def _planned(pattern: Pattern, length: int, *, causal: bool, start: int, keys: int | None) -> Plan | None:
    if pattern.cut is None:
        return None
    size, stride = pattern.cut
    return blocked.plan(length, size, lambda query: pattern.needs(query, length), causal=causal, stride=stride, start=start, keys=keys)


class Full(Pattern):
    """Every position."""

    kind: Literal["full"] = "full"

    @classmethod
    def tiny(cls) -> Full:
        return cls()

    @property
    def reach(self) -> None:
        return None


class Window(Pattern):
    """The last `size` positions, the query's own included (Mistral's sliding window; arXiv:2310.06825); where attention is
    not causal, as many to the other side."""

    kind: Literal["window"] = "window"
    size: int = Field(gt=0, description="positions seen, the query's own included")

    @classmethod
    def tiny(cls) -> Window:
        return cls(size=5)

    @property
    def keeps(self) -> tuple[int, int]:
        return self.size, 0

    def whole(self, length: int) -> bool:
        return length <= self.size

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        return (queries - keys).abs() < self.size

    @property
    def cut(self) -> tuple[int, int]:
        return band_block(self.size), 1

    def needs(self, query: int, length: int) -> Collection[int]:
        return band(query, self.size)


class Chunk(Pattern):
    """Positions of the query's own chunk of `size` (Llama 4), and the `before` positions that precede the chunk. The latter is
    the memory of Transformer-XL (arXiv:1901.02860): keys and values of the past segment, kept as they were; layers hand it on,
    so a stack of L layers reaches L * before tokens back from a chunk's start."""

    kind: Literal["chunk"] = "chunk"
    size: int = Field(gt=0, description="positions in a chunk")
    before: int = Field(0, ge=0, description="positions seen before the query's own chunk")

    @classmethod
    def tiny(cls) -> Chunk:
        return cls(size=4, before=2)

    @property
    def keeps(self) -> tuple[int, int]:
        return self.size + self.before, 0

    def whole(self, length: int) -> bool:
        return length <= self.size

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        start = queries.div(self.size, rounding_mode="floor") * self.size
        return (keys >= start - self.before) & (keys < start + self.size)

    @property
    def cut(self) -> tuple[int, int]:
        return min(max(self.size, 16), 512), 1

    def needs(self, query: int, length: int) -> Collection[int]:
        block, _ = self.cut
        first = query * block // self.size * self.size - self.before
        last = ((query + 1) * block - 1) // self.size * self.size + self.size - 1
        return range(first // block, last // block + 1)


def band_block(size: int) -> int:
    """The size of blocks for a band of `size` tokens: half of it, so that at most half as much again is computed."""
    return min(max(-(-size // 2), 16), 512)


def band(query: int, size: int) -> range:
    """The blocks within reach of any token of the block `query` whose reach is `size` to either side."""
    block = band_block(size)
    return range((query * block - size + 1) // block, ((query + 1) * block + size - 2) // block + 1)
