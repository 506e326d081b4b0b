"""The feed-forward part: position-wise maps from the model dimension and back."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, SerializeAsAny, model_validator
from torch import Tensor, nn

from ..core.registry import Registry
from ..core.spec import Part
from .activations import Activation, SiLU, silu_times
from .linear import Linear, Projections
from .step import Step


class FFN(Part, registry=Registry("ffn", "trivium.nn")):
    """Root of the feed-forward parts: `build(dim)` gives a module called as `ffn(x, step)`, [B, T, C] -> [B, T, C]."""

    def build(self, dim: int) -> FFNModule:
        raise AssertionError


class FFNModule(nn.Module):
    """A built feed-forward part. `layer`: the number of the layer that holds it, which that layer sets."""

    layer = 0


class MLP(FFN):
    """out(act(gate(x)) * up(x)), the gated form of arXiv:2002.05202: SwiGLU with `silu`, GeGLU with `gelu`, ReGLU with
    `relu`. Not `gated`, the plain out(act(up(x))) of arXiv:1706.03762, which has no map called gate.

    `limit` and `shift` are gpt-oss's: act(min(gate, limit)) * (clamp(up, -limit, limit) + shift).
    """

    kind: Literal["mlp"] = "mlp"
    hidden: int = Field(gt=0, description="width inside")
    activation: SerializeAsAny[Activation] = Field(SiLU(), description="what is applied to the gate; to up where there is none")
    gated: bool = Field(True, description="whether a second map is multiplied in")
    bias: bool = Field(False, description="biases on all maps")
    limit: float | None = Field(None, gt=0, description="the gate is at most this before its activation, up lies within it on both sides")
    shift: float = Field(0.0, description="added to up before it is multiplied in")

    @classmethod
    def tiny(cls) -> MLP:
        return cls(hidden=40)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.gated and (self.limit is not None or self.shift):
            raise ValueError("limit and shift are of gated forms")
        return self

    def build(self, dim: int) -> FeedForward:
        return FeedForward(self, dim)


class FeedForward(FFNModule):
    def __init__(self, spec: MLP, dim: int):
        super().__init__()
        self.spec = spec
        names = ("gate", "up") if spec.gated else ("up",)
        self.inp = Projections(**{name: Linear(dim, spec.hidden, bias=spec.bias) for name in names})
        self.activation = spec.activation.build()
        self.out = Linear(spec.hidden, dim, bias=spec.bias)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        spec = self.spec
        if not spec.gated:
            (up,) = self.inp(x, step)
            return self.out(self.activation(up), step)
        gate, up = self.inp(x, step)
        if spec.limit is not None:
            gate, up = gate.clamp(max=spec.limit), up.clamp(-spec.limit, spec.limit)
        if spec.shift:
            up = up + spec.shift
        if isinstance(self.activation, nn.SiLU):
            return self.out(silu_times(gate, up), step)
        return self.out(self.activation(gate) * up, step)
