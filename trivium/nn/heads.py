"""Heads: what is read off the last hidden state."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ..core.registry import Registry
from ..core.spec import Part
from .embeddings import TokenEmbedding
from .linear import Linear
from .step import Step


class Head(Part, registry=Registry("head", "trivium.nn")):
    """Root of the heads: `build(vocab, dim)` gives a module `head(hidden [..., C], step, embed)`."""

    def build(self, vocab: int, dim: int) -> nn.Module:
        raise AssertionError


class LMHead(Head):
    """Logits over the vocabulary: by the embedding's own table where tied, else by a table of the head's own."""

    kind: Literal["lm"] = "lm"
    tied: bool = Field(False, description="use the embedding's table")

    @classmethod
    def tiny(cls) -> LMHead:
        return cls(tied=True)

    def build(self, vocab: int, dim: int) -> LanguageHead:
        return LanguageHead(self, vocab, dim)


class LanguageHead(nn.Module):
    def __init__(self, spec: LMHead, vocab: int, dim: int):
        super().__init__()
        self.spec = spec
        if not spec.tied:
            self.out = Linear(dim, vocab)

    def forward(self, hidden: Tensor, step: Step, embed: TokenEmbedding) -> Tensor:
        """hidden [..., C] -> logits [..., V] in hidden's dtype."""
        return embed.unembed(hidden, step) if self.spec.tied else self.out(hidden, step)

    def table(self, embed: nn.Module) -> Tensor | None:
        """The matrix [V, C] whose product with hidden is all that this head does; None if a pass made it do more."""
        source = embed if self.spec.tied else self.out
        if type(source) is TokenEmbedding or (type(source) is Linear and source.bias is None):
            return source.weight
        return None
