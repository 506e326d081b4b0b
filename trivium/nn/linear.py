"""Linear maps as passes see them: every one that a pass may replace is called `linear(x, step)`.

`Projections` holds the maps that read the same input, apart (q, k, v; gate, up), so that adapters, merging and
sharding stay trivial; fusing them is a pass over this container.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .step import Step

# A weight, or what makes it anew in a dtype: that of a map which holds it in another form.
Source = Tensor | Callable[[torch.dtype], Tensor]


class OwnStart(nn.Module):
    """A module whose parameters start at values of its own rather than at random ones."""

    def reset(self) -> None:
        """Set every parameter that is this module's own."""
        raise AssertionError


class Linear(nn.Module):
    """`x [..., in] -> [..., out]`; weight [out, in]."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor, step: Step) -> Tensor:
        return self.times(x)

    def times(self, x: Tensor) -> Tensor:
        """The product itself, which needs to know nothing of the step."""
        return F.linear(x, self.weight, self.bias)

    @property
    def frozen(self) -> bool:
        """Whether the weight has no gradient."""
        return not self.weight.requires_grad

    @property
    def source(self) -> Source:
        return self.weight

    @torch.no_grad()
    def put(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take these values, rounded to what the map holds."""
        self.weight.copy_(weight)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}{'' if self.bias is None else ', bias'}"


class Projections(nn.Module):
    """Several linear maps of one input, by name, in order."""

    def __init__(self, **maps: nn.Module):
        super().__init__()
        for name, module in maps.items():
            self.add_module(name, module)

    @property
    def names(self) -> list[str]:
        return list(self._modules)

    def forward(self, x: Tensor, step: Step) -> list[Tensor]:
        return [module(x, step) for module in self._modules.values() if module is not None]
