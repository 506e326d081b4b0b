"""Cross-attention: queries of the text, keys and values of a memory, such as an encoder's output (arXiv:1706.03762).

Keys and values are computed from the memory in the first forward and kept; the memory's padding is masked. Every document
of a row reads the row's whole memory; or, where images stand between texts, the part of the last one (arXiv:2204.14198).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field, SerializeAsAny, model_validator
from torch import Tensor, nn

from ..core.errors import ConfigError
from .attention import Mixer, MixerModule, split_heads
from .backends import backends, dropping, eager_weights, weighted
from .keepers import Fixed, Once, State
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
    latest: int | None = Field(
        None,
        ge=0,
        description="a token for each part of the memory: what follows it reads that part alone, what precedes all reads nothing",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="chance of an attention weight to be dropped, in training (by eager)")

    @classmethod
    def tiny(cls) -> CrossAttention:
        return cls(heads=6, kv_heads=2, head_dim=8, memory_dim=20)

    @classmethod
    def exempted(cls) -> CrossAttention:
        return cls.tiny().replace(latest=7)

    @property
    def exempt(self) -> Mapping[str, str]:
        return {} if self.latest is None else {"packing": "latest: parts of the memory are counted through a row, whatever its documents"}

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
        return {"k": Once(), "v": Once(), **({} if self.spec.latest is None else {"parts": Fixed((), torch.int64)})}

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
        mask = self._mask(step, k.shape[2], handle)
        if step.wants_weights:
            weights = step.aux.cross[self.place.index] = eager_weights(q, k, scale=self.scale, causal=False, mask=mask)
            mixed = weighted(weights, v)
        elif self.training and spec.dropout:
            if self.backend not in ("auto", "eager"):
                message = f"the attention backend {self.backend!r} cannot drop weights; use 'eager' or 'auto', or set dropout to 0"
                raise ConfigError(message, field="dropout", value=spec.dropout)
            mixed = dropping(spec.dropout)(q, k, v, scale=self.scale, causal=False, mask=mask)
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

    def _mask(self, step: Step, size: int, handle: Handle) -> Tensor | None:
        """[B, 1, 1|T, M] bool: which of the memory's `size` places each token reads; None: all."""
        segments, latest = step.memory_segments, self.spec.latest
        real = None if segments is None else (segments >= 0)[:, None, None]
        if latest is None:
            return real
        if step.inputs.tokens is None:
            raise ConfigError("which part of the memory is read shows in the tokens: give tokens, not embeds", field="latest")
        marks = step.inputs.tokens == latest
        if step.segments is not None:
            marks = marks & (step.segments >= 0)
        count = marks.long().cumsum(1)  # [B, T]: how many parts have begun
        if (before := handle.read("parts")) is not None:
            count = count + before[:, None]
        handle.write(parts=count[:, count.shape[1] - handle.wanted :])
        if segments is None:
            segments = count.new_zeros(len(count), size)
        mask = (segments[:, None] == count[:, :, None] - 1)[:, None]
        return mask if real is None else mask & real

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return x if self.spec.qk_norm is None else self.norms[name](x)
