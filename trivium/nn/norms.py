"""Norms over the model dimension, computed in fp32 whatever the dtype of what comes in."""

from __future__ import annotations

from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..core.registry import Registry
from ..core.spec import Part
from ..kernels import functions, native
from .linear import OwnStart


class Norm(Part, registry=Registry("norm", "trivium.nn")):
    """Root of the norms: `build(dim)` gives a module `[..., C] -> [..., C]`."""

    def build(self, dim: int) -> nn.Module:
        raise AssertionError


class RMS(Norm):
    """x / rms(x) * weight (arXiv:1910.07467). `offset` is added to the weight (Gemma: 1).

    `round_first`: round to the working dtype before the weight is applied, as Llama does; Gemma rounds after.
    """

    kind: Literal["rms"] = "rms"
    eps: float = Field(1e-5, gt=0, description="added to the mean square")
    offset: float = Field(0.0, description="added to the weight")
    round_first: bool = Field(True, description="round to the working dtype before the weight is applied")
    affine: bool = Field(True, description="whether there is a weight")

    @classmethod
    def tiny(cls) -> RMS:
        return cls(eps=1e-4)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.offset and not self.affine:
            raise ValueError("offset is added to a weight, which a norm that is not affine has not")
        return self

    def build(self, dim: int) -> nn.Module:
        return RMSNorm(self, dim)


class RMSNorm(OwnStart):
    def __init__(self, spec: RMS, dim: int):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(dim)) if spec.affine else None

    def forward(self, x: Tensor) -> Tensor:
        spec = self.spec
        if self.weight is not None and native.takes(x, self.weight):
            return functions.rms_norm(x, self.weight, eps=spec.eps, offset=spec.offset, round_first=spec.round_first)
        wide = x.float()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + spec.eps)
        if self.weight is None:
            return normal.to(x.dtype)
        if spec.round_first:
            return (self.weight + spec.offset if spec.offset else self.weight) * normal.to(x.dtype)
        return ((self.weight.float() + spec.offset) * normal).to(x.dtype)

    def reset(self) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.spec.offset)


class Layer(Norm):
    """(x - mean) / deviation * weight + bias over the channels of each token (arXiv:1607.06450)."""

    kind: Literal["layer"] = "layer"
    eps: float = Field(1e-5, gt=0, description="added to the variance")
    bias: bool = Field(True, description="whether a bias is added, where the norm is affine")
    affine: bool = Field(True, description="whether there is a weight, and the bias")

    @classmethod
    def tiny(cls) -> Layer:
        return cls(eps=1e-4)

    def build(self, dim: int) -> nn.Module:
        return LayerNorm(self, dim)


class LayerNorm(OwnStart):
    """torch's kernel: statistics and affine map in float32 whatever the dtype of x, rounded once."""

    def __init__(self, spec: Layer, dim: int):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(dim)) if spec.affine else None
        self.bias = nn.Parameter(torch.empty(dim)) if spec.affine and spec.bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.spec.eps)

    def reset(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class NoNorm(Norm):
    """The identity."""

    kind: Literal["none"] = "none"

    @classmethod
    def tiny(cls) -> NoNorm:
        return cls()

    def build(self, dim: int) -> nn.Module:
        return nn.Identity()
