"""Further updates of a linear map: a scale for each channel, a map of its own, and a square matrix.

(IA)^3 scales keys, values and feed-forward channels (arXiv:2205.05638). MoRA puts one square matrix where LoRA has two
thin ones: of the same number of parameters, and of far higher rank (arXiv:2405.12130).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import TriviumError
from .adapted import Adapted, AdaptedLinear, LinearUpdate
from .products import Product
from .step import Step


class Scale(LinearUpdate):
    """Channels of the map's output, or of its input, times learned numbers that start at 1."""

    def __init__(self, host: AdaptedLinear, *, side: Literal["in", "out"]):
        super().__init__()
        self.side: Literal["in", "out"] = side
        self.inward = side == "in"
        self.factor = nn.Parameter(host.weight.new_empty(host.weight.shape[0 if side == "out" else 1]))

    def reset(self, generator: torch.Generator, host: Adapted, model: nn.Module) -> None:
        nn.init.ones_(self.factor)

    def forward(self, x: Tensor, host: AdaptedLinear, step: Step) -> Tensor:
        return host.base(x, step) * self.factor if self.side == "out" else host.base(x * self.factor, step)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = self.factor.float()
        if self.side == "in":
            return weight.float() * factor, bias
        return weight.float() * factor[:, None], None if bias is None else bias.float() * factor

    def unmerged(self, weight: Tensor, bias: Tensor | None, kept: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        factor = self.factor.float()
        if not bool((factor != 0).all()):
            raise TriviumError("a scale of 0 cannot be taken out: nothing is left of that channel of the base")
        if self.side == "in":
            return weight.float() / factor, bias
        return weight.float() / factor[:, None], None if bias is None else bias.float() / factor


class Whole(LinearUpdate):
    """A map of the adapter's own in the base's place, which starts as a copy of it."""

    replaces = True

    def __init__(self, host: AdaptedLinear):
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(host.weight))
        self.bias = None if host.base.bias is None else nn.Parameter(torch.empty_like(host.base.bias))

    @torch.no_grad()
    def reset(self, generator: torch.Generator, host: Adapted, model: nn.Module) -> None:
        assert isinstance(host, AdaptedLinear)
        self.weight.copy_(host.base.weight)
        if self.bias is not None and host.base.bias is not None:
            self.bias.copy_(host.base.bias)

    def forward(self, x: Tensor, host: AdaptedLinear, step: Step) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def multiplied(self, tokens: int, *, flowing: bool) -> list[Product]:
        return [Product(2 * tokens * self.weight.numel(), flowing, self.weight.requires_grad)]

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.weight.float(), self.bias

    def unmerged(self, weight: Tensor, bias: Tensor | None, kept: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        raise TriviumError("a map that was trained whole cannot be taken out: merging put it in the base's place; keep the base")


class Square(LinearUpdate):
    """y = base(x) + out(M in(x)), M [S, S]: the input is cut into stretches of S channels, stretch i turned by the angles
    i / 10000^(2j / S) as rotary positions turn position i, each multiplied by M, and laid out in a row again, which is repeated
    (or cut) to the output's width (the paper's f_compress and f_decompress of type 6)."""

    def __init__(self, host: AdaptedLinear, *, size: int, dropout: float):
        super().__init__()
        self.size, self.dropout, self.outputs = size, dropout, host.weight.shape[0]
        self.stretches = -(-host.weight.shape[1] // size)
        self.matrix = nn.Parameter(host.weight.new_empty(size, size))

    def reset(self, generator: torch.Generator, host: Adapted, model: nn.Module) -> None:
        nn.init.zeros_(self.matrix)

    def beside(self, x: Tensor, matrix: Tensor) -> Tensor:
        """The product with `matrix`, [..., in] -> [..., out]."""
        x = F.pad(x, (0, self.stretches * self.size - x.shape[-1])).unflatten(-1, (self.stretches, self.size))
        half = self.size // 2
        place = torch.arange(self.stretches, device=x.device, dtype=torch.float32)[:, None]
        angles = place * 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) * 2 / self.size)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x[..., :half], x[..., half:]
        y = F.linear(torch.cat([a * cos - b * sin, a * sin + b * cos], -1), matrix).flatten(-2)
        times = -(-self.outputs // y.shape[-1])
        return torch.cat([y] * times, -1)[..., : self.outputs]

    def forward(self, x: Tensor, host: AdaptedLinear, step: Step) -> Tensor:
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else x
        return host.base(x, step) + self.beside(dropped, self.matrix)

    def multiplied(self, tokens: int, *, flowing: bool) -> list[Product]:
        return [Product(2 * tokens * self.stretches * self.matrix.numel(), flowing, self.matrix.requires_grad)]

    def delta(self, inputs: int) -> Tensor:
        """The update as a full matrix [out, in], float32."""
        eye = torch.eye(inputs, device=self.matrix.device)
        return self.beside(eye, self.matrix.float()).T

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.float() + self.delta(weight.shape[1]), bias

    def unmerged(self, weight: Tensor, bias: Tensor | None, kept: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return weight.float() - self.delta(weight.shape[1]), bias


def square_size(inputs: int, outputs: int, rank: int) -> int:
    """The even side of the square matrix with about as many parameters as an update of this rank: sqrt((in + out) rank)."""
    return max(2, round(math.sqrt((inputs + outputs) * rank) / 2) * 2)
