"""Absolute positions: vectors added to the embeddings, one for each place in a document.

They read the step's positions, so cached decoding, packed documents and padding need nothing of their own. Rotary and
other positions, which work inside attention, stand in `positions.py`.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..core.errors import ConfigError, TriviumError
from ..core.registry import Registry
from ..core.spec import Part
from .step import Step


class Absolute(Part, registry=Registry("absolute position", "trivium.nn")):
    """Root of the absolute positions: `build(dim)` gives a module `positions(step, dtype) -> [B|1, T, C]`."""

    def build(self, dim: int) -> nn.Module:
        raise AssertionError


class Learned(Absolute):
    """A trained table (GPT-1 and 2; BERT, arXiv:1810.04805). It says nothing of positions beyond its last row."""

    kind: Literal["learned"] = "learned"
    size: int = Field(gt=0, description="how many positions there are")
    offset: int = Field(0, ge=0, description="rows of the table that stand before that of position 0 (RoBERTa, BART: 2)")

    @classmethod
    def tiny(cls) -> Learned:
        return cls(size=20)

    def build(self, dim: int) -> nn.Module:
        return LearnedPositions(self, dim)


class LearnedPositions(nn.Module):
    def __init__(self, spec: Learned, dim: int):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.offset + spec.size, dim))

    def forward(self, step: Step, dtype: torch.dtype) -> Tensor:
        """Raises `TriviumError` for a position that has no row. Where positions do not simply count on, they are read once."""
        first, last = (0, step.slots.end - 1) if step.even else torch.stack(step.positions.aminmax()).tolist()
        if first < 0 or last >= self.spec.size:
            raise TriviumError(
                f"position {last if first >= 0 else first} was asked for, but this model has learned {self.spec.size} positions (0 to "
                f"{self.spec.size - 1}) and cannot go beyond them: shorten the text, or use a model of a longer context",
                field="positions",
                value=last if first >= 0 else first,
            )
        return F.embedding(step.positions + self.spec.offset, self.weight).to(dtype)


class Sinusoidal(Absolute):
    """Sines on even channels, cosines on odd ones, of wavelengths from 2 pi to 2 pi `base`; fixed (arXiv:1706.03762)."""

    kind: Literal["sinusoidal"] = "sinusoidal"
    base: float = Field(10000.0, gt=0, description="the longest wavelength is about 2 pi times this")

    @classmethod
    def tiny(cls) -> Sinusoidal:
        return cls(base=100.0)

    def build(self, dim: int) -> nn.Module:
        if dim % 2:
            raise ConfigError(f"sinusoidal positions come in pairs of channels: dim ({dim}) must be even", field="dim", value=dim)
        return SinusoidalPositions(self, dim)


class SinusoidalPositions(nn.Module):
    """Computed in float64, in which the angle of a far position is still exact, and rounded once. Nothing is stored."""

    def __init__(self, spec: Sinusoidal, dim: int):
        super().__init__()
        self.spec, self.dim = spec, dim

    def forward(self, step: Step, dtype: torch.dtype) -> Tensor:
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float64, device=step.positions.device) / self.dim
        angles = step.positions[..., None].double() / self.spec.base**exponents  # [B|1, T, C/2]
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2).to(dtype)
