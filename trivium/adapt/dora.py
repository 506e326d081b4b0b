"""DoRA (arXiv:2402.09353): LoRA of the directions of a map's rows, beside magnitudes of their own. Merging costs nothing
later, as with LoRA; it cannot be taken back, since the norms that were divided by are not kept."""

from __future__ import annotations

from typing import Literal

from ..nn.adapted import AdaptedLinear, LinearUpdate, LowRank
from ..nn.adapted_dora import Dora
from .lora import LoRA


class DoRA(LoRA):
    """m (W + s B A) / ||W + s B A|| on chosen linear maps; only m, A and B are trained."""

    kind: Literal["dora"] = "dora"  # type: ignore[assignment]

    @classmethod
    def tiny(cls) -> DoRA:
        return cls(rank=3, alpha=5.0, targets=("q", "ffn.out"), ranks={"q": 2})

    def update(self, low: LowRank, adapted: AdaptedLinear) -> LinearUpdate:
        return Dora(low, len(adapted.weight))
