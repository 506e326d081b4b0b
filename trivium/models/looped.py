"""Reasoning without words: at latent tokens, the model reads its own last hidden state instead of an embedding (Coconut,
arXiv:2412.06769). A prompt with n of them takes n steps of thought; one with none is the base model's, to the bit.

Each step of a document needs the one before, so n steps take n + 1 passes, as the paper's do; gradients flow through all of them.
Depth that is looped over instead (arXiv:2502.05171) is a stack whose spec names its blocks `shared`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..core.errors import DataError
from ..nn.embeddings import TokenEmbedding, Tokens
from ..nn.inputs import Inputs, Keep, Output, as_inputs
from ..nn.store import Store
from .model import BuiltModel, Model
from .transformer import Transformer


class LatentReasoning(Model):
    """What the model is: a body, and the token whose embedding is the hidden state before it."""

    kind: Literal["latent_reasoning"] = "latent_reasoning"
    body: Transformer = Field(description="what reads and writes; causal")
    token: int = Field(ge=0, description="the latent token")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.body.causal or not isinstance(self.body.embed, Tokens) or self.token >= self.body.vocab:
            raise ValueError("the body is causal, its embed is of kind tokens, and token is one of its vocabulary")
        return self

    @property
    def vocab(self) -> int:
        return self.body.vocab

    @property
    def context(self) -> int | None:
        return self.body.context

    def build(self) -> LatentReasoningModel:
        return LatentReasoningModel(self)

    def with_plain_names(self) -> Self:
        return self.replace(body=self.body.with_plain_names())


class LatentReasoningModel(BuiltModel[LatentReasoning]):
    """The built model. A latent token stands behind another token of its document, in the same forward."""

    def __init__(self, spec: LatentReasoning):
        super().__init__(spec)
        self.body = spec.body.build()

    def forward(self, inputs: Inputs | Tensor, *, keep: Keep = "all", weights: bool = False) -> Output:
        """As of a `Transformer`. `DataError` for a latent token with no token before it."""
        inputs = as_inputs(inputs)
        at = self._latent(inputs)
        if inputs.tokens is None or at is None:
            return self.body(inputs, keep=keep, weights=weights)
        assert isinstance(self.body.embed, TokenEmbedding)
        embeds = self.body.embed.rows(inputs.tokens)
        order = at.long().cumsum(1)  # [B, T]: each latent token's number in its row
        for number in range(1, int(order.max()) + 1):
            given = replace(inputs, tokens=None, embeds=embeds)
            mark = None if inputs.cache is None else inputs.cache.snapshot()
            hidden = self.body(given, keep="none").hidden
            if inputs.cache is not None and mark is not None:
                inputs.cache.restore(mark)
            before = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)
            embeds = torch.where((at & (order == number))[..., None], before, embeds)
        return self.body(replace(inputs, tokens=None, embeds=embeds), keep=keep, weights=weights)

    def cache(self, rows: int, capacity: int, *, rollback: int = 0) -> Store:
        """An empty store for the body's state."""
        return self.body.cache(rows, capacity, rollback=rollback)

    def _latent(self, inputs: Inputs) -> Tensor | None:
        """[B, T]: where latent tokens stand; None if there are none."""
        if inputs.tokens is None:
            return None
        at, segments = inputs.tokens == self.spec.token, inputs.segments
        if segments is not None:
            at = at & (segments >= 0)
        if not bool(at.any()):
            return None
        first = at[:, :1] if segments is None else at & (segments != torch.cat([torch.full_like(segments[:, :1], -1), segments[:, :-1]], 1))
        if bool(first.any()):
            raise DataError(f"a latent token (token {self.spec.token}) stands behind a token whose state it takes on: none may come first")
        return at
