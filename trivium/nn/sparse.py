"""DeepSeek's sparse attention: a small indexer scores the past for each query, and attention reads the `top_k` best alone.

Scores are I(t, s) = sum over heads of w(t) relu(q(t) k(s)), computed for some queries at a time. What is selected has no
gradient; the indexer learns from the divergence of its scores from what attention looked at, which `step.aux.terms` holds
in training under ("indexer", layer). A `top_k` of the whole length is the dense warm-up. arXiv:2512.02556.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from ..core.spec import Spec
from .linear import Linear, Projections
from .norms import Layer, Norm
from .positions import Rope
from .step import Step, View

QUERIES = 128  # how many queries are scored, or attend, at a time


class Indexer(Spec):
    """What selects tokens: a few narrow heads, whose keys are cached beside what attention keeps."""

    heads: int = Field(gt=0, description="heads of the indexer")
    head_dim: int = Field(gt=0, description="width of its queries, and of the key that its heads share")
    top_k: int = Field(gt=0, description="how many tokens a query attends to")
    rope_dim: int = Field(gt=0, description="first channels of its queries and keys that positions turn")
    position: Rope | None = Field(Rope(), description="how those are turned")
    norm: SerializeAsAny[Norm] = Field(Layer(eps=1e-6), description="the norm of its keys")

    def build(self, dim: int, latent: int) -> IndexerModule:
        return IndexerModule(self, dim, latent)


@dataclass(frozen=True)
class Query:
    """What an indexer asks: queries `q` [B, T, I, D] and how much each head counts, `weight` [B, T, I]."""

    q: Tensor
    weight: Tensor

    def rows(self, start: int, end: int) -> Query:
        return Query(self.q[:, start:end], self.weight[:, start:end])


@dataclass(frozen=True)
class Selection:
    """Which keys each query reads: `slots` [B, T, k], of which those that are not `seen` [B, T, k] stand for nothing."""

    slots: Tensor
    seen: Tensor


class Aside(nn.Module):
    """A module that trains on a term of its own: its inputs are detached, and no gradient of the result reaches it."""


class IndexerModule(Aside):
    def __init__(self, spec: Indexer, dim: int, latent: int):
        super().__init__()
        self.spec = spec
        self.q = Linear(latent, spec.heads * spec.head_dim)
        self.inp = Projections(k=Linear(dim, spec.head_dim), weight=Linear(dim, spec.heads))
        self.norm = spec.norm.build(spec.head_dim)

    def forward(self, x: Tensor, latent: Tensor, step: Step) -> tuple[Query, Tensor]:
        """Of the input x [B, T, C] and what queries are made from [B, T, R]: a query, and keys [B, 1, T, D]."""
        spec = self.spec
        q = self.q(latent.detach(), step).unflatten(-1, (spec.heads, spec.head_dim))
        k, weight = self.inp(x.detach(), step)
        q, k = self._turn(q.transpose(1, 2), step).transpose(1, 2), self._turn(self.norm(k)[:, None], step)
        return Query(q, weight * (spec.heads * spec.head_dim) ** -0.5), k

    def _turn(self, x: Tensor, step: Step) -> Tensor:
        if self.spec.position is None:
            return x
        turned, rest = x.split([self.spec.rope_dim, x.shape[-1] - self.spec.rope_dim], -1)
        return torch.cat([self.spec.position.turn(turned, step), rest], -1)

    @torch.no_grad()
    def select(self, query: Query, keys: Tensor, view: View) -> Selection | None:
        """The `top_k` best of the keys [B, 1, S, D] that each query may see; None where that is all of them."""
        if selects_all(view, self.spec.top_k):
            return None
        found = []
        for start in range(0, query.q.shape[1], QUERIES):
            end = min(start + QUERIES, query.q.shape[1])
            found.append(choose(query.rows(start, end), keys[:, 0], view.rows(start, end), self.spec.top_k))
        return Selection(torch.cat([part.slots for part in found], 1), torch.cat([part.seen for part in found], 1))

    def divergence(self, query: Query, keys: Tensor, looked: Tensor, view: View, selection: Selection | None) -> Tensor:
        """Of its scores, over what was selected, from how attention looked there: see `divergence`. `looked` [B, T, k], or
        [B, T, S] where all was selected."""
        if selection is None:
            return divergence(index_scores(query, keys[:, 0]), view.rows(0, query.q.shape[1]), looked)
        return divergence(scores_of_chosen(query, keys[:, 0], selection), selection.seen, looked)


def divergence(scores: Tensor, seen: Tensor, looked: Tensor) -> Tensor:
    """The sum over tokens of KL(looked || softmax(scores)) over what is `seen`, all [B, T, S]. `looked`: attention's weights
    summed over heads, which are scaled to a sum of 1 and get no gradient."""
    some = seen.any(-1, keepdim=True)
    guess = scores.float().masked_fill(~seen & some, float("-inf")).log_softmax(-1).masked_fill(~seen, 0.0)
    target = looked.detach().float().masked_fill(~seen, 0.0)
    target = target / target.sum(-1, keepdim=True).clamp_min(1e-20)
    return F.kl_div(guess, target, reduction="sum")


@torch.no_grad()
def choose(query: Query, keys: Tensor, seen: Tensor, top_k: int) -> Selection:
    """The `top_k` best of the keys [B, S, D] that each query may see, `seen` [B|1, T, S]."""
    scores = index_scores(query, keys).masked_fill(~seen, float("-inf"))
    slots = _in_order(scores).topk(top_k, -1).indices
    return Selection(slots, scores.gather(-1, slots) > float("-inf"))


def selects_all(view: View, top_k: int) -> bool:
    """Whether no query of this view can see more than `top_k` keys."""
    return top_k >= (view.step.longest if view.documents is not None else view.slots.end)


def index_scores(query: Query, keys: Tensor) -> Tensor:
    """[B, T, S], of keys [B, S, D]."""
    return (torch.einsum("btid,bsd->btis", query.q, keys).relu() * query.weight[..., None]).sum(2)


def scores_of_chosen(query: Query, keys: Tensor, selection: Selection) -> Tensor:
    """[B, T, k], of what was selected of the keys [B, S, D]."""
    chosen = pick(keys, selection)
    return (torch.einsum("btid,btkd->btik", query.q, chosen).relu() * query.weight[..., None]).sum(2)


def pick(x: Tensor, selection: Selection) -> Tensor:
    """x [B, S, D] -> [B, T, k, D]: for each query, what was selected."""
    return x[torch.arange(len(x), device=x.device)[:, None, None], selection.slots]


def _in_order(scores: Tensor) -> Tensor:
    """Numbers in the order of `scores` [..., S], of which no two are equal: of equal scores, which relu makes often, the later
    counts more. So a selection does not hang on how many keys there are, or on how they are sorted."""
    bits = (scores.float() + 0.0).contiguous().view(torch.int32)  # -0 becomes 0
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (order << 32) + torch.arange(scores.shape[-1], device=scores.device)


def attend_selected(q: Tensor, kv: Tensor, width: int, selection: Selection, *, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, H, T, E] over the selected of kv [B, S, E], whose first `width` channels are the values: [B, H, T, width], and the
    weights [B, H, T, k]. It takes O(T k) products; a query that sees nothing gives zeros."""
    mixed, spread = [], []
    for start in range(0, q.shape[2], QUERIES):
        at = slice(start, start + QUERIES)
        part = Selection(selection.slots[:, at], selection.seen[:, at])
        chosen, seen = pick(kv, part), part.seen[:, :, None]  # [B, t, k, E], [B, t, 1, k]
        scores = (q[:, :, at].transpose(1, 2) * scale) @ chosen.transpose(-1, -2)  # [B, t, H, k]
        weights = scores.masked_fill(~seen, float("-inf")).masked_fill(~seen.any(-1, keepdim=True), 0.0).softmax(-1)
        weights = weights.masked_fill(~seen, 0.0)
        mixed.append((weights @ chosen[..., :width]).transpose(1, 2))
        spread.append(weights.transpose(1, 2))
    return torch.cat(mixed, 2), torch.cat(spread, 2)


def scatter_selected(weights: Tensor, selection: Selection, slots: int) -> Tensor:
    """Weights [B, H, T, k] of what was selected, as weights of all keys [B, H, T, S]."""
    index = selection.slots[:, None].expand(-1, weights.shape[1], -1, -1)
    return weights.new_zeros(*weights.shape[:3], slots).scatter_add(-1, index, weights)
