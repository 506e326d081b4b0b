"""Token embeddings: a table, and its transpose where the output head is tied to it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..core.registry import Registry
from ..core.spec import Part
from .step import Step


class Embed(Part, registry=Registry("embedding", "trivium.nn")):
    """Root of the embeddings: `build(vocab, dim)` gives a module `embed(tokens [B, T], step) -> [B, T, C]`."""

    def build(self, vocab: int, dim: int) -> nn.Module:
        raise AssertionError


class Tokens(Embed):
    """One row of a table for each token."""

    kind: Literal["tokens"] = "tokens"
    scale: float | None = Field(None, description="what rows are multiplied by (Gemma: dim ** 0.5)")

    @classmethod
    def tiny(cls) -> Tokens:
        return cls(scale=1.5)

    def build(self, vocab: int, dim: int) -> TokenEmbedding:
        return TokenEmbedding(self, vocab, dim)


class TokenEmbedding(nn.Module):
    def __init__(self, spec: Tokens, vocab: int, dim: int):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(vocab, dim))

    def forward(self, tokens: Tensor, step: Step) -> Tensor:
        x = F.embedding(tokens, self.weight)
        return x if self.spec.scale is None else x * self.spec.scale

    def unembed(self, hidden: Tensor, step: Step) -> Tensor:
        """The tied head: hidden [..., C] -> logits [..., V]."""
        return F.linear(hidden, self.weight)
