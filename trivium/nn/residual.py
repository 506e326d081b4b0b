"""How a sublayer's output joins the residual stream."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from ..core.registry import Registry
from ..core.spec import Part


class Residual(Part, registry=Registry("residual", "trivium.nn")):
    """Root of the residual forms: `join(x, y)` puts a sublayer's output y [B, T, C] into the stream x [B, T, C]."""

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        raise AssertionError


class Plain(Residual):
    """x + scale * y (arXiv:1512.03385)."""

    kind: Literal["plain"] = "plain"
    scale: float = Field(1.0, description="what a sublayer's output is multiplied by")

    @classmethod
    def tiny(cls) -> Plain:
        return cls(scale=0.5)

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y if self.scale == 1.0 else x + self.scale * y


class NoResidual(Residual):
    """y alone: what residual connections are measured against."""

    kind: Literal["none"] = "none"

    @classmethod
    def tiny(cls) -> NoResidual:
        return cls()

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        return y
