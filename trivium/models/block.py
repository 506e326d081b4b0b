"""A block: a mixer and a feed-forward part, each with its norm and its way back into the residual stream."""

from __future__ import annotations

from typing import Literal, Self

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
    """What one kind of layer is. `norm_at`: `pre`, x + f(norm(x)); `post`, norm(x + f(x)) (arXiv:2002.04745)."""

    mixer: SerializeAsAny[Mixer] | None = Field(None, description="what mixes positions")
    ffn: SerializeAsAny[FFN] | None = Field(None, description="what works on each position alone")
    norm: SerializeAsAny[Norm] = Field(RMS(), description="the norm of each sublayer")
    norm_at: Literal["pre", "post"] = Field("pre", description="where the norms stand")
    residual: SerializeAsAny[Residual] = Field(Plain(), description="how a sublayer's output joins the stream")

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
        if spec.ffn is not None:
            self.ffn_norm = spec.norm.build(dim)
            self.ffn = spec.ffn.build(dim)

    def state(self) -> State:
        return self.mixer.state() if self.spec.mixer is not None else {}

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        spec = self.spec
        join, pre = spec.residual.join, spec.norm_at == "pre"
        if spec.mixer is not None:
            handle = step.handle(self.index)
            if pre:
                x = join(x, self.mixer(self.mixer_norm(x), step, handle))
            else:
                x = self.mixer_norm(join(x, self.mixer(x, step, handle)))
        if spec.ffn is not None:
            if pre:
                x = join(x, self.ffn(self.ffn_norm(x), step))
            else:
                x = self.ffn_norm(join(x, self.ffn(x, step)))
        return x
