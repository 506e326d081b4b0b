"""Infini-attention (arXiv:2404.07143): softmax within a segment, and a linear-attention memory of all segments before it.

Each head's gate mixes the two. The memory is a sum of sigma(k) v^T with sigma = elu + 1, read by sigma(q) and divided by the
sum of sigma(k); the delta form adds only what the memory does not say already. Its keys and queries know no positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .attention import MixerModule
from .keepers import Fixed
from .linear import OwnStart
from .linear_attention import extents
from .memory import Segmented, SegmentMixer
from .positions import Rope
from .products import Product
from .recurrent import States
from .step import Step


class Infini(Segmented):
    """Causal attention within segments of `size`, and a memory of head_dim x head_dim for each kv head."""

    kind: Literal["infini"] = "infini"
    update: Literal["linear", "delta"] = Field("delta", description="what a segment adds: its values, or what they differ by")

    @classmethod
    def tiny(cls) -> Infini:
        return cls(heads=6, kv_heads=2, head_dim=8, position=Rope(base=50.0), size=4, through=True)

    def build(self, dim: int) -> MixerModule:
        return InfiniMixer(self, dim)


class InfiniMixer(SegmentMixer):
    spec: Infini

    def __init__(self, spec: Infini, dim: int):
        super().__init__(spec, dim)
        self.gate = Gate(spec.heads)

    def memory(self) -> dict[str, Fixed]:
        heads, width = self.spec.kv_heads, self.spec.head_dim
        return {"sum": Fixed((heads, width, width), torch.float32), "norm": Fixed((heads, width), torch.float32)}

    def read(self, q: Tensor, k: Tensor, v: Tensor, memory: States, *, seen: int, step: Step) -> Tensor:
        share = self.gate.weight.float().sigmoid()[:, None, None]
        out = (1 - share) * self.local(q, k, v, step=step)  # [N, H, t, D]
        if seen >= self.spec.size:
            grouped = _sigma(q).transpose(1, 2).unflatten(1, (self.spec.kv_heads, -1)).flatten(2, 3)  # [N, K, H / K * t, D]
            out = out + share * _recalled(grouped, memory).view(out.shape)
        return out.to(q.dtype).transpose(1, 2)

    def absorb(self, k: Tensor, v: Tensor, memory: States, *, seen: int) -> States:
        total, norm = memory
        keys, values = _sigma(k).transpose(1, 2), v.float().transpose(1, 2)  # [N, K, size, D]
        if self.spec.update == "delta" and seen > self.spec.size:
            values = values - _recalled(keys, memory)
        return total + keys.transpose(-1, -2) @ values, norm + keys.sum(2)

    def products(self, step: Step, flows: Mapping[str, bool]) -> list[Product]:
        spec, made = self.spec, []
        q, k, v = flows["q"], flows["k"] and self.spec.through, flows["v"] and self.spec.through
        for rows, length in extents(step):
            seen, end = step.slots.start, step.slots.start + length
            for fill, count in self.pieces(seen, length):
                made += self.local_products(rows, count, fill + count, flows)
                if seen >= spec.size:
                    made.append(Product(2 * rows * spec.heads * count * spec.head_dim**2, q, k or v))
                seen += count
                if fill + count == spec.size:
                    flops, later = 2 * rows * spec.kv_heads * spec.size * spec.head_dim**2, seen < end
                    if spec.update == "delta" and seen > spec.size:
                        made.append(Product(flops, k and later, (k or v) and later))
                    made.append(Product(flops, k and later, v and later))
        return made


class Gate(OwnStart):
    """One number for each head: the share of the memory is its sigmoid."""

    def __init__(self, heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads))

    def reset(self) -> None:
        nn.init.zeros_(self.weight)


def _sigma(x: Tensor) -> Tensor:
    x = x.float()
    return F.relu(x) + x.clamp(max=0).exp()  # elu(x) + 1, without losing what is far below 0


def _recalled(keys: Tensor, memory: States) -> Tensor:
    """What the memory says: keys or queries [N, K, n, D], as sigma gives them -> [N, K, n, D]."""
    total, norm = memory
    return keys @ total / (keys * norm[:, :, None]).sum(-1, keepdim=True).clamp_min(1e-6)
