"""Positions inside attention: what is done to queries and keys so that order matters.

Rotary embedding (arXiv:2104.09864) in the half-split layout: channel i is paired with channel i + D/2. Frequencies
are pure functions of the spec, in float32, so no buffer is stored and a model builds on the meta device.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.registry import Registry
from ..core.spec import Part
from ..kernels import functions, native
from .backends import Bias
from .step import Step


class RopeScaling(Part, registry=Registry("rope scaling", "trivium.nn")):
    """Root of the rotary scalings: `frequencies(base)` changes the inverse wavelengths [D/2]."""

    def frequencies(self, base: Tensor) -> Tensor:
        raise AssertionError


class LinearScaling(RopeScaling):
    """Positions divided by `factor` (arXiv:2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: float = Field(gt=0)

    @classmethod
    def tiny(cls) -> LinearScaling:
        return cls(factor=2.5)

    def frequencies(self, base: Tensor) -> Tensor:
        return base / self.factor


class Llama3Scaling(RopeScaling):
    """Llama 3.1's: long wavelengths divided by `factor`, short ones kept, a smooth passage between (arXiv:2407.21783)."""

    kind: Literal["llama3"] = "llama3"
    factor: float = Field(gt=0)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(gt=0)

    @classmethod
    def tiny(cls) -> Llama3Scaling:
        return cls(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)

    def frequencies(self, base: Tensor) -> Tensor:
        wavelength = 2 * math.pi / base
        longest = self.original_max_position_embeddings / self.low_freq_factor
        shortest = self.original_max_position_embeddings / self.high_freq_factor
        smooth = (self.original_max_position_embeddings / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        between = (1 - smooth) * base / self.factor + smooth * base
        scaled = torch.where(wavelength > longest, base / self.factor, between)
        return torch.where(wavelength < shortest, base, scaled)


class Position(Part, registry=Registry("position", "trivium.nn")):
    """Root of the positions inside attention: what turns queries and keys, and what is added to their scores."""

    def build(self, heads: int, head_dim: int) -> nn.Module | None:
        """What is trained, for each attention layer anew; None: nothing."""
        return None

    def turn(self, x: Tensor, step: Step) -> Tensor:
        """Queries [B, H, T, D] or keys [B, K, T, D], each by its position."""
        return x

    def bias(self, heads: int, table: nn.Module | None) -> Bias | None:
        """What is added to scores, a function of positions; `table` is what `build` gave."""
        return None


class Rope(Position):
    """Rotary position embedding. Scores depend on distances alone."""

    kind: Literal["rope"] = "rope"
    base: float = Field(10000.0, gt=0, description="theta: the longest wavelength is about 2 pi theta")
    scaling: SerializeAsAny[RopeScaling] | None = Field(None, description="how wavelengths are stretched beyond the trained length")

    @classmethod
    def tiny(cls) -> Rope:
        return cls(base=100.0)

    def frequencies(self, dim: int, device: torch.device) -> Tensor:
        """Inverse wavelengths [D/2], float32."""
        if dim % 2:
            raise ConfigError(f"rotary positions turn pairs of channels: head_dim ({dim}) must be even", field="head_dim", value=dim)
        base = 1.0 / (self.base ** (torch.arange(0, dim, 2, dtype=torch.int64).to(device=device, dtype=torch.float32) / dim))
        return base if self.scaling is None else self.scaling.frequencies(base)

    def tables(self, dim: int, step: Step, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B|1, 1, T, D/2], computed in float32; once per forward."""

        def build() -> tuple[Tensor, Tensor]:
            angles = step.positions[:, None, :, None].float() * self.frequencies(dim, step.positions.device)
            return angles.cos().to(dtype), angles.sin().to(dtype)

        return step.memo(("rope", self, dim, dtype), build)

    def turn(self, x: Tensor, step: Step) -> Tensor:
        cos, sin = self.tables(x.shape[-1], step, x.dtype)
        return rotate(x, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+D/2}) of `x` [..., T, D] by its angle; `cos`, `sin` broadcast to [..., T, D/2]."""
    plain = x.ndim == 4 and cos.shape in [(rows, 1, x.shape[2], x.shape[3] // 2) for rows in (1, x.shape[0])]
    if plain and native.takes(x, cos, sin):
        return functions.rotate(x, cos, sin)
    return _Rotate.apply(x, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    half = x.shape[-1] // 2
    torch.mul(first, cos, out=out[..., :half]).sub_(second * sin)
    torch.mul(second, cos, out=out[..., half:]).add_(first * sin)
    return out


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back; nothing but the tables is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None
