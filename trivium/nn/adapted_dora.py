"""DoRA: a weight as magnitude times direction, and a low-rank update of the direction (arXiv:2402.09353).

y = m * (W + scale B A) x / ||W + scale B A||, the norm of each output's row taken as a constant in the backward, as the
paper has it (4.3) and PEFT does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.errors import TriviumError
from .adapted import Adapted, AdaptedLinear, LinearUpdate, LowRank
from .products import Product
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
        again = y if dropped is x else base(dropped, step)
        plain = again if base.bias is None else again - base.bias
        return y + (ratio - 1) * plain + ratio * self.low.beside(dropped)

    def multiplied(self, tokens: int, *, flowing: bool) -> list[Product]:
        """The norms take the update as a full matrix, without gradients; under dropout the base is multiplied a second time."""
        outputs, inputs = len(self.magnitude), self.low.A.shape[1]
        found = [Product(2 * A.numel() * outputs, False, False) for A, _ in self.low.blocks()]
        if self.low.dropout and self.training:
            found.append(Product(2 * tokens * outputs * inputs, flowing, False))
        return found + self.low.multiplied(tokens, flowing=flowing)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        summed = weight.float() + self.low.delta()
        return summed * (self.magnitude.float() / norms(summed))[:, None], bias

    def kept(self, weight: Tensor) -> Tensor:
        """The norms that merging divides by, [out], float32: all of the base that the merged weight has lost."""
        return norms(weight.float() + self.low.delta())

    def unmerged(self, weight: Tensor, bias: Tensor | None, kept: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if kept is None:
            raise TriviumError(
                "DoRA cannot be taken out of merged weights without the norms that merging divided by, which were not kept: "
                "keep the base, or an adapter that was saved here"
            )
        if not bool((self.magnitude != 0).all()):
            raise TriviumError("DoRA cannot be taken out where a magnitude is 0: nothing is left of that row of the base")
        return weight.float() * (kept.to(weight.device) / self.magnitude.float())[:, None] - self.low.delta(), bias


def norms(weight: Tensor) -> Tensor:
    """Of each row: [out, in] -> [out]."""
    return torch.linalg.vector_norm(weight, dim=1)
