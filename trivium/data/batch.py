"""What one step trains on: packed rows of tokens, the document of each token, which tokens are predicted, and numbers that
came with the documents (a label, a margin, a reference's log-probability)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of documents, one after another. The first token of a document is never a target."""

    tokens: Tensor  # [B, T] int64, 0 where there is padding
    segments: Tensor  # [B, T] int64, the document of each token, counted from 0 in each row; -1 is padding
    targets: Tensor  # [B, T] bool, token t is predicted, from what stands before it in its document
    values: Mapping[str, Tensor] = field(default_factory=dict)  # each [B, D] float32: of the D-th document of a row, 0 where there is none

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        values = {name: value.to(device) for name, value in self.values.items()}
        return Batch(self.tokens.to(device), self.segments.to(device), self.targets.to(device), values)

    def split(self, n: int) -> list[Batch]:
        """At most `n` micro-batches of near equal numbers of rows, in order, each as wide as its longest row."""
        return [self._rows(rows) for rows in torch.arange(len(self.tokens)).tensor_split(n) if len(rows)]

    def _rows(self, rows: Tensor) -> Batch:
        own = slice(int(rows[0]), int(rows[-1]) + 1)
        width = int((self.segments[own] >= 0).sum(1).max())
        values = {name: value[own] for name, value in self.values.items()}
        return Batch(self.tokens[own, :width], self.segments[own, :width], self.targets[own, :width], values)
