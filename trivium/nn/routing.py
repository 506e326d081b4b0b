"""Routers: which experts each token goes to, and how much each one's answer counts.

A score for every expert, a choice of the highest, and weights from the scores of those chosen (arXiv:1701.06538). Softmax
scores as in arXiv:2101.03961 and 2401.04088; sigmoid scores, groups and the correction that balances load without a loss
as in arXiv:2412.19437 and 2408.15664. Scores are float32 whatever the model's dtype. Noise is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..core.spec import Spec
from .linear import OwnStart
from .products import Multiplies, Product


class Groups(Spec):
    """Experts lie in groups of neighbors, and a token's choice is among those of its best groups."""

    count: int = Field(gt=1, description="groups that the experts are divided into")
    chosen: int = Field(gt=0, description="groups that a token may choose from")
    rank: Literal["max", "top2"] = Field("top2", description="a group's score: its best expert's, or the sum of its two best")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.chosen > self.count:
            raise ValueError(f"chosen ({self.chosen}) is more than there are groups ({self.count})")
        return self


@dataclass(frozen=True)
class Routing:
    """What a router decided for N tokens. `logits` [N, E]; `scores` [N, E], not negative; `chosen` [N, K] experts;
    `weights` [N, K]. All float32 but `chosen`."""

    logits: Tensor
    scores: Tensor
    chosen: Tensor
    weights: Tensor

    def load(self, real: Tensor | None) -> Tensor:
        """[E] int64: how many tokens chose each expert; `real` [N] bool leaves out padding."""
        counts = torch.ones_like(self.chosen) if real is None else real[:, None].expand_as(self.chosen).to(self.chosen.dtype)
        return counts.new_zeros(self.scores.shape[1]).scatter_add(0, self.chosen.flatten(), counts.flatten())

    def balance(self, load: Tensor, real: Tensor | None) -> Tensor:
        """[]: tokens * E * sum over experts of (share of the tokens that chose it) * (mean score), arXiv:2101.03961
        equation 4: K for each token where all experts fare alike. Sigmoid scores are first divided by their sum. It is
        not linear in rows: a batch's is not the sum of its halves'."""
        scores = self.scores / (self.scores.sum(-1, keepdim=True) + 1e-20)
        if real is None:
            mean = scores.mean(0)
        else:
            mean = (scores * real[:, None]).sum(0) / real.sum().clamp(min=1)
        return scores.shape[1] * (load * mean).sum()

    def z(self, real: Tensor | None) -> Tensor:
        """[]: the sum over tokens of logsumexp(logits)^2, which keeps logits small (arXiv:2202.08906)."""
        squares = self.logits.logsumexp(-1).square()
        return squares.sum() if real is None else (squares * real).sum()


class Correction(OwnStart):
    """`weight` [E]: added to the scores when experts are chosen and nowhere else. No gradient reaches it: who trains adds
    up `load` over a batch, and then moves it (arXiv:2408.15664, algorithm 1)."""

    def __init__(self, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts), requires_grad=False)
        self.load: Tensor | None = None

    def see(self, load: Tensor) -> None:
        """Count in how many tokens of a micro-batch chose each expert [E]."""
        self.load = load if self.load is None else self.load + load

    @torch.no_grad()
    def move(self, speed: float) -> None:
        """By `speed`: up where an expert was chosen less than the mean, down where it was chosen more. Forgets the load."""
        assert self.load is not None, "nothing was seen since the last move"
        load = self.load.float()
        self.weight.add_((speed * (load.mean() - load).sign()).to(self.weight.dtype))
        self.load = None

    def reset(self) -> None:
        nn.init.zeros_(self.weight)


class Router(Multiplies):
    """x [N, C] -> `Routing`. `weight` [E, C]; `bias` [E], part of the logits; `correction`, see there."""

    def __init__(
        self,
        dim: int,
        experts: int,
        *,
        top_k: int,
        score: Literal["softmax", "sigmoid"] = "softmax",
        normalize: bool = True,
        scale: float = 1.0,
        groups: Groups | None = None,
        bias: bool = False,
        correction: bool = False,
    ):
        super().__init__()
        self.top_k, self.score, self.normalize, self.scale, self.groups = top_k, score, normalize, scale, groups
        self.weight = nn.Parameter(torch.empty(experts, dim))
        self.bias = nn.Parameter(torch.empty(experts)) if bias else None
        self.correction = Correction(experts) if correction else None

    def forward(self, x: Tensor) -> Routing:
        logits = F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        chosen = self._ranked(scores.detach()).topk(self.top_k, -1).indices
        weights = scores.gather(1, chosen)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # sigmoids can all be zero
        return Routing(logits, scores, chosen, weights * self.scale if self.scale != 1 else weights)

    def _ranked(self, scores: Tensor) -> Tensor:
        """What the choice goes by: [N, E] scores, corrected, and -inf outside of a token's groups."""
        groups = self.groups
        if self.correction is not None:
            scores = scores + self.correction.weight.float()
        if groups is None:
            return scores
        grouped = scores.unflatten(-1, (groups.count, -1))  # [N, G, E / G]
        best = grouped.amax(-1) if groups.rank == "max" else grouped.topk(2, -1).values.sum(-1)
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(groups.chosen, -1).indices, True)
        return grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(1)

    def multiplied(self, tokens: int, *, flowing: bool) -> list[Product]:
        return [Product(2 * tokens * self.weight.numel(), flowing, self.weight.requires_grad)]


@torch.no_grad()
def within_capacity(chosen: Tensor, real: Tensor | None, *, rows: int, experts: int, capacity: int) -> Tensor:
    """[N, K] bool: which choices an expert has room for when it takes `capacity` of each row (arXiv:2101.03961). Room goes
    to earlier tokens first, and to a token's choices from its first to its last: later tokens push nothing out. `real` [N]:
    padding takes no room."""
    queue = F.one_hot(chosen.view(rows, -1), experts)  # [B, T * K, E]
    if real is not None:
        queue = queue * real.view(rows, -1, 1).repeat_interleave(chosen.shape[1], 1)
    place = (queue.cumsum(1) * queue).sum(-1)  # counted from 1; 0 where nothing is asked for
    return ((place > 0) & (place <= capacity)).view_as(chosen)


def load_entropy(load: Tensor) -> float:
    """How even a load [E] is: its entropy over log E; 1 where all experts are used alike, 0 where one takes all."""
    share = load.double() / load.sum()
    return (torch.special.entr(share).sum() / torch.tensor(float(len(load))).log()).item()
