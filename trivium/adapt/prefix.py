"""Prefix tuning (arXiv:2101.00190): learned keys and values of every layer before each document; with `through`, made by a small
network, as its authors train them. Without, it is P-tuning v2 (arXiv:2110.07602), which adds a head of its own where it
classifies (`models.transformer.with_head`)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from ..core.errors import ConfigError
from ..models.block import Layer
from ..models.model import BuiltModel
from ..models.transformer import TransformerModel
from ..nn.adapted_inputs import SoftPrefix, Through
from ..nn.attention import Attention, AttentionMixer
from .adapter import Adapter
from .prompt import place, put


class Prefix(Adapter):
    """Virtual tokens that every layer's attention sees as keys and values of their own."""

    kind: Literal["prefix"] = "prefix"
    length: int = Field(16, gt=0, description="virtual tokens")
    through: int | None = Field(None, gt=0, description="width of a network of two linear maps that makes them; none: no network")

    @classmethod
    def tiny(cls) -> Prefix:
        return cls(length=3, through=5)

    def put(self, model: BuiltModel[Any]) -> None:
        stack = place(model, self)
        heads, head_dim = keys_of(stack, self)
        weight, layers = stack.embed.weight, len(stack.layers)
        assert isinstance(weight, torch.Tensor)
        dim, wide = weight.shape[1], layers * 2 * heads * head_dim
        through = None if self.through is None else Through(dim, self.through, wide, activation=torch.tanh, like=weight)
        width = wide if through is None else dim
        put(model, self.name, SoftPrefix(
            self.length, layers=layers, heads=heads, head_dim=head_dim, width=width, through=through, like=weight
        ))  # fmt: skip


def keys_of(model: TransformerModel, adapter: Adapter) -> tuple[int, int]:
    """(key and value heads, width of one), which must be those of every layer."""
    shapes = set()
    for layer in model.layers:
        assert isinstance(layer, Layer)
        mixer = layer.spec.mixer
        if not isinstance(mixer, Attention) or mixer.share is not None or not isinstance(layer.mixer, AttentionMixer):
            kind = None if mixer is None else mixer.kind
            raise ConfigError(
                f"adapter {adapter.name!r}: layer {layer.index} (mixer {kind}) has no keys and values of its own for a prefix"
            )
        shapes.add((mixer.kv_heads, mixer.head_dim))
    if len(shapes) > 1:
        raise ConfigError(f"adapter {adapter.name!r}: a prefix needs key heads alike in all layers, not {sorted(shapes)}")
    return shapes.pop()
