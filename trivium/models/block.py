"""A block: a mixer and a feed-forward part, each with its norm and its way back into the residual stream."""

from __future__ import annotations

from typing import Literal, Self

import torch.nn.functional as F
from pydantic import Field, SerializeAsAny, model_validator
from torch import Tensor, nn

from ..core.spec import Spec
from ..nn.attention import Mixer
from ..nn.feedforward import FFN
from ..nn.norms import RMS, Norm
from ..nn.residual import Plain, Residual
from ..nn.step import Step
from ..nn.store import State


class Block(Spec):
    """What one kind of layer is.

    `norm_at`: `pre`, x + f(norm(x)); `post`, norm(x + f(x)) (arXiv:2002.04745), which with a residual scale of 1/alpha is
    DeepNorm (arXiv:2203.00555); `reordered`, x + norm(f(x)) (OLMo 2, arXiv:2501.00656); `sandwich`, x + norm(f(norm(x)))
    with two norms (arXiv:2105.13290, Gemma 2).
    """

    mixer: SerializeAsAny[Mixer] | None = Field(None, description="what mixes positions")
    ffn: SerializeAsAny[FFN] | None = Field(None, description="what works on each position alone")
    norm: SerializeAsAny[Norm] = Field(RMS(), description="the norm of each sublayer")
    norm_at: Literal["pre", "post", "reordered", "sandwich"] = Field("pre", description="where the norms stand")
    residual: SerializeAsAny[Residual] = Field(Plain(), description="how a sublayer's output joins the stream")
    dropout: float = Field(0.0, ge=0, lt=1, description="chance of a channel of a sublayer's output to be dropped, in training")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mixer is None and self.ffn is None:
            raise ValueError("a block needs a mixer, an ffn, or both")
        return self

    def build(self, dim: int, index: int) -> Layer:
        return Layer(self, dim, index)


class Layer(nn.Module):
    """A built block at its place: `index` is the layer's number in the whole model."""

    def __init__(self, spec: Block, dim: int, index: int):
        super().__init__()
        self.spec, self.index = spec, index
        if spec.mixer is not None:
            self.mixer_norm = spec.norm.build(dim)
            self.mixer = spec.mixer.build(dim)
            if spec.norm_at == "sandwich":
                self.mixer_out_norm = spec.norm.build(dim)
        if spec.ffn is not None:
            self.ffn_norm = spec.norm.build(dim)
            self.ffn = spec.ffn.build(dim)
            if spec.norm_at == "sandwich":
                self.ffn_out_norm = spec.norm.build(dim)

    def state(self) -> State:
        return self.mixer.state() if self.spec.mixer is not None else {}

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        return self.feed(self.mix(x, step), step)

    def mix(self, x: Tensor, step: Step) -> Tensor:
        """The first half: what mixes positions."""
        if self.spec.mixer is not None:
            y = self.mixer(self._before(x, self.mixer_norm), step, step.handle(self.index))
            x = self._after(x, y, self.mixer_out_norm if self.spec.norm_at == "sandwich" else self.mixer_norm)
        return x

    def feed(self, x: Tensor, step: Step) -> Tensor:
        """The second half: what works on each position alone."""
        if self.spec.ffn is not None:
            y = self.ffn(self._before(x, self.ffn_norm), step)
            x = self._after(x, y, self.ffn_out_norm if self.spec.norm_at == "sandwich" else self.ffn_norm)
        return x

    def _before(self, x: Tensor, norm: nn.Module) -> Tensor:
        """What a sublayer is given."""
        return norm(x) if self.spec.norm_at in ("pre", "sandwich") else x

    def _after(self, x: Tensor, y: Tensor, norm: nn.Module) -> Tensor:
        """The stream x with a sublayer's output y in it."""
        spec = self.spec
        if spec.norm_at in ("reordered", "sandwich"):
            y = norm(y)
        if spec.dropout:
            y = F.dropout(y, spec.dropout, self.training)
        x = spec.residual.join(x, y)
        return norm(x) if spec.norm_at == "post" else x
