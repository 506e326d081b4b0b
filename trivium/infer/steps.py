"""The steps from logits to a token, as pure functions of scores [B, V] (fp32) with a setting for each row.

Where transformers has the step, its result is transformers' own, ties included. `pick` states how filters and draw go
together; `pick_fast` gives the same tokens from the few highest scores, and leaves to `pick` each row in which
rounding or a tie could make a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

CANDIDATES = 512  # scores that `pick_fast` looks at where top-k does not say how many it needs
MARGIN = 1e-5  # nearer to a threshold than this, fp32 rounding may decide
BLOCK = 256  # tokens summed together before the draw looks inside


def repetition(scores: Tensor, *, seen: Tensor, penalty: Tensor) -> Tensor:
    """Positive scores of `seen` tokens ([B, V] bool: prompt and answer) are divided by penalty [B, 1], negative ones multiplied."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def presence_frequency(scores: Tensor, *, counts: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    """OpenAI's formula: score - count * frequency - (count > 0) * presence; `counts` [B, V]: the answer's tokens."""
    return scores - counts * frequency - (counts > 0) * presence


def bias(scores: Tensor, *, rows: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """Adds `values[n]` to token `ids[n]` of row `rows[n]`."""
    return scores.index_put((rows, ids), values, accumulate=True)


def top_k(scores: Tensor, *, k: Tensor, most: int) -> Tensor:
    """-inf below the k-th highest score; its ties stay. k [B, 1]: 0 keeps the row; `most`: the highest k, on the host."""
    best = scores.topk(min(most, scores.shape[-1])).values
    lowest = best.gather(1, (k - 1).clamp(0, best.shape[-1] - 1))
    return scores.masked_fill((k > 0) & (scores < lowest), -torch.inf)


def top_p(scores: Tensor, *, p: Tensor) -> Tensor:
    """-inf outside the smallest set of likeliest tokens whose mass reaches p [B, 1] (fp64); p = 1 keeps the row.

    Of equal scores at the border, those that an ascending sort puts last stay.
    """
    ordered, index = scores.sort(dim=-1)
    drop = ordered.softmax(dim=-1).cumsum(dim=-1) <= (1 - p).to(scores.dtype)
    drop[:, -1] = False
    drop &= p < 1
    return scores.masked_fill(torch.empty_like(drop).scatter_(1, index, drop), -torch.inf)


def min_p(scores: Tensor, *, p: Tensor) -> Tensor:
    """-inf for tokens whose probability is under p [B, 1] times the highest one; p = 0 keeps the row."""
    probabilities = scores.softmax(dim=-1)
    return scores.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


@dataclass(frozen=True)
class Filters:
    """The filters of each row as columns [B, 1], and on the host what no step should have to ask a device for."""

    k: Tensor
    top: Tensor  # fp64
    least: Tensor
    most: int  # the highest k
    any_top: bool
    any_least: bool
    whole: bool  # some row wants top-p of the whole vocabulary
    candidates: int  # scores that the fast way needs to see

    @staticmethod
    def of(k: Sequence[int], top_p: Sequence[float], min_p: Sequence[float], *, device: torch.device | str = "cpu") -> Filters:
        """One entry a row; 0, 1 and 0 mean that the filter is off."""
        return Filters(
            k=torch.tensor(k, device=device)[:, None],
            top=torch.tensor(top_p, dtype=torch.float64, device=device)[:, None],
            least=torch.tensor(min_p, dtype=torch.float32, device=device)[:, None],
            most=max(k),
            any_top=any(p < 1 for p in top_p),
            any_least=any(p > 0 for p in min_p),
            whole=any(p < 1 and not most for p, most in zip(top_p, k, strict=True)),
            candidates=max(k) + 1 if min(k) > 0 and max(k) < CANDIDATES else CANDIDATES,
        )

    def rows(self, index: Tensor) -> Filters:
        return replace(self, k=self.k[index], top=self.top[index], least=self.least[index])

    def apply(self, scores: Tensor) -> Tensor:
        """top-k, then top-p, then min-p."""
        if self.most:
            scores = top_k(scores, k=self.k, most=self.most)
        if self.any_top:
            scores = top_p(scores, p=self.top)
        if self.any_least:
            scores = min_p(scores, p=self.least)
        return scores


def uniforms(seeds: Tensor, steps: Tensor) -> Tensor:
    """A number in [0, 1) for each (seed, step), both int64: SplitMix64 as a counter-based generator.

    52 bits, so that u * total < total holds in fp64 after rounding.
    """
    return ((_mix(_mix(seeds) + (steps + 1) * _signed(0x9E3779B97F4A7C15)) >> 12) & (2**52 - 1)).double() * 2.0**-52


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finalizer. int64 products wrap; `>>` copies the sign, so the mask makes it a logical shift."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & (2**33 - 1))


def _signed(value: int) -> int:
    return value - 2**64


def draw(scores: Tensor, u: Tensor) -> Tensor:
    """The token [B] at u [B] (fp64) of each row's cumulative distribution: fp64 sums of fp32 weights, in the order of ids.

    Whole blocks are passed over first. A token with score -inf is never drawn, however a device orders its sums.
    """
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    blocks = F.pad(weights, (0, -weights.shape[-1] % BLOCK)).view(len(weights), -1, BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = u[:, None] * sums[:, -1:]
    block = (sums > target).to(torch.uint8).argmax(-1, keepdim=True)  # the first that reaches it
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0]
    return block[:, 0] * BLOCK + _reach(inside, target - before)


def _reach(weights: Tensor, target: Tensor) -> Tensor:
    """The first place [B] whose cumulative weight [B, N] passes target [B, 1]; a place of weight 0 never."""
    reached = weights.cumsum(-1, dtype=torch.float64) > target
    return ((weights > 0) * (1 + reached.to(torch.uint8))).argmax(-1)


def pick(scores: Tensor, filters: Filters, u: Tensor) -> Tensor:
    """A token [B] a row: filters, then the draw at u [B]."""
    return draw(filters.apply(scores), u)


def pick_fast(scores: Tensor, filters: Filters, u: Tensor) -> Tensor:
    """`pick`, from the highest scores where they suffice. It reads its verdict on the host, which is free on a CPU only."""
    ids, weights, certain = narrow(scores, filters)
    width = max(1, int((weights > 0).sum(-1).max()))  # what is kept stands first
    ids, weights = ids[:, :width], weights[:, :width]
    ids, order = ids.masked_fill(weights == 0, scores.shape[-1]).sort(-1)
    weights = weights.gather(1, order)
    place = _reach(weights, u[:, None] * weights.sum(-1, keepdim=True, dtype=torch.float64))
    picked = ids.gather(1, place[:, None])[:, 0]
    unsure = (~certain).nonzero()[:, 0]
    if len(unsure):
        picked[unsure] = pick(scores[unsure], filters.rows(unsure), u[unsure])
    return picked


def narrow(scores: Tensor, filters: Filters) -> tuple[Tensor, Tensor, Tensor]:
    """What the filters keep, from the N highest scores: ids [B, N] likeliest first, their weights (0: dropped), and whether
    a row's set is certain [B]: it ends within the N, and no tie or rounding could change it."""
    best, ids = scores.topk(min(filters.candidates, scores.shape[-1]))
    last = best.shape[-1] - 1
    k, top, least = filters.k, filters.top, filters.least
    weights = (best - best[:, :1]).exp()
    kept = (k == 0) | (best >= best.gather(1, (k - 1).clamp(0, last)))
    everything = last + 1 == scores.shape[-1]
    certain = (k == 0) | ~kept[:, last:] | everything
    if filters.any_top:
        mass = (weights * kept).double()
        total = mass.sum(-1, keepdim=True)
        if filters.whole:
            total = torch.where(k > 0, total, (scores - best[:, :1]).exp().sum(-1, keepdim=True, dtype=torch.float64))
        before = (mass.cumsum(-1) - mass) / total
        nucleus = kept & ((before < top) | (top == 1))
        count = nucleus.sum(-1, keepdim=True)
        tied = (best.gather(1, count - 1) == best.gather(1, count.clamp(max=last))) & (count < kept.sum(-1, keepdim=True))
        near = (((before - top).abs() <= MARGIN) & kept & (top < 1)).any(-1, keepdim=True)
        certain = certain & ~tied & ~near
        kept = nucleus
    if filters.any_least:
        near = ((weights - least).abs() <= MARGIN * least) & kept & (least > 0)
        certain = certain & ~near.any(-1, keepdim=True)
        kept = kept & (weights >= least)
    certain = certain & (~kept[:, last:] | everything)
    return ids, weights * kept, certain[:, 0]
