"""DoRA: a weight as magnitude times direction, and a low-rank update of the direction (arXiv:2402.09353).

y = m * (W + scale B A) x / ||W + scale B A||, the norm of each output's row taken as a constant in the backward, as the
paper has it (4.3) and PEFT does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapted import Adapted, AdaptedLinear, LinearUpdate, LowRank
from .step import Step


class Dora(LinearUpdate):
    """`low`: the update of the direction. `magnitude` [out]: the norm of each row."""

    def __init__(self, low: LowRank, outputs: int):
        super().__init__()
        self.low = low
        self.magnitude = nn.Parameter(torch.empty(outputs, dtype=low.B.dtype, device=low.B.device))

    @torch.no_grad()
    def reset(self, generator: torch.Generator, host: Adapted, model: nn.Module) -> None:
        """The magnitudes are those of the base's rows: the model starts unchanged."""
        assert isinstance(host, AdaptedLinear)
        self.low.reset(generator, host, model)
        self.magnitude.copy_(norms(host.base.weight.float() + self.low.delta()))

    def ratio(self, weight: Tensor) -> Tensor:
        """m / ||W + delta||, [out]: 1 where nothing was learned."""
        with torch.no_grad():
            size = norms(weight.float() + self.low.delta()).to(self.magnitude.dtype)
        return self.magnitude / size

    def forward(self, x: Tensor, host: AdaptedLinear, step: Step) -> Tensor:
        base, dropped = host.base, self.low.dropped(x)
        y, ratio = base(x, step), self.ratio(base.weight)
        plain = F.linear(dropped, base.weight) if dropped is not x else y if base.bias is None else y - base.bias
        return y + (ratio - 1) * plain + ratio * self.low.beside(dropped)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        summed = weight.float() + self.low.delta()
        return summed * (self.magnitude.float() / norms(summed))[:, None], bias


def norms(weight: Tensor) -> Tensor:
    """Of each row: [out, in] -> [out]."""
    return torch.linalg.vector_norm(weight, dim=1)
