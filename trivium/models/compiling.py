"""torch.compile, where it pays: the half of each layer that works on positions alone.

Attention's layout follows each batch's documents, so compiling it would compile anew for every batch; the feed-forward
half has one shape, up to the number of tokens. The first steps are slow, and results differ in the last bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..core.errors import ConfigError
from .block import Layer
from .transformer import TransformerModel


@contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """Inside, every layer's second half runs compiled; afterwards the model is as it was. `ConfigError` for another kind of model."""
    if not isinstance(model, TransformerModel):
        raise ConfigError(f"compile: {type(model).__name__} has no layers to compile", field="train.compile")
    layers = [layer for layer in model.layers if isinstance(layer, Layer)]
    for layer in layers:
        layer.feed = torch.compile(layer.feed)
    try:
        yield
    finally:
        for layer in layers:
            del layer.feed
