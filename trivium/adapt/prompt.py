"""Prompt tuning (arXiv:2104.08691): learned embeddings before each document; with `through`, made by a small network, as
P-tuning has it (arXiv:2103.10385). Nothing else is trained."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field

from ..core.errors import ConfigError
from ..models.model import BuiltModel
from ..models.transformer import TransformerModel
from ..nn.adapted_inputs import Soft, SoftPrompt, Through, VirtualTokens
from ..nn.embeddings import TokenEmbedding
from .adapter import Adapter


class Prompt(Adapter):
    """Virtual tokens that stand before each document as embeddings."""

    kind: Literal["prompt"] = "prompt"
    length: int = Field(16, gt=0, description="virtual tokens")
    ids: tuple[int, ...] = Field((), description="tokens whose embeddings they start as, again and again; none: drawn from the vocabulary")
    through: int | None = Field(
        None, gt=0, description="width of a network of three linear maps that makes the embeddings; none: no network"
    )

    @classmethod
    def tiny(cls) -> Prompt:
        return cls(length=3, through=5)

    def put(self, model: BuiltModel[Any]) -> None:
        embed = place(model, self).embed
        assert isinstance(embed, TokenEmbedding)
        rows, dim = embed.weight.shape
        if odd := [id for id in self.ids if not 0 <= id < rows]:
            raise ConfigError(f"adapter {self.name!r}: id {odd[0]} is not in the vocabulary of {rows}", field="ids", value=odd[0])
        widths = (dim, self.through, self.through, dim) if self.through is not None else None
        through = None if widths is None else Through(*widths, activation=F.relu, like=embed.weight)
        put(model, self.name, SoftPrompt(self.length, dim, ids=self.ids, through=through, like=embed.weight))


def place(model: BuiltModel[Any], adapter: Adapter) -> TransformerModel:
    """The model, if virtual tokens can be put before what it reads."""
    if not isinstance(model, TransformerModel) or not isinstance(model.embed, TokenEmbedding):
        raise ConfigError(
            f"adapter {adapter.name!r}: virtual tokens need a single stack that embeds tokens", field="kind", value=adapter.kind
        )
    return model


def put(model: BuiltModel[Any], name: str, soft: Soft) -> None:
    """Put the virtual tokens `soft` into a model that `place` gave."""
    assert isinstance(model, TransformerModel)
    if model.virtual is None:
        model.virtual = VirtualTokens()
    model.virtual.adapters[name] = soft
