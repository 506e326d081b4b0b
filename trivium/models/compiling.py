"""torch.compile, where it pays: the half of each layer that works on positions alone.

Attention's layout follows each batch's documents, so compiling it would compile anew for every batch; the feed-forward
half has one shape, up to the number of tokens. Mixtures of experts, whose shapes differ by batch as well, stay as they are. The
first steps are slow, and results differ in the last bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..core.errors import ConfigError
from ..nn.moe import MoELayer
from .block import Layer
from .transformer import TransformerModel


@contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """Inside, every dense layer's second half runs compiled; afterwards the model is as it was. `ConfigError` where there is none."""
    if not isinstance(model, TransformerModel):
        raise ConfigError(f"compile: {type(model).__name__} has no layers to compile", field="train.compile")
    layers = [layer for layer in model.layers if isinstance(layer, Layer) and not any(isinstance(m, MoELayer) for m in layer.children())]
    if not layers:
        raise ConfigError(
            "compile: every layer is a mixture of experts, which is not compiled; leave train.compile out", field="train.compile"
        )
    for layer in layers:
        layer.feed = torch.compile(layer.feed)
    try:
        yield
    finally:
        for layer in layers:
            del layer.feed
