"""A running mean of what is trained: after each update it goes a share of the way to the new weights (Polyak and Juditsky 1992).

It evens out the noise of the last updates, and is held in fp32, as a step of 1 - decay is lost in bf16. The first update begins
it, so that the weights before training count for nothing. What is not trained by gradients has no mean.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Average:
    """The mean of tensors over their updates, with weights that fall by `decay` an update. `tensors` holds it by name, in fp32 at
    least; `begun` says whether there was an update yet."""

    def __init__(self, tensors: Mapping[str, Tensor], decay: float):
        self.decay = decay
        self.begun = False
        self.tensors = {name: torch.empty_like(one, dtype=torch.promote_types(one.dtype, torch.float32)) for name, one in tensors.items()}

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor]) -> None:
        """Take `tensors` in, by the names that the mean has."""
        for name, mean in self.tensors.items():
            if self.begun:
                mean.lerp_(tensors[name].to(mean.dtype), 1 - self.decay)
            else:
                mean.copy_(tensors[name])
        self.begun = True

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a mean that was saved."""
        for name, mean in self.tensors.items():
            mean.copy_(tensors[name])
        self.begun = True
