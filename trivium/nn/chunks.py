"""What chunked scans share: time cut into chunks, and decay between the places of one.

A recurrence S_t = exp(g_t) S_{t-1} + k_t v_t^T is computed as products within chunks and a short loop over their states
(arXiv:2312.06635, arXiv:2405.21060). Decays stay in log space until all of a stretch are summed, so none overflows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import OwnStart

SIZE = 64  # places of one chunk: products inside grow with it, the loop over states shrinks


def chunk_size(length: int) -> int:
    """Of a document of this length: short ones are one chunk."""
    return min(SIZE, length)


def in_chunks(x: Tensor, size: int, groups: int) -> Tensor:
    """[N, L, H, ...] -> [N, n, K, H / K, size, ...] in float32, K = `groups`; the last chunk is filled up with zeros."""
    count = -(-x.shape[1] // size)
    x = F.pad(x.float(), (0, 0) * (x.dim() - 2) + (0, count * size - x.shape[1]))
    return x.unflatten(1, (count, size)).movedim(2, 3).unflatten(2, (groups, -1))


def from_chunks(y: Tensor, length: int) -> Tensor:
    """[N, n, K, H / K, size, E] -> [N, length, H, E]."""
    return y.flatten(2, 3).movedim(3, 2).flatten(1, 2)[:, :length]


def decays(log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From log decays [..., size], what is left at place i of what came at j, [..., size (i), size (j)], zero for j > i; what is
    left at each place of what came before the chunk, and at its end of what came at each place, [..., size, 1]. Each is summed
    on its own: the difference of two long sums has lost what a short one is."""
    size = log_decay.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=log_decay.device)
    between = torch.where(ones.tril(-1), log_decay[..., None], 0.0).cumsum(-2).masked_fill(ones.triu(1), float("-inf")).exp()
    until = F.pad(log_decay[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1).exp()
    return between, log_decay.cumsum(-1).exp()[..., None], until[..., None]


class Decay(OwnStart):
    """How long each head waits and how much it forgets meanwhile: dt = softplus(x + dt_bias), kept within `limit`, and the
    log decay -exp(A_log) * dt, [..., H] each, in float32.

    Starts with A from 1 to 16 and dt from 0.001 to 0.1 (its logarithms evenly spaced) over the heads, dt in the other order
    than A: spreads that stand for the papers' random draws (arXiv:2405.21060).
    """

    def __init__(self, heads: int, limit: tuple[float, float | None] = (0.0, None)):
        super().__init__()
        self.limit = limit
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dt = F.softplus(x.float() + self.dt_bias.float())
        if self.limit != (0.0, None):
            dt = dt.clamp(*self.limit)
        return dt, -self.A_log.float().exp() * dt

    def reset(self) -> None:
        with torch.no_grad():
            self.A_log.copy_(torch.linspace(1.0, 16.0, len(self.A_log)).log())
            self.dt_bias.copy_(spread_dt(len(self.dt_bias)).flip(0))


def spread_dt(count: int) -> Tensor:
    """Biases [count] under which softplus(bias) runs from 0.001 to 0.1, its logarithms evenly spaced (arXiv:2312.00752)."""
    dt = torch.logspace(-3, -1, count)
    return dt + torch.log(-torch.expm1(-dt))
