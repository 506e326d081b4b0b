"""What a recipe that trains hands back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn


@dataclass(frozen=True)
class Run:
    """A finished run: where its result was saved, the model as it stands, and its last metrics by name."""

    path: Path
    model: nn.Module
    metrics: dict[str, float]
