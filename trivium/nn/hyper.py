"""Hyper-connections (arXiv:2409.19606): several residual streams, which each sublayer reads, mixes and writes by learned maps.

Constrained (mHC, arXiv:2512.24880; DeepSeek-V4), the mixing matrix is made doubly stochastic by Sinkhorn's iteration:
no product of such matrices grows a signal, however deep the stack. Without it, depth multiplies gains. Streams start as
copies of the embedding and end as their sum or mean; V4's learned weights for that end are left out.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .linear import OwnStart
from .products import Multiplies, Product
from .residual import Join, Residual


class Hyper(Residual):
    """n streams x [B, T, n, C]: the sublayer reads sum_i pre_i x_i, and stream k becomes sum_j mix_jk x_j + post_k y.

    The maps are constants of the layer, and if `dynamic` also functions of the streams. Constrained: pre in (0, 1), post in
    (0, 2), mix doubly stochastic, from all of a token's streams together. Not constrained: any values, each stream's from itself.
    """

    kind: Literal["hyper"] = "hyper"
    streams: int = Field(4, gt=0, description="how many residual streams there are")
    constrained: bool = Field(True, description="whether mixing is doubly stochastic (mHC)")
    dynamic: bool = Field(True, description="whether maps depend on the streams")
    rounds: int = Field(20, gt=0, description="of Sinkhorn's iteration, where constrained")
    eps: float = Field(1e-6, gt=0, description="added to what Sinkhorn divides by, and to pre, where constrained")
    norm_eps: float = Field(1e-6, gt=0, description="added to the mean square of what the maps are computed from")
    end: Literal["sum", "mean"] = Field("sum", description="what the streams become after the last layer")

    @classmethod
    def tiny(cls) -> Hyper:
        return cls(streams=3)

    @property
    def width(self) -> int:
        return self.streams

    def build(self, dim: int) -> Join:
        return HyperConnection(self, dim)

    def open(self, x: Tensor) -> Tensor:
        return x[..., None, :].expand(*x.shape[:-1], self.streams, -1)

    def close(self, x: Tensor) -> Tensor:
        return x.sum(-2) if self.end == "sum" else x.mean(-2)


class Maps(NamedTuple):
    """How one sublayer joins n streams: `pre` [..., n], `post` [..., n], `mix` [..., n, n], from stream (row) to stream."""

    pre: Tensor
    post: Tensor
    mix: Tensor


class HyperConnection(Join, Multiplies):
    """`weight`: constrained [(2 + n) n, n C], else [2 + n, C] for every stream alike. Maps are float32 whatever the dtype."""

    def __init__(self, spec: Hyper, dim: int):
        super().__init__()
        self.spec, self.dim, n = spec, dim, spec.streams
        self.start = Start(self)
        self.weight = (
            nn.Parameter(torch.empty((2 + n) * n, n * dim) if spec.constrained else torch.empty(2 + n, dim)) if spec.dynamic else None
        )

    def settle(self, number: int) -> None:
        self.start.number = number

    def maps(self, x: Tensor) -> Maps:
        """Of streams x [B, T, n, C]."""
        n = self.spec.streams
        base = Maps(*self.start.base.float().split([n, n, n * n]))
        if self.weight is None:
            raw = base
        else:
            assert self.start.scale is not None
            raw = Maps(*(s * w + b for s, w, b in zip(self.start.scale.float(), self._moving(x), base, strict=True)))
        pre, post, mix = raw.pre, raw.post, raw.mix.unflatten(-1, (n, n))
        if not self.spec.constrained:
            return Maps(pre, post, mix)
        return Maps(pre.sigmoid() + self.spec.eps, 2 * post.sigmoid(), sinkhorn(mix, rounds=self.spec.rounds, eps=self.spec.eps))

    def _moving(self, x: Tensor) -> Maps:
        """What the streams say, before scales and constants; each flat."""
        spec, n = self.spec, self.spec.streams
        assert self.weight is not None
        seen = x.float() if not spec.constrained else x.flatten(-2).float()
        said = F.linear(seen * torch.rsqrt(seen.square().mean(-1, keepdim=True) + spec.norm_eps), self.weight.float())
        if spec.constrained:
            return Maps(*said.split([n, n, n * n], -1))
        pre, post, mix = said.tanh().split([1, 1, n], -1)
        return Maps(pre.flatten(-2), post.flatten(-2), mix.flatten(-2))

    def read(self, x: Tensor) -> tuple[Tensor, Maps]:
        maps = self.maps(x)
        return (maps.pre[..., None] * x).sum(-2).to(x.dtype), maps

    def write(self, x: Tensor, y: Tensor, read: Maps) -> Tensor:
        written = read.post.to(x.dtype)[..., None] * y[..., None, :]
        return written + read.mix.to(x.dtype).transpose(-1, -2) @ x

    def multiplied(self, tokens: int, *, flowing: bool) -> list[Product]:
        n, learns = self.spec.streams, any(parameter.requires_grad for parameter in self.parameters())
        mixing = Product(2 * tokens * n * n * self.dim, learns or (flowing and self.spec.dynamic), flowing)
        if self.weight is None:
            return [mixing]
        # n * C inputs either way: to each of (2 + n) n maps, or of each stream to its own 2 + n
        flops = 2 * tokens * self.weight.numel() * (1 if self.spec.constrained else n)
        return [Product(flops, flowing, self.weight.requires_grad), mixing]


class Start(OwnStart):
    """The constants of one sublayer's maps, `base` [(2 + n) n], and where they move `scale` [3], of pre, post and mix."""

    def __init__(self, join: HyperConnection):
        super().__init__()
        self.spec, n = join.spec, join.spec.streams
        self.number = 0  # of joins before this one
        self.base = nn.Parameter(torch.empty((2 + n) * n))
        self.scale = nn.Parameter(torch.empty(3)) if join.spec.dynamic else None

    def reset(self) -> None:
        """So that streams that are alike stay alike, and their mean is what a plain residual would be. Not constrained, each
        sublayer reads one stream, the next one the next (section 2.3 of the paper)."""
        n = self.spec.streams
        pre, post, mix = torch.zeros(n), torch.ones(n), torch.eye(n)
        pre[self.number % n] = 1
        if self.spec.constrained:
            share = 1 / n if n > 1 else 0.9999
            pre, post, mix = torch.full((n,), math.log(share / (1 - share))), torch.zeros(n), 4 * mix
        with torch.no_grad():
            self.base.copy_(torch.cat([pre, post, mix.flatten()]))
        if self.scale is not None:
            nn.init.constant_(self.scale, 0.01)


def sinkhorn(scores: Tensor, *, rounds: int, eps: float) -> Tensor:
    """[..., n, n] -> the same, positive, rows and columns summing to 1 up to what `rounds` leave: softmax over rows, then
    columns and rows divided by their sums in turn, columns last (Sinkhorn and Knopp 1967)."""
    mix = scores.softmax(-1) + eps
    mix = mix / (mix.sum(-2, keepdim=True) + eps)
    for _ in range(rounds - 1):
        mix = mix / (mix.sum(-1, keepdim=True) + eps)
        mix = mix / (mix.sum(-2, keepdim=True) + eps)
    return mix
