"""Which positions attention may reach, beside causality and documents."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from ..core.registry import Registry
from ..core.spec import Part
from .step import Reach


class Pattern(Part, registry=Registry("pattern", "trivium.nn")):
    """Root of the attention patterns: the naive statement of who is in reach of whom, in positions within a document."""

    @property
    def reach(self) -> Reach | None:
        """The pattern itself, or None where it hides nothing."""
        return self

    def whole(self, length: int) -> bool:
        """Whether everything within the first `length` positions is in reach of everything there."""
        raise AssertionError

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Bool, of positions `queries` [..., T, 1] and `keys` [..., 1, S]. Causality is not its business."""
        raise AssertionError


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

    def whole(self, length: int) -> bool:
        return length <= self.size

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        return (queries - keys).abs() < self.size
