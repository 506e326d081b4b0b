"""Multi-head, grouped and multi-query attention: one module, told apart by the number of kv heads.

arXiv:1706.03762 (multi-head), arXiv:1911.02150 (multi-query), arXiv:2305.13245 (grouped).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, SerializeAsAny, model_validator
from torch import Tensor, nn

from ..core.registry import Registry
from ..core.spec import Part, Spec
from .backends import attend, backends
from .linear import Linear, Projections
from .patterns import Full, Pattern
from .positions import Position
from .products import Product
from .step import Step
from .store import Handle, PerToken, State


class Mixer(Part, registry=Registry("mixer", "trivium.nn")):
    """Root of the parts that mix positions: `build(dim)` gives a `MixerModule`."""

    def build(self, dim: int) -> MixerModule:
        raise AssertionError


class MixerModule(nn.Module):
    """A built mixer: `mixer(x [B, T, C], step, handle) -> [B, T, C]`, and the state that it keeps for decoding."""

    def state(self) -> State:
        """What a store must keep for this layer."""
        raise AssertionError

    def products(self, step: Step, flows: Mapping[str, bool]) -> list[Product]:
        """The matrix products of `step` beside those of the linear maps. `flows`: which maps' outputs have gradients."""
        raise AssertionError


class Scores(Spec):
    """How query-key products become scores."""

    scale: float | None = Field(None, description="what products are multiplied by; head_dim ** -0.5 if none is given")


class Attention(Mixer):
    """softmax(q k^T * scale) v over the positions that causality, pattern and documents leave in sight."""

    kind: Literal["attention"] = "attention"
    heads: int = Field(gt=0, description="query heads")
    kv_heads: int = Field(gt=0, description="key and value heads: equal to heads is multi-head, 1 is multi-query")
    head_dim: int = Field(gt=0, description="width of one head")
    bias: tuple[Literal["q", "k", "v", "out"], ...] = Field((), description="which maps have a bias")
    position: SerializeAsAny[Position] | None = Field(None, description="what is done to queries and keys so that order matters")
    pattern: SerializeAsAny[Pattern] = Field(Full(), description="which positions are in reach")
    scores: Scores = Field(Scores(), description="how products become scores")
    dropout: float = Field(0.0, ge=0, lt=1, description="chance of an attention weight to be dropped, in training (by eager)")

    @classmethod
    def tiny(cls) -> Attention:
        return cls(heads=6, kv_heads=2, head_dim=8)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        return self

    def build(self, dim: int) -> MixerModule:
        return AttentionMixer(self, dim)


class AttentionMixer(MixerModule):
    def __init__(self, spec: Attention, dim: int):
        super().__init__()
        self.spec = spec
        self.scale = spec.head_dim**-0.5 if spec.scores.scale is None else spec.scores.scale
        self.backend = "auto"
        kv = spec.kv_heads * spec.head_dim
        self.inp = Projections(
            q=Linear(dim, spec.heads * spec.head_dim, bias="q" in spec.bias),
            k=Linear(dim, kv, bias="k" in spec.bias),
            v=Linear(dim, kv, bias="v" in spec.bias),
        )
        self.out = Linear(spec.heads * spec.head_dim, dim, bias="out" in spec.bias)

    def state(self) -> State:
        entry = PerToken((self.spec.kv_heads, self.spec.head_dim))
        return {"k": entry, "v": entry}

    def products(self, step: Step, flows: Mapping[str, bool]) -> list[Product]:
        flops = 2 * self.spec.heads * self.spec.head_dim * step.view(window=self.spec.pattern.window).pairs
        scores = Product(flops, left=flows["q"], right=flows["k"])
        return [scores, Product(flops, left=scores.left or scores.right, right=flows["v"])]

    def forward(self, x: Tensor, step: Step, handle: Handle) -> Tensor:
        spec, (batch, count, _) = self.spec, x.shape
        q, k, v = (y.view(batch, count, -1, spec.head_dim).transpose(1, 2) for y in self.inp(x, step))
        if spec.position is not None:
            q, k = spec.position.apply(q, k, step)
        k, v = handle.extend(k=k, v=v)
        view = step.view(window=spec.pattern.window)
        dropout = spec.dropout if self.training else 0.0
        mixed = attend(q, k, v, view, scale=self.scale, backend=self.backend, dropout=dropout)
        return self.out(mixed.transpose(1, 2).reshape(batch, count, -1), step)


def use_backend(model: nn.Module, name: str) -> None:
    """Compute every attention layer of `model` with the backend `name`; an unknown name is an error that lists them."""
    backends.get(name)
    for module in model.modules():
        if isinstance(module, AttentionMixer):
            module.backend = name
