"""How a sublayer's output joins the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..core.registry import Registry
from ..core.spec import Part
from .linear import OwnStart


class Residual(Part, registry=Registry("residual", "trivium.nn")):
    """Root of the residual forms: `build(dim)` gives the `Join` of one sublayer. All blocks of a model carry one width."""

    @property
    def width(self) -> int:
        """How many streams of the model's width the layers carry."""
        return 1

    def build(self, dim: int) -> Join:
        raise AssertionError

    def open(self, x: Tensor) -> Tensor:
        """The stream as the layers carry it, from embeddings [B, T, C]."""
        return x

    def close(self, x: Tensor) -> Tensor:
        """What the final norm reads, [B, T, C], from the stream as the layers carry it."""
        return x


class Join(nn.Module):
    """How one sublayer reads the stream x and writes to it. Its layer tells it how many joins stand before it."""

    def settle(self, number: int) -> None:
        """Learn how many joins stand before this one in the stack."""

    def read(self, x: Tensor) -> tuple[Tensor, Any]:
        """What the sublayer is given, [B, T, C], and what `write` needs of it."""
        return x, None

    def write(self, x: Tensor, y: Tensor, read: Any) -> Tensor:
        """The stream with the sublayer's output y [B, T, C] in it."""
        raise AssertionError


class Plain(Residual):
    """x + scale * y (arXiv:1512.03385)."""

    kind: Literal["plain"] = "plain"
    scale: float = Field(1.0, description="what a sublayer's output is multiplied by: see `deep_norm`")

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


class Gated(Residual):
    """x + tanh(gate) * y, with a learned gate: at 0 the sublayer is not there, so that new ones can be put into a finished model
    (Flamingo, arXiv:2204.14198)."""

    kind: Literal["gated"] = "gated"
    over: Literal["sublayer", "channel"] = Field("sublayer", description="one gate for the sublayer, or one for each channel")
    start: float = Field(0.0, description="where gates start")

    @classmethod
    def tiny(cls) -> Gated:
        return cls(start=0.5)

    def build(self, dim: int) -> Join:
        return GatedAddition(self, dim)


class GatedAddition(Join, OwnStart):
    def __init__(self, spec: Gated, dim: int):
        super().__init__()
        self.spec = spec
        self.gate = nn.Parameter(torch.empty(dim if spec.over == "channel" else ()))

    def write(self, x: Tensor, y: Tensor, read: Any) -> Tensor:
        return x + self.gate.tanh() * y

    def reset(self) -> None:
        nn.init.constant_(self.gate, self.spec.start)


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


@dataclass(frozen=True)
class DeepNorm:
    """Post-norm for deep stacks: norm(alpha * x + f(x)), with the matrices of the values, the attention's output and the
    feed-forward part started `beta` times smaller. For norms that do not see scale that is `Plain(scale=1 / alpha)`."""

    alpha: float
    beta: float

    @property
    def residual(self) -> Plain:
        return Plain(scale=1 / self.alpha)


def deep_norm(layers: int, *, encoder: int | None = None, part: Literal["encoder", "decoder"] = "decoder") -> DeepNorm:
    """The constants of table 1 of arXiv:2203.00555 for a stack of `layers` alone; for a model of `encoder` and `layers` decoder
    layers, those of one `part`."""
    if encoder is None:
        return DeepNorm((2 * layers) ** 0.25, (8 * layers) ** -0.25)
    if part == "decoder":
        return DeepNorm((3 * layers) ** 0.25, (12 * layers) ** -0.25)
    both = encoder**4 * layers
    return DeepNorm(0.81 * both ** (1 / 16), 0.87 * both ** (-1 / 16))
