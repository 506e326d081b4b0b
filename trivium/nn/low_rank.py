"""Low-rank attention: a learned map along the length makes `rank` keys and values of `size` tokens (Linformer, arXiv:2006.04768).

Not causal, a document up to `size` tokens is read through `rank` keys, so that work grows with its length alone. Causal,
which Linformer is not, a query reads its own segment as it is, and of earlier ones the last `blocks` by `rank` keys each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from .attention import MixerModule
from .backends import backends
from .keepers import Fixed
from .linear import OwnStart
from .linear_attention import each_document, extents, refuse_cache
from .memory import Segmented, SegmentMixer
from .positions import Rope
from .products import Product
from .recurrent import States
from .step import Step
from .store import Handle


class LowRank(Segmented):
    """Attention over projected keys and values. The maps are shared by all heads; those of keys and of values may be one."""

    kind: Literal["low_rank"] = "low_rank"
    rank: int = Field(gt=0, description="keys and values that stand for a segment")
    blocks: int = Field(1, ge=0, description="earlier segments that are seen, where attention is causal")
    one_map: bool = Field(False, description="whether keys and values are projected by the same map")
    through: bool = Field(True, description="whether gradients flow into earlier segments")

    @classmethod
    def tiny(cls) -> LowRank:
        return cls(heads=6, kv_heads=2, head_dim=8, position=Rope(base=50.0), size=4, rank=2, blocks=2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rank > self.size:
            raise ValueError(f"rank ({self.rank}) is at most size ({self.size})")
        return self

    def build(self, dim: int) -> MixerModule:
        return LowRankMixer(self, dim)


class LowRankMixer(SegmentMixer):
    spec: LowRank
    placed = False

    def __init__(self, spec: LowRank, dim: int):
        super().__init__(spec, dim)
        self.maps = nn.ModuleDict({name: LengthMap(spec) for name in ("k" if spec.one_map else "kv")})

    def forward(self, x: Tensor, step: Step, handle: Handle) -> Tensor:
        if step.causal:
            return super().forward(x, step, handle)
        refuse_cache(step, self.spec.kind)
        return self.out(each_document(self._whole, self.heads(x, step), step).flatten(2), step)

    def heads(self, x: Tensor, step: Step) -> list[Tensor]:
        q, k, v = super().heads(x, step)
        if self.spec.position is not None:
            q, k = (self.spec.position.turn(y.transpose(1, 2), step).transpose(1, 2) for y in (q, k))
        return [q, k, v]

    def _whole(self, inputs: tuple[Tensor, ...], real: Tensor | None) -> Tensor:
        """Documents [N, L, ...] that are there at once, of which `real` [N, L] are tokens."""
        q, k, v = inputs
        size, mask = self.spec.size, None
        if real is not None:
            k, v = (x * real[..., None, None] for x in (k, v))
            mask = real[:, ::size].repeat_interleave(self.spec.rank, 1)[:, None, None]
        k, v = (self._projected(F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size)), name) for x, name in ((k, "k"), (v, "v")))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return backends.get(self.backend)(q, k, v, scale=self.scale, causal=False, mask=mask).transpose(1, 2)

    def _projected(self, x: Tensor, name: str) -> Tensor:
        """[N, n * size, K, D] -> [N, n * rank, K, D]."""
        found = self.maps["k" if self.spec.one_map else name](x.unflatten(1, (-1, self.spec.size)).flatten(3))
        return found.flatten(1, 2).unflatten(2, x.shape[2:])

    def memory(self) -> dict[str, Fixed]:
        entry = Fixed((self.spec.blocks * self.spec.rank, self.spec.kv_heads, self.spec.head_dim))
        return {"earlier_k": entry, "earlier_v": entry} if self.spec.blocks else {}

    def held(self, seen: int) -> int:
        """How many keys stand for earlier segments after this many tokens."""
        return min(seen // self.spec.size, self.spec.blocks) * self.spec.rank

    def read(self, q: Tensor, k: Tensor, v: Tensor, memory: States, *, seen: int, step: Step) -> Tensor:
        held = self.held(seen)
        if held:
            k, v = (torch.cat([kept[:, :held].to(own.dtype), own], 1) for kept, own in zip(memory, (k, v), strict=True))
        return self.local(q, k, v, step=step).transpose(1, 2)

    def absorb(self, k: Tensor, v: Tensor, memory: States, *, seen: int) -> States:
        if not memory:
            return memory
        held, room = self.held(seen - self.spec.size), self.spec.blocks * self.spec.rank
        made = []
        for kept, own, name in zip(memory, (k, v), "kv", strict=True):
            line = torch.cat([kept[:, :held].to(own.dtype), self._projected(own, name)], 1)[:, -room:]
            made.append(F.pad(line, (0, 0, 0, 0, 0, room - line.shape[1])))
        return tuple(made)

    def products(self, step: Step, flows: Mapping[str, bool]) -> list[Product]:
        spec, made = self.spec, []
        entry = 2 * spec.rank * spec.size * spec.kv_heads * spec.head_dim
        trained = next(self.maps.parameters()).requires_grad
        for rows, length in extents(step):
            if not step.causal:
                count = -(-length // spec.size)
                made += [Product(rows * count * entry, trained, flows[name]) for name in "kv"]
                flops = 2 * rows * spec.heads * length * count * spec.rank * spec.head_dim
                scores = Product(flops, flows["q"], flows["k"] or trained)
                made += [scores, Product(flops, scores.left or scores.right, flows["v"] or trained)]
                continue
            seen, end = step.slots.start, step.slots.start + length
            for fill, count in self.pieces(seen, length):
                made += self.local_products(rows, count, self.held(seen) + fill + count, flows)
                seen += count
                if spec.blocks and fill + count == spec.size:
                    later = seen < end
                    made += [Product(rows * entry, trained and later, flows[name] and spec.through and later) for name in "kv"]
        return made


class LengthMap(OwnStart):
    """[rank, size]. It starts as means of equal stretches of the segment: with as many as there are tokens, the identity."""

    def __init__(self, spec: LowRank):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.rank, spec.size))

    def forward(self, x: Tensor) -> Tensor:
        """[N, n, size, C] -> [N, n, rank, C]."""
        return self.weight @ x

    def reset(self) -> None:
        with torch.no_grad():
            rank, size = self.weight.shape
            row = torch.arange(size) * rank // size
            own = (row == torch.arange(rank)[:, None]).to(self.weight.dtype)
            self.weight.copy_(own / own.sum(1, keepdim=True))
