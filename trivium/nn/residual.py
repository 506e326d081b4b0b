"""How a sublayer's output joins the residual stream."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from ..core.registry import Registry
from ..core.spec import Part


class Residual(Part, registry=Registry("residual", "trivium.nn")):
    """Root of the residual forms: `build(dim)` gives the `Join` of one sublayer."""

    def build(self, dim: int) -> Join:
        raise AssertionError

    def open(self, x: Tensor) -> Tensor:
        """The stream as the layers carry it, from embeddings [B, T, C]."""
        return x

    def close(self, x: Tensor) -> Tensor:
        """What the final norm reads, [B, T, C], from the stream as the layers carry it."""
        return x


class Join(nn.Module):
    """How one sublayer reads the stream x and writes to it. For a stream [B, T, C], one place for both."""

    def read(self, x: Tensor) -> tuple[Tensor, Any]:
        """What the sublayer is given, [B, T, C], and what `write` needs of it."""
        return x, None

    def write(self, x: Tensor, y: Tensor, read: Any) -> Tensor:
        """The stream with the sublayer's output y [B, T, C] in it."""
        raise AssertionError


class Plain(Residual):
    """x + scale * y (arXiv:1512.03385)."""

    kind: Literal["plain"] = "plain"
    scale: float = Field(1.0, description="what a sublayer's output is multiplied by")

    @classmethod
    def tiny(cls) -> Plain:
        return cls(scale=0.5)

    def build(self, dim: int) -> Join:
        return Addition(self)


class Addition(Join):
    def __init__(self, spec: Plain):
        super().__init__()
        self.spec = spec

    def write(self, x: Tensor, y: Tensor, read: Any) -> Tensor:
        return x + y if self.spec.scale == 1.0 else x + self.spec.scale * y


class NoResidual(Residual):
    """y alone: what residual connections are measured against."""

    kind: Literal["none"] = "none"

    @classmethod
    def tiny(cls) -> NoResidual:
        return cls()

    def build(self, dim: int) -> Join:
        return Replacement()


class Replacement(Join):
    def write(self, x: Tensor, y: Tensor, read: Any) -> Tensor:
        return y
