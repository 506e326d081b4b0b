"""Cross-attention: queries of the text, keys and values of a memory, such as an encoder's output (arXiv:1706.03762).

Keys and values are computed from the memory in the first forward and kept; the memory's padding is masked. Every document
of a row reads the row's whole memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, SerializeAsAny, model_validator
from torch import Tensor, nn

from ..core.errors import ConfigError
from .attention import Mixer, MixerModule, split_heads
from .backends import backends, eager_weights, weighted
from .keepers import Once, State
from .linear import Linear, Projections
from .norms import Norm
from .products import Product
from .step import Step
from .store import Handle


class CrossAttention(Mixer):
    """softmax(q k^T * scale) v, q from the stream, k and v from the memory."""

    kind: Literal["cross"] = "cross"
    heads: int = Field(gt=0, description="query heads")
    kv_heads: int = Field(gt=0, description="key and value heads")
    head_dim: int = Field(gt=0, description="width of one head")
    memory_dim: int | None = Field(None, gt=0, description="width of the memory; that of the model if none is given")
    bias: tuple[Literal["q", "k", "v", "out"], ...] = Field((), description="which maps have a bias")
    qk_norm: SerializeAsAny[Norm] | None = Field(None, description="the norm of each head's queries and keys")
    scale: float | None = Field(None, description="what products are multiplied by; head_dim ** -0.5 if none is given")

    @classmethod
    def tiny(cls) -> CrossAttention:
        return cls(heads=6, kv_heads=2, head_dim=8, memory_dim=20)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        return self

    def build(self, dim: int) -> MixerModule:
        return CrossMixer(self, dim)


class CrossMixer(MixerModule):
    def __init__(self, spec: CrossAttention, dim: int):
        super().__init__()
        self.spec = spec
        self.scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        kv, source = spec.kv_heads * spec.head_dim, spec.memory_dim or dim
        self.inp = Projections(q=Linear(dim, spec.heads * spec.head_dim, bias="q" in spec.bias))
        self.memory = Projections(k=Linear(source, kv, bias="k" in spec.bias), v=Linear(source, kv, bias="v" in spec.bias))
        self.out = Linear(spec.heads * spec.head_dim, dim, bias="out" in spec.bias)
        if spec.qk_norm is not None:
            self.norms = nn.ModuleDict({name: spec.qk_norm.build(spec.head_dim) for name in "qk"})

    def state(self) -> State:
        return {"k": Once(), "v": Once()}

    def products(self, step: Step, flows: Mapping[str, bool]) -> list[Product]:
        assert step.inputs.memory is not None
        flops = 2 * self.spec.heads * self.spec.head_dim * step.inputs.shape.numel() * step.inputs.memory.shape[1]
        flow = {
            name: step.inputs.memory.requires_grad or any(p.requires_grad for p in module.parameters())
            for name, module in self.memory.named_children()
        }
        scores = Product(flops, left=flows["q"], right=flow["k"])
        return [scores, Product(flops, left=scores.left or scores.right, right=flow["v"])]

    def forward(self, x: Tensor, step: Step, handle: Handle) -> Tensor:
        spec = self.spec
        (q,) = self.inp(x, step)
        q = self._norm("q", split_heads(q, spec.head_dim))
        k, v = self._read(step, handle)
        segments = step.memory_segments
        mask = None if segments is None else (segments >= 0)[:, None, None]
        if step.wants_weights:
            weights = step.aux.cross[self.place.index] = eager_weights(q, k, scale=self.scale, causal=False, mask=mask)
            mixed = weighted(weights, v)
        else:
            mixed = backends.get(self.backend)(q, k, v, scale=self.scale, causal=False, mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(*x.shape[:-1], -1), step)

    def _read(self, step: Step, handle: Handle) -> tuple[Tensor, Tensor]:
        """Keys and values of the memory, [B, K, M, D]."""
        held = handle.once("k"), handle.once("v")
        if held[0] is not None and held[1] is not None:
            return held[0], held[1]
        if step.inputs.memory is None:
            raise ConfigError("this model reads a memory, such as an encoder's output: give Inputs(memory=...) [B, M, C]", field="memory")
        k, v = (split_heads(y, self.spec.head_dim) for y in self.memory(step.inputs.memory, step))
        k = self._norm("k", k)
        handle.write_once(k=k, v=v)
        return k, v

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return x if self.spec.qk_norm is None else self.norms[name](x)
