"""Positions inside attention: what is done to queries and keys so that order matters.

Rotary embedding (arXiv:2104.09864) in its two layouts, over all of a head or its first part. Frequencies are pure
functions of the spec, in float32, so no buffer is stored and a model builds on the meta device. What stretches them
stands in `rope_scaling.py`, what is added to scores in `positions_relative.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.registry import Registry
from ..core.spec import Part
from ..kernels import functions, native
from .backends import Bias, Extras
from .products import Product
from .rope_scaling import RopeScaling, inverse_wavelengths
from .step import Step, View


class Position(Part, registry=Registry("position", "trivium.nn")):
    """Root of the positions inside attention: what turns queries and keys, and what is added to their scores."""

    naive: ClassVar[bool] = False  # whether it needs the weights themselves, and attention is computed by its own `attend`

    def owner(self, index: int, names: Sequence[str]) -> int:
        """The layer whose table the layer `index` uses; `names`: the layers' blocks up to it."""
        return index

    def build(self, heads: int, head_dim: int) -> nn.Module | None:
        """What is trained, for each attention layer anew; None: nothing."""
        return None

    def turn(self, x: Tensor, step: Step) -> Tensor:
        """Queries [B, H, T, D] or keys [B, K, T, D], each by its position."""
        return x

    def bias(self, heads: int, table: nn.Module | None) -> Bias | None:
        """What is added to scores, a function of positions; `table` is what `build` gave."""
        return None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        view: View,
        *,
        table: nn.Module | None,
        scale: float,
        backend: str,
        extras: Extras,
        dropout: float,
    ) -> tuple[Tensor, Tensor | None]:
        """Where `naive`: what the heads give [B, H, T, E], and the weights [B, H, T, S] if the step wants them."""
        raise AssertionError

    def products(self, step: Step, view: View, *, wide: int, table: nn.Module | None, q: bool, weights: bool) -> list[Product]:
        """Where `naive`: its matrix products beside scores and values. `wide`: heads * head_dim; `q`, `weights`: which have gradients."""
        raise AssertionError


class Rope(Position):
    """Rotary position embedding: pairs of channels turn by angles that grow with the position. Scores depend on distances alone."""

    kind: Literal["rope"] = "rope"
    base: float = Field(10000.0, gt=0, description="theta: the longest wavelength is about 2 pi theta")
    layout: Literal["half", "interleaved"] = Field(
        "half", description="pairs half of the turned channels apart (Llama), or neighbors (GPT-J)"
    )
    share: float = Field(1.0, gt=0, le=1, description="part of each head that turns: its first channels; the others know no position")
    scaling: SerializeAsAny[RopeScaling] | None = Field(None, description="how wavelengths are stretched beyond the trained length")

    @classmethod
    def tiny(cls) -> Rope:
        return cls(base=100.0)

    def turned(self, head_dim: int) -> int:
        """How many channels of a head turn. Raises `ConfigError` where they do not come in pairs."""
        dim = int(head_dim * self.share)
        if dim % 2 or not dim:
            part = f"head_dim ({head_dim})" if self.share == 1 else f"the part of a head that turns ({self.share:g} of {head_dim}, {dim})"
            raise ConfigError(f"rotary positions turn pairs of channels: {part} must be even", field="head_dim", value=head_dim)
        return dim

    def frequencies(self, dim: int, length: Tensor) -> Tensor:
        """Inverse wavelengths of `dim` turned channels, float32: [dim/2], or [*length, dim/2] where the scaling reads the length."""
        if self.scaling is None:
            return inverse_wavelengths(self.base, dim, length.device)
        return self.scaling.frequencies(self.base, dim, length)

    def tables(self, dim: int, step: Step, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B|1, 1, T, dim/2], computed in float32; once per forward."""

        def build() -> tuple[Tensor, Tensor]:
            scaling = self.scaling
            length = (
                lengths(step)
                if scaling is not None and scaling.by_length
                else torch.zeros((), dtype=torch.int64, device=step.positions.device)
            )
            frequencies = self.frequencies(dim, length)
            angles = step.positions[:, None, :, None].float() * (frequencies if frequencies.ndim == 1 else frequencies[:, None])
            cos, sin = angles.cos(), angles.sin()
            if scaling is not None and scaling.magnitude != 1.0:
                cos, sin = cos * scaling.magnitude, sin * scaling.magnitude
            return cos.to(dtype), sin.to(dtype)

        return step.memo(("rope", self.base, self.scaling, dim, dtype), build)

    def turn(self, x: Tensor, step: Step) -> Tensor:
        dim = self.turned(x.shape[-1])
        cos, sin = self.tables(dim, step, x.dtype)
        if dim == x.shape[-1]:
            return rotate(x, cos, sin, layout=self.layout)
        return torch.cat([rotate(x[..., :dim], cos, sin, layout=self.layout), x[..., dim:]], -1)


def lengths(step: Step) -> Tensor:
    """How long the document of each token of `step` is by the end of it: [B, T], [B, 1], or [] where all are alike."""
    if step.even:
        return torch.tensor(step.slots.end, device=step.positions.device)
    ends = (step.positions + 1).expand(step.inputs.shape)
    if step.segments is None:
        return ends.amax(1, keepdim=True)
    edges = torch.zeros_like(ends)
    edges[:, 1:] = step.segments[:, 1:] != step.segments[:, :-1]
    runs = edges.cumsum(1)
    return torch.zeros_like(ends).scatter_reduce(1, runs, ends, "amax").gather(1, runs)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, layout: Literal["half", "interleaved"] = "half") -> Tensor:
    """Turn each pair of channels of `x` [..., T, D] by its angle: (x_i, x_{i+D/2}), or (x_{2i}, x_{2i+1}) where interleaved.
    `cos`, `sin` broadcast to [..., T, D/2]."""
    plain = x.ndim == 4 and cos.shape in [(rows, 1, x.shape[2], x.shape[3] // 2) for rows in (1, x.shape[0])]
    if plain and layout == "half" and native.takes(x, cos, sin):
        return functions.rotate(x, cos, sin)
    return _Rotate.apply(x, cos, sin, layout == "interleaved")


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    half = x.shape[-1] // 2
    parts = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(half), slice(half, None))
    (first, second), (turned_first, turned_second) = ([y[..., part] for part in parts] for y in (x, out))
    torch.mul(first, cos, out=turned_first).sub_(second * sin)
    torch.mul(second, cos, out=turned_second).add_(first * sin)
    return out


class _Rotate(torch.autograd.Function):
    """The gradient of a turn is the turn back; nothing but the tables is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:  # noqa: FBT001 - apply takes no keywords
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, interleaved=interleaved)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, interleaved=ctx.interleaved), None, None, None
