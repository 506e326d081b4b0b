"""Softmax in one pass over blocks of scores, in any order: what tiled attention rests on.

Two numbers stand for all scores seen so far: the greatest, and the sum of exp(score - greatest). Two such accounts of different
scores merge into that of both, so blocks may come in any split and order, from any device. arXiv:1805.02867; with the sum of
values beside it, arXiv:2205.14135.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Running:
    """Scores seen so far: the greatest, `top` [...], -inf where none was, and `total` [...], the sum of exp(score - top)."""

    top: Tensor
    total: Tensor

    @staticmethod
    def of(scores: Tensor) -> Running:
        """The account of `scores` [..., S], S at least 1; -inf is a score that is hidden."""
        top = scores.amax(-1)
        return Running(top, torch.exp(scores - finite(top)[..., None]).sum(-1))

    def merge(self, other: Running) -> Running:
        """The account of both; the order makes no difference."""
        top = torch.maximum(self.top, other.top)
        return Running(top, self.total * self.rescale(top) + other.total * other.rescale(top))

    def rescale(self, top: Tensor) -> Tensor:
        """What a sum in terms of this greatest score is multiplied by to be one in terms of `top`."""
        return torch.exp(self.top - finite(top))

    @property
    def lse(self) -> Tensor:
        """log sum exp(score) [...], -inf where nothing was seen."""
        return self.top + self.total.log()


@dataclass(frozen=True)
class Partial:
    """Attention over some of the keys: the account of their scores, and `mixed` [..., E], the sum of exp(score - top) * value."""

    running: Running
    mixed: Tensor

    def merge(self, other: Partial) -> Partial:
        """Attention over the keys of both, which must be different ones."""
        both = self.running.merge(other.running)
        mixed = self.mixed * self.running.rescale(both.top)[..., None] + other.mixed * other.running.rescale(both.top)[..., None]
        return Partial(both, mixed)

    def finish(self) -> Tensor:
        """What attention gives [..., E]; zeros where no key was seen."""
        total = self.running.total[..., None]
        return self.mixed / torch.where(total > 0, total, 1.0)


def online_softmax(scores: Tensor, blocks: Iterable[slice]) -> tuple[Tensor, list[Running]]:
    """softmax(scores [..., S], -1), a block at a time: `blocks` cover S once, in any order. With it, what was known after each
    block. Rows that are hidden everywhere (-inf) are zero."""
    blocks, trace = list(blocks), []
    running = Running(scores.new_full(scores.shape[:-1], -torch.inf), scores.new_zeros(scores.shape[:-1]))
    for block in blocks:
        running = running.merge(Running.of(scores[..., block]))
        trace.append(running)
    top, total = finite(running.top)[..., None], torch.where(running.total > 0, running.total, 1.0)[..., None]
    out = torch.empty_like(scores)
    for block in blocks:
        out[..., block] = torch.exp(scores[..., block] - top) / total
    return out, trace


def finite(top: Tensor) -> Tensor:
    """Zero in place of -inf, so that a difference from it is -inf and not NaN."""
    return torch.where(top == -torch.inf, 0.0, top)
