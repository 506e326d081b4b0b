"""Token embeddings: a table, absolute positions added where the model has them, and the table's transpose where the
output head is tied to it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from ..core.registry import Registry
from ..core.spec import Part
from .positions_absolute import Absolute
from .step import Step


class Embed(Part, registry=Registry("embedding", "trivium.nn")):
    """Root of the embeddings: `build(vocab, dim)` gives a module `embed(tokens [B, T], step) -> [B, T, C]`."""

    def build(self, vocab: int, dim: int) -> nn.Module:
        raise AssertionError


class Tokens(Embed):
    """One row of a table for each token, plus what `positions` says of its place."""

    kind: Literal["tokens"] = "tokens"
    scale: float | None = Field(None, description="what rows are multiplied by (Gemma: dim ** 0.5)")
    positions: SerializeAsAny[Absolute] | None = Field(None, description="the absolute positions that are added, if any")
    dropout: float = Field(0.0, ge=0, lt=1, description="chance of a channel of the sum to be dropped, in training")

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
        self.positions = spec.positions.build(dim) if spec.positions is not None else None

    def forward(self, tokens: Tensor | None, step: Step) -> Tensor:
        """Without tokens, the step's embeds are taken as they are, unscaled; positions are added to them too."""
        spec = self.spec
        if tokens is None:
            assert step.inputs.embeds is not None
            x = step.inputs.embeds
        else:
            x = F.embedding(tokens, self.weight)
            if spec.scale is not None:
                x = x * spec.scale
        if self.positions is not None:
            x = x + self.positions(step, x.dtype)
        return F.dropout(x, spec.dropout, self.training) if spec.dropout else x

    def unembed(self, hidden: Tensor, step: Step) -> Tensor:
        """The tied head: hidden [..., C] -> logits [..., V]."""
        return F.linear(hidden, self.weight)
