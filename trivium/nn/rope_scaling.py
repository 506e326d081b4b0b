"""Rotary scalings: how the wavelengths of rotary positions are stretched, so that a model reaches beyond its trained length.

Each gives inverse wavelengths from the base, and a magnitude for the turned channels. Those of `dynamic` and `longrope`
depend on the length: that of the token's own document by the end of the forward that the token came in. Cached keys stay
as they were turned, as in transformers, so that beyond the trained length steps differ from one forward over all; where
LongRoPE switches, the generator reads everything again.
arXiv:2306.15595 (linear), arXiv:2309.00071 (NTK-aware, YaRN), arXiv:2407.21783 (Llama 3), arXiv:2402.13753 (LongRoPE).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..core.errors import ConfigError
from ..core.registry import Registry
from ..core.spec import Part


class RopeScaling(Part, registry=Registry("rope scaling", "trivium.nn")):
    """Root of the rotary scalings."""

    by_length: ClassVar[bool] = False  # whether `frequencies` depend on the length

    @property
    def exempt(self) -> Mapping[str, str]:
        why = f"{self.kind}: beyond the trained length, keys keep the turn of the forward that they came in"
        return {"cache": why} if self.by_length else {}

    def frequencies(self, base: float, dim: int, length: Tensor) -> Tensor:
        """Inverse wavelengths, float32, of `dim` turned channels: [dim/2], or [*length, dim/2] where they depend on `length`
        (int64, of any shape)."""
        raise AssertionError

    @property
    def magnitude(self) -> float:
        """What turned queries, and turned keys, are multiplied by."""
        return 1.0


def inverse_wavelengths(base: float | Tensor, dim: int, device: torch.device) -> Tensor:
    """base ** (-2i / dim), float32, [..., dim/2] for a base that is a number or a tensor [..., 1]."""
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.int64).to(device=device, dtype=torch.float32) / dim))


class LinearScaling(RopeScaling):
    """Position interpolation: positions divided by `factor`, so that all of them stay within those trained."""

    kind: Literal["linear"] = "linear"
    factor: float = Field(gt=0)

    @classmethod
    def tiny(cls) -> LinearScaling:
        return cls(factor=2.5)

    def frequencies(self, base: float, dim: int, length: Tensor) -> Tensor:
        return inverse_wavelengths(base, dim, length.device) / self.factor


def ntk_base(base: float, factor: float, dim: int) -> float:
    """The base whose longest wavelength is `factor` times longer, while the shortest stays (NTK-aware)."""
    if dim < 4:
        raise ConfigError(f"a change of base needs at least 4 turned channels, there are {dim}", field="scaling", value=dim)
    return base * factor ** (dim / (dim - 2))


class NTKScaling(RopeScaling):
    """NTK-aware: another base, fixed, so that long wavelengths are stretched by `factor` and short ones kept."""

    kind: Literal["ntk"] = "ntk"
    factor: float = Field(gt=0)

    @classmethod
    def tiny(cls) -> NTKScaling:
        return cls(factor=3.0)

    def frequencies(self, base: float, dim: int, length: Tensor) -> Tensor:
        return inverse_wavelengths(ntk_base(base, self.factor, dim), dim, length.device)


class DynamicScaling(RopeScaling):
    """NTK-aware, by the length seen: nothing changes up to the trained length; the base grows with what is longer."""

    kind: Literal["dynamic"] = "dynamic"
    by_length: ClassVar[bool] = True
    factor: float = Field(ge=1)
    original_max_position_embeddings: int = Field(gt=0)

    @classmethod
    def tiny(cls) -> DynamicScaling:
        return cls(factor=2.0, original_max_position_embeddings=8)

    @classmethod
    def exempted(cls) -> DynamicScaling:
        return cls.tiny()

    def frequencies(self, base: float, dim: int, length: Tensor) -> Tensor:
        original = self.original_max_position_embeddings
        ntk_base(base, 1.0, dim)
        stretch = self.factor * length.clamp(min=original).double() / original - (self.factor - 1)
        grown = base * stretch ** (dim / (dim - 2))
        return inverse_wavelengths(grown[..., None].float(), dim, length.device)


class YarnScaling(RopeScaling):
    """NTK by parts: channels that turn more than `beta_fast` times within the trained length are kept, those that turn less
    than `beta_slow` times divided by `factor`, a ramp between. Queries and keys grow by 0.1 ln(factor) + 1, which sharpens
    the softmax; `mscale` and `mscale_all_dim` weigh that logarithm (DeepSeek), `attention_factor` replaces all of it."""

    kind: Literal["yarn"] = "yarn"
    factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(gt=0)
    attention_factor: float | None = Field(None, gt=0)
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = Field(True, description="whether the ramp begins and ends at whole channels")

    @classmethod
    def tiny(cls) -> YarnScaling:
        return cls(factor=4.0, original_max_position_embeddings=16, beta_fast=2.0, beta_slow=0.5)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast ({self.beta_fast:g}) must be larger than beta_slow ({self.beta_slow:g})")
        return self

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_magnitude(self.factor, self.mscale) / yarn_magnitude(self.factor, self.mscale_all_dim)
        return yarn_magnitude(self.factor)

    def frequencies(self, base: float, dim: int, length: Tensor) -> Tensor:
        if base <= 1:
            raise ConfigError(f"yarn needs a base above 1, not {base:g}", field="base", value=base)
        low, high = self._channel(self.beta_fast, base, dim), self._channel(self.beta_slow, base, dim)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        plain = inverse_wavelengths(base, dim, length.device)
        channel = torch.arange(dim // 2, dtype=torch.float32, device=length.device)
        slow = ((channel - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        return plain / self.factor * slow + plain * (1 - slow)

    def _channel(self, turns: float, base: float, dim: int) -> float:
        """The pair of channels that turns so often within the trained length."""
        return dim * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1: the root of what YaRN multiplies scores by."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


class Llama3Scaling(RopeScaling):
    """Llama 3.1's: long wavelengths divided by `factor`, short ones kept, a smooth passage between."""

    kind: Literal["llama3"] = "llama3"
    factor: float = Field(gt=0)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(gt=0)

    @classmethod
    def tiny(cls) -> Llama3Scaling:
        return cls(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)

    def frequencies(self, base: float, dim: int, length: Tensor) -> Tensor:
        plain = inverse_wavelengths(base, dim, length.device)
        wavelength = 2 * math.pi / plain
        longest = self.original_max_position_embeddings / self.low_freq_factor
        shortest = self.original_max_position_embeddings / self.high_freq_factor
        smooth = (self.original_max_position_embeddings / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        between = (1 - smooth) * plain / self.factor + smooth * plain
        scaled = torch.where(wavelength > longest, plain / self.factor, between)
        return torch.where(wavelength < shortest, plain, scaled)


class LongScaling(RopeScaling):
    """LongRoPE: each wavelength has its own factor, found by search: one set within the trained length, one beyond it. Queries
    and keys grow by sqrt(1 + ln(factor) / ln(trained length)), or by `attention_factor`."""

    kind: Literal["longrope"] = "longrope"
    by_length: ClassVar[bool] = True
    short_factor: tuple[float, ...] = Field(min_length=1, description="what each wavelength is multiplied by, up to the trained length")
    long_factor: tuple[float, ...] = Field(min_length=1, description="the same, beyond it")
    factor: float = Field(gt=0, description="how many times longer than the trained one the context is")
    original_max_position_embeddings: int = Field(gt=1)
    attention_factor: float | None = Field(None, gt=0)

    @classmethod
    def tiny(cls) -> LongScaling:
        return cls(short_factor=(1.0, 1.1, 1.3, 1.7), long_factor=(1.0, 1.5, 2.5, 4.0), factor=4.0, original_max_position_embeddings=8)

    @classmethod
    def exempted(cls) -> LongScaling:
        return cls.tiny()

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 1.0 if self.factor <= 1 else math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))

    def frequencies(self, base: float, dim: int, length: Tensor) -> Tensor:
        for name, factors in (("short_factor", self.short_factor), ("long_factor", self.long_factor)):
            if len(factors) != dim // 2:
                raise ConfigError(
                    f"scaling.{name} has {len(factors)} numbers, but {dim} channels turn: give one for each of the {dim // 2} pairs",
                    field=f"scaling.{name}",
                    value=len(factors),
                )
        short, long = (
            torch.tensor(factors, dtype=torch.float32, device=length.device) for factors in (self.short_factor, self.long_factor)
        )
        beyond = (length > self.original_max_position_embeddings)[..., None]
        return inverse_wavelengths(base, dim, length.device) / torch.where(beyond, long, short)
