"""Connectors: from what a vision encoder says of an image to vectors that a language model reads.

A small feed-forward net for each patch (LLaVA, arXiv:2310.03744), or the Perceiver resampler of Flamingo (arXiv:2204.14198):
a fixed number of learned latents reads however many patches there are, beside one another.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from ..core.registry import Registry
from ..core.spec import Part
from .activations import GELU, Activation, SquaredReLU
from .attention import split_heads
from .backends import backends
from .feedforward import MLP
from .linear import Linear, Projections
from .norms import Layer, Norm
from .step import Step


class Connector(Part, registry=Registry("connector", "trivium.nn")):
    """Root of the connectors: `build(inputs, outputs)` gives a module `connector(x [N, P, inputs], step) -> [N, count(P), outputs]`."""

    def count(self, patches: int) -> int:
        """How many vectors an image of so many patches becomes."""
        raise AssertionError

    def build(self, inputs: int, outputs: int) -> nn.Module:
        raise AssertionError


class MLPConnector(Connector):
    """out(act(up(x))), of each patch alone."""

    kind: Literal["mlp"] = "mlp"
    hidden: int | None = Field(None, gt=0, description="width inside; that of what comes out if none is given")
    activation: SerializeAsAny[Activation] = Field(GELU(), description="what stands between the two maps")
    bias: bool = Field(True, description="biases on both maps")

    @classmethod
    def tiny(cls) -> MLPConnector:
        return cls(hidden=20)

    def count(self, patches: int) -> int:
        return patches

    def build(self, inputs: int, outputs: int) -> nn.Module:
        return MLPModule(self, inputs, outputs)


class MLPModule(nn.Module):
    def __init__(self, spec: MLPConnector, inputs: int, outputs: int):
        super().__init__()
        hidden = spec.hidden or outputs
        self.up = Linear(inputs, hidden, bias=spec.bias)
        self.activation = spec.activation.build()
        self.out = Linear(hidden, outputs, bias=spec.bias)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        return self.out(self.activation(self.up(x, step)), step)


class Resampler(Connector):
    """`latents` vectors that, `depth` times, attend to the patches and to one another, and pass a feed-forward part. A last map
    stands where what comes out has another width."""

    kind: Literal["resampler"] = "resampler"
    latents: int = Field(gt=0, description="vectors that an image becomes")
    depth: int = Field(6, gt=0, description="how many layers")
    heads: int = Field(gt=0, description="heads of the attention")
    head_dim: int = Field(gt=0, description="width of one head")
    hidden: int = Field(gt=0, description="width inside the feed-forward part")
    activation: SerializeAsAny[Activation] = Field(SquaredReLU(), description="that of the feed-forward part")
    norm: SerializeAsAny[Norm] = Field(Layer(), description="every norm, but those of queries and keys")
    qk_norm: SerializeAsAny[Norm] | None = Field(None, description="the norm of each head's queries and keys")

    @classmethod
    def tiny(cls) -> Resampler:
        return cls(latents=3, depth=2, heads=2, head_dim=6, hidden=20)

    def count(self, patches: int) -> int:
        return self.latents

    def build(self, inputs: int, outputs: int) -> nn.Module:
        return ResamplerModule(self, inputs, outputs)


class Latents(nn.Module):
    """[count, C]."""

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim))


class ResamplerModule(nn.Module):
    def __init__(self, spec: Resampler, inputs: int, outputs: int):
        super().__init__()
        self.latents = Latents(spec.latents, inputs)
        self.layers = nn.ModuleList(ResamplerLayer(spec, inputs) for _ in range(spec.depth))
        self.norm = spec.norm.build(inputs)
        self.out = Linear(inputs, outputs) if inputs != outputs else None

    def forward(self, x: Tensor, step: Step) -> Tensor:
        latents = self.latents.weight.expand(len(x), -1, -1)
        for layer in self.layers:
            latents = layer(latents, x, step)
        latents = self.norm(latents)
        return latents if self.out is None else self.out(latents, step)


class ResamplerLayer(nn.Module):
    def __init__(self, spec: Resampler, dim: int):
        super().__init__()
        self.spec = spec
        wide = spec.heads * spec.head_dim
        self.context_norm, self.latents_norm = spec.norm.build(dim), spec.norm.build(dim)
        self.inp = Projections(q=Linear(dim, wide))
        self.memory = Projections(k=Linear(dim, wide), v=Linear(dim, wide))
        self.out = Linear(wide, dim)
        if spec.qk_norm is not None:
            self.norms = nn.ModuleDict({name: spec.qk_norm.build(spec.head_dim) for name in "qk"})
        self.ffn_norm = spec.norm.build(dim)
        self.ffn = MLP(hidden=spec.hidden, activation=spec.activation, gated=False).build(dim)

    def forward(self, latents: Tensor, context: Tensor, step: Step) -> Tensor:
        """latents [N, L, C] read context [N, P, C] and themselves."""
        spec, x = self.spec, self.latents_norm(latents)
        both = torch.cat([self.context_norm(context), x], 1)
        q, k, v = (split_heads(y, spec.head_dim) for y in (*self.inp(x, step), *self.memory(both, step)))
        if spec.qk_norm is not None:
            q, k = self.norms["q"](q), self.norms["k"](k)
        mixed = backends.get("auto")(q, k, v, scale=spec.head_dim**-0.5, causal=False, mask=None)
        latents = latents + self.out(mixed.transpose(1, 2).flatten(2), step)
        return latents + self.ffn(self.ffn_norm(latents), step)
