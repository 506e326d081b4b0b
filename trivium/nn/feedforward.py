"""The feed-forward part: position-wise maps from the model dimension and back."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from ..core.registry import Registry
from ..core.spec import Part
from .activations import Activation, SiLU, silu_times
from .linear import Linear, Projections
from .step import Step


class FFN(Part, registry=Registry("ffn", "trivium.nn")):
    """Root of the feed-forward parts: `build(dim)` gives a module called as `ffn(x, step)`, [B, T, C] -> [B, T, C]."""

    def build(self, dim: int) -> nn.Module:
        raise AssertionError


class MLP(FFN):
    """out(act(gate(x)) * up(x)), the gated form of arXiv:2002.05202; SwiGLU with `silu`. Not `gated`, the plain
    out(act(up(x))) of arXiv:1706.03762, which has no map called gate."""

    kind: Literal["mlp"] = "mlp"
    hidden: int = Field(gt=0, description="width inside")
    activation: SerializeAsAny[Activation] = Field(SiLU(), description="what is applied to the gate; to up where there is none")
    gated: bool = Field(True, description="whether a second map is multiplied in")
    bias: bool = Field(False, description="biases on all maps")

    @classmethod
    def tiny(cls) -> MLP:
        return cls(hidden=40)

    def build(self, dim: int) -> nn.Module:
        return FeedForward(self, dim)


class FeedForward(nn.Module):
    def __init__(self, spec: MLP, dim: int):
        super().__init__()
        self.spec = spec
        names = ("gate", "up") if spec.gated else ("up",)
        self.inp = Projections(**{name: Linear(dim, spec.hidden, bias=spec.bias) for name in names})
        self.activation = spec.activation.build()
        self.out = Linear(spec.hidden, dim, bias=spec.bias)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        if not self.spec.gated:
            (up,) = self.inp(x, step)
            return self.out(self.activation(up), step)
        gate, up = self.inp(x, step)
        if isinstance(self.activation, nn.SiLU):
            return self.out(silu_times(gate, up), step)
        return self.out(self.activation(gate) * up, step)
