"""What one forward takes and gives. Plain records: a model is a function from `Inputs` to `Output`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .store import Store

Keep = Literal["all", "last", "none"] | Tensor


@dataclass(frozen=True)
class Inputs:
    """One batch for one forward.

    `tokens` [B, T] int64. `positions` [B, T], or None: counting on from what the cache holds, from 0 at each document.
    `segments` [B, T]: the document that each token belongs to, -1 for padding; None: one document a row and no
    padding, decided without reading tensors. A document is one contiguous run of its row. `adapters` [B]: which of
    the loaded adapters a row uses, -1 for the base alone; None: the one adapter there is.
    """

    tokens: Tensor
    positions: Tensor | None = None
    segments: Tensor | None = None
    cache: Store | None = None
    adapters: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.tokens.shape
        if self.tokens.dim() != 2 or self.tokens.dtype != torch.int64:
            raise ValueError(f"tokens must be [B, T] int64, got {list(shape)} {self.tokens.dtype}")
        for name in ("positions", "segments"):
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"{name} must be {list(shape)} like tokens, got {list(value.shape)}")
        if self.adapters is not None and self.adapters.shape != shape[:1]:
            raise ValueError(f"adapters must be [{shape[0]}], one a row, got {list(self.adapters.shape)}")


@dataclass
class Output:
    """`hidden` [B, T, C] after the final norm. `logits` in the model's dtype, by `keep`: all [B, T, V]; last [B, V];
    a selector with N true places [N, V]; none: None. What stands at padding is finite and means nothing."""

    hidden: Tensor
    logits: Tensor | None


def as_inputs(inputs: Inputs | Tensor) -> Inputs:
    """A plain tensor of tokens [B, T] is accepted wherever `Inputs` are."""
    return inputs if isinstance(inputs, Inputs) else Inputs(inputs)
