"""Heads: what is read off the last hidden state. Here those that predict tokens; `heads_task` has the others.

A head reads positions, each alone, or documents, whole ones: the model then calls it once with all hidden states.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from ..core.registry import Registry
from ..core.spec import Part
from .activations import GELU, Activation
from .embeddings import TokenEmbedding
from .linear import Linear
from .norms import Layer, Norm
from .products import Multiplies, Product
from .step import Step

Reads = Literal["positions", "documents", "nothing"]


class Head(Part, registry=Registry("head", "trivium.nn")):
    """Root of the heads: `build(vocab, dim)` gives a module `head(hidden, step, embed)`.

    One that reads positions is given the hidden states chosen [..., C] and gives [..., *]. One that reads documents is given
    all of them [B, T, C] and gives [N, *], a row for each of the N documents, in the order of the batch.
    """

    @property
    def reads(self) -> Reads:
        return "positions"

    def build(self, vocab: int, dim: int) -> nn.Module:
        raise AssertionError


class NoHead(Head):
    """The hidden states are all that is wanted, as of an encoder that a decoder reads: there are no logits."""

    kind: Literal["none"] = "none"

    @classmethod
    def tiny(cls) -> NoHead:
        return cls()

    @property
    def reads(self) -> Reads:
        return "nothing"

    def build(self, vocab: int, dim: int) -> nn.Module:
        return nn.Identity()


class LMHead(Head):
    """Logits over the vocabulary: by the embedding's own table where tied, else by a table of the head's own."""

    kind: Literal["lm"] = "lm"
    tied: bool = Field(False, description="use the embedding's table")
    bias: bool = Field(False, description="a number for each token is added (BART)")
    scale: float | None = Field(None, description="what the hidden state is multiplied by (T5: dim ** -0.5)")
    softcap: float | None = Field(None, gt=0, description="logits l become c * tanh(l / c) (Gemma 2)")

    @classmethod
    def tiny(cls) -> LMHead:
        return cls(tied=True)

    def build(self, vocab: int, dim: int) -> LanguageHead:
        return LanguageHead(self, vocab, dim)


class LanguageHead(nn.Module):
    """`transform`: what is done to the hidden state first, if anything. `readings`: how often each position is read."""

    readings = 1

    def __init__(self, spec: LMHead, vocab: int, dim: int, *, transform: nn.Module | None = None):
        super().__init__()
        self.spec = spec
        self.transform = transform
        if not spec.tied:
            self.out = Linear(dim, vocab, bias=spec.bias)
        elif spec.bias:
            self.bias = nn.Parameter(torch.empty(vocab))

    def forward(self, hidden: Tensor, step: Step, embed: TokenEmbedding) -> Tensor:
        """hidden [..., C] -> logits [..., V] in hidden's dtype."""
        spec = self.spec
        if self.transform is not None:
            hidden = self.transform(hidden, step)
        if spec.scale is not None:
            hidden = hidden * spec.scale
        logits = embed.unembed(hidden, step) if spec.tied else self.out(hidden, step)
        if spec.tied and spec.bias:
            logits = logits + self.bias
        return logits if spec.softcap is None else spec.softcap * torch.tanh(logits / spec.softcap)

    def table(self, embed: nn.Module) -> Tensor | None:
        """The matrix [V, C] whose product with hidden is all that this head does; None if it does more, by itself or by a pass."""
        spec = self.spec
        if self.transform is not None or spec.bias or spec.scale is not None or spec.softcap is not None:
            return None
        source = embed if spec.tied else self.out
        return source.weight if type(source) in (TokenEmbedding, Linear) else None  # type: ignore[return-value]


class MaskedLMHead(Head):
    """Logits for tokens that were masked: norm(act(dense(x))), then the table and a bias (arXiv:1810.04805)."""

    kind: Literal["masked_lm"] = "masked_lm"
    activation: SerializeAsAny[Activation] = Field(GELU(), description="what follows the dense map")
    norm: SerializeAsAny[Norm] = Field(Layer(eps=1e-12), description="what follows the activation")
    tied: bool = Field(True, description="use the embedding's table")

    @classmethod
    def tiny(cls) -> MaskedLMHead:
        return cls(norm=Layer(eps=1e-4))

    def build(self, vocab: int, dim: int) -> LanguageHead:
        return LanguageHead(LMHead(tied=self.tied, bias=True), vocab, dim, transform=Transform(self, dim))


class Transform(nn.Module):
    def __init__(self, spec: MaskedLMHead, dim: int):
        super().__init__()
        self.dense = Linear(dim, dim, bias=True)
        self.activation = spec.activation.build()
        self.norm = spec.norm.build(dim)

    def forward(self, hidden: Tensor, step: Step) -> Tensor:
        return self.norm(self.activation(self.dense(hidden, step)))


class MultiToken(Head):
    """Logits of the next `count` tokens, [..., count, V], from one state (arXiv:2404.19737): the first as a plain head, each
    further one through h + silu(linear(h)) of its own (the heads of arXiv:2401.10774), and one table for all."""

    kind: Literal["multi_token"] = "multi_token"
    count: int = Field(ge=2, description="how many tokens are predicted at each position")
    tied: bool = Field(False, description="use the embedding's table")

    @classmethod
    def tiny(cls) -> MultiToken:
        return cls(count=3, tied=True)

    def build(self, vocab: int, dim: int) -> MultiTokenHead:
        return MultiTokenHead(self, vocab, dim)


class MultiTokenHead(LanguageHead, Multiplies):
    def __init__(self, spec: MultiToken, vocab: int, dim: int):
        super().__init__(LMHead(tied=spec.tied), vocab, dim)
        self.readings = spec.count
        self.ahead = nn.ModuleList(Linear(dim, dim) for _ in range(spec.count - 1))

    def forward(self, hidden: Tensor, step: Step, embed: TokenEmbedding) -> Tensor:
        states = [hidden, *(hidden + F.silu(linear(hidden, step)) for linear in self.ahead)]
        return super().forward(torch.stack(states, -2), step, embed)

    def table(self, embed: nn.Module) -> None:
        return None

    def multiplied(self, tokens: int, *, flowing: bool) -> list[Product]:
        """The readings of a table of its own beyond the first."""
        if self.spec.tied:
            return []
        weight = self.out.weight
        return [Product(2 * tokens * (self.readings - 1) * weight.numel(), flowing, weight.requires_grad)]
