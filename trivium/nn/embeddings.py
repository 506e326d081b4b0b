"""Token embeddings: a table, what says a token's place and sentence added to it, and the table's transpose where the output
head is tied to it. Sentences of a pair are told apart as in BERT (arXiv:1810.04805)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.registry import Registry
from ..core.spec import Part
from .noise import EmbeddingNoise
from .norms import Norm
from .positions_absolute import Absolute
from .step import Step


class Embed(Part, registry=Registry("embedding", "trivium.nn")):
    """Root of the embeddings: `build(vocab, dim)` gives a module `embed(tokens [B, T], step) -> [B, T, C]`."""

    def build(self, vocab: int, dim: int) -> nn.Module:
        raise AssertionError


class Tokens(Embed):
    """One row of a table for each token, plus what `positions` says of its place and `types` of its sentence; then the norm."""

    kind: Literal["tokens"] = "tokens"
    scale: float | None = Field(None, description="what rows are multiplied by (Gemma: dim ** 0.5)")
    positions: SerializeAsAny[Absolute] | None = Field(None, description="the absolute positions that are added, if any")
    types: int = Field(0, ge=0, description="how many kinds of token `Inputs.types` tells apart; 0: none")
    norm: SerializeAsAny[Norm] | None = Field(None, description="the norm of the sum, if any")
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
        self.types = TypeEmbedding(spec.types, dim) if spec.types else None
        self.norm = spec.norm.build(dim) if spec.norm is not None else None
        self.noise: EmbeddingNoise | None = None  # a pass's

    def forward(self, tokens: Tensor | None, step: Step) -> Tensor:
        """Without tokens, the step's embeds are taken as they are, unscaled; positions are added to them too."""
        spec = self.spec
        if tokens is None:
            assert step.inputs.embeds is not None
            x = step.inputs.embeds
        else:
            x = self.rows(tokens)
            x = x if self.noise is None else self.noise(x, step)
        if self.positions is not None:
            x = x + self.positions(step, x.dtype)
        if self.types is not None:
            x = x + self.types(step)
        elif step.inputs.types is not None:
            raise ConfigError("this model does not tell types of token apart: leave out Inputs(types=...)", field="types")
        if self.norm is not None:
            x = self.norm(x)
        return F.dropout(x, spec.dropout, self.training) if spec.dropout else x

    def rows(self, tokens: Tensor) -> Tensor:
        """What the table says of tokens [...], [..., C], scaled: what may be given as embeds in their place."""
        x = F.embedding(tokens, self.weight)
        return x if self.spec.scale is None else x * self.spec.scale

    def unembed(self, hidden: Tensor, step: Step) -> Tensor:
        """The tied head: hidden [..., C] -> logits [..., V]."""
        return F.linear(hidden, self.weight)


class TypeEmbedding(nn.Module):
    """One row for each type of token; where none are given, all tokens are of the first."""

    def __init__(self, types: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(types, dim))

    def forward(self, step: Step) -> Tensor:
        """[B, T, C], or [C] for the one type of all."""
        return self.weight[0] if step.inputs.types is None else F.embedding(step.inputs.types, self.weight)
