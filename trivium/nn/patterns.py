"""Which positions attention may reach, beside causality and documents."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..core.registry import Registry
from ..core.spec import Part


class Pattern(Part, registry=Registry("pattern", "trivium.nn")):
    """Root of the attention patterns."""

    @property
    def window(self) -> int | None:
        """How many positions back a query sees, itself included; None: all."""
        return None


class Full(Pattern):
    """Every position."""

    kind: Literal["full"] = "full"

    @classmethod
    def tiny(cls) -> Full:
        return cls()


class Window(Pattern):
    """The last `size` positions, the query's own included (Mistral's sliding window; arXiv:2310.06825)."""

    kind: Literal["window"] = "window"
    size: int = Field(gt=0, description="positions seen, the query's own included")

    @classmethod
    def tiny(cls) -> Window:
        return cls(size=5)

    @property
    def window(self) -> int | None:
        return self.size
