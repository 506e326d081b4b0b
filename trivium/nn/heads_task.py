"""Heads for tasks: a class, a tag, a span, a reward, an embedding.

Those of whole documents pool: the first token's state (BERT's, arXiv:1810.04805), the last one's (GPT-1's classifier), or the
mean of all. Packed rows need nothing of their own: each document gives its own result. Losses are not their business.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .heads import Head, Reads
from .linear import Linear
from .step import Step

Pool = Literal["first", "last", "mean"]


def pool(hidden: Tensor, step: Step, how: Pool) -> Tensor:
    """hidden [B, T, C] -> [N, C], for each document of the step, in order; without segments each row is one."""
    if step.segments is None:
        return hidden.mean(1) if how == "mean" else hidden[:, 0 if how == "first" else -1]
    start, length = step.memo("bounds", lambda: torch.from_numpy(step.runs).to(hidden.device)).unbind(1)
    flat = hidden.flatten(0, 1)
    if how != "mean":
        return flat[start if how == "first" else start + length - 1]
    owner = torch.arange(len(start), device=hidden.device).repeat_interleave(length)
    sums = flat.new_zeros(len(start), flat.shape[1]).index_add(0, owner, flat[step.segments.flatten() >= 0])
    return sums / length[:, None]


class Pooled(Head):
    """What heads of documents share. `inner`: BERT's pooler, or the first half of RoBERTa's classifier."""

    pool: Pool = Field("first", description="which states stand for a document: the first token's, the last one's, the mean of all")
    inner: bool = Field(False, description="tanh of a dense map comes first")

    @property
    def reads(self) -> Reads:
        return "documents"


class Pooler(nn.Module):
    """[B, T, C] -> [N, C]."""

    def __init__(self, spec: Pooled, dim: int):
        super().__init__()
        self.how = spec.pool
        self.dense = Linear(dim, dim, bias=True) if spec.inner else None

    def forward(self, hidden: Tensor, step: Step) -> Tensor:
        x = pool(hidden, step, self.how)
        return x if self.dense is None else torch.tanh(self.dense(x, step))


class Classifier(Pooled):
    """A score for each of `labels` classes, for each document [N, labels]."""

    kind: Literal["classifier"] = "classifier"
    labels: int = Field(gt=0, description="how many classes")
    bias: bool = Field(True, description="whether the last map has a bias")
    dropout: float = Field(0.0, ge=0, lt=1, description="chance of a channel of the pooled state to be dropped, in training")

    @classmethod
    def tiny(cls) -> Classifier:
        return cls(labels=5, inner=True)

    def build(self, vocab: int, dim: int) -> nn.Module:
        return ClassifierHead(self, dim)


class ClassifierHead(nn.Module):
    def __init__(self, spec: Classifier, dim: int):
        super().__init__()
        self.spec = spec
        self.pooler = Pooler(spec, dim)
        self.out = Linear(dim, spec.labels, bias=spec.bias)

    def forward(self, hidden: Tensor, step: Step, embed: nn.Module) -> Tensor:
        return self.out(F.dropout(self.pooler(hidden, step), self.spec.dropout, self.training), step)


class Project(Pooled):
    """One vector for each document, [N, size]: its embedding, or the pooler's output of a bare BERT."""

    kind: Literal["project"] = "project"
    size: int | None = Field(None, gt=0, description="width of the vector; that of the model, and no map, if none is given")
    bias: bool = Field(False, description="whether that map has a bias")
    normalize: bool = Field(False, description="scale the vector to length one")

    @classmethod
    def tiny(cls) -> Project:
        return cls(pool="mean", size=14, normalize=True)

    def build(self, vocab: int, dim: int) -> nn.Module:
        return ProjectHead(self, dim)


class ProjectHead(nn.Module):
    def __init__(self, spec: Project, dim: int):
        super().__init__()
        self.spec = spec
        self.pooler = Pooler(spec, dim)
        self.out = Linear(dim, spec.size, bias=spec.bias) if spec.size is not None else None

    def forward(self, hidden: Tensor, step: Step, embed: nn.Module) -> Tensor:
        x = self.pooler(hidden, step)
        if self.out is not None:
            x = self.out(x, step)
        return F.normalize(x, dim=-1) if self.spec.normalize else x


class Tagger(Head):
    """A score for each of `labels` tags, at each position [..., labels]: named entities, parts of speech."""

    kind: Literal["tagger"] = "tagger"
    labels: int = Field(gt=0, description="how many tags")
    bias: bool = Field(True, description="whether the map has a bias")
    dropout: float = Field(0.0, ge=0, lt=1, description="chance of a channel of the hidden state to be dropped, in training")

    @classmethod
    def tiny(cls) -> Tagger:
        return cls(labels=7)

    def build(self, vocab: int, dim: int) -> nn.Module:
        return LinearHead(dim, self.labels, bias=self.bias, dropout=self.dropout)


class Span(Head):
    """How likely an answer begins, and ends, at each position: [..., 2], to be compared over a document's positions."""

    kind: Literal["span"] = "span"

    @classmethod
    def tiny(cls) -> Span:
        return cls()

    def build(self, vocab: int, dim: int) -> nn.Module:
        return LinearHead(dim, 2, bias=True)


class LinearHead(nn.Module):
    def __init__(self, dim: int, size: int, *, bias: bool, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.out = Linear(dim, size, bias=bias)

    def forward(self, hidden: Tensor, step: Step, embed: nn.Module) -> Tensor:
        """[..., C] -> [..., size]."""
        return self.out(F.dropout(hidden, self.dropout, self.training), step)


class Reward(Head):
    """One number at each position, [...]: a reward model reads the last one, a process reward or a value every one."""

    kind: Literal["reward"] = "reward"
    bias: bool = Field(False, description="whether the map has a bias")

    @classmethod
    def tiny(cls) -> Reward:
        return cls(bias=True)

    def build(self, vocab: int, dim: int) -> nn.Module:
        return RewardHead(self, dim)


class RewardHead(nn.Module):
    def __init__(self, spec: Reward, dim: int):
        super().__init__()
        self.out = Linear(dim, 1, bias=spec.bias)

    def forward(self, hidden: Tensor, step: Step, embed: nn.Module) -> Tensor:
        return self.out(hidden, step)[..., 0]
