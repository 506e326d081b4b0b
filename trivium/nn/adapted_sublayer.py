"""Bottleneck adapters: down, a nonlinearity and up, behind a sublayer (arXiv:1902.00751) or beside it (arXiv:2110.04366)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .adapted import Adapted, Place, Update
from .linear import Linear
from .step import Step

Reads = Literal["output", "sum", "input", "stream"]


class Bottleneck(Update):
    """s * up(f(down(x))) of what it `reads`: the sublayer's output, that and the stream in one sum, the sublayer's input, or the
    stream before the sublayer's norm. It starts as zero."""

    def __init__(self, dim: int, size: int, *, activation: nn.Module, reads: Reads, scale: float, like: Tensor):
        super().__init__()
        self.scale = scale
        self.reads: Reads = reads
        self.down = Linear(dim, size, bias=True).to(device=like.device, dtype=like.dtype)
        self.activation = activation.to(device=like.device, dtype=like.dtype)
        self.up = Linear(size, dim, bias=True).to(device=like.device, dtype=like.dtype)

    @torch.no_grad()
    def reset(self, generator: torch.Generator, host: Adapted, model: nn.Module) -> None:
        weight = self.down.weight
        weight.copy_((torch.rand(weight.shape, generator=generator) * 2 - 1) / weight.shape[1] ** 0.5)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            assert parameter is not None
            parameter.zero_()

    def forward(self, stream: Tensor, read: Tensor, given: Tensor, step: Step) -> Tensor:
        """What is added to what the sublayer gave, [..., C] each."""
        match self.reads:
            case "output":
                x = given
            case "sum":
                x = stream + given
            case "input":
                x = read
            case "stream":
                x = stream
        return self.scale * self.up(self.activation(self.down(x, step)), step)


class Bottlenecks(Place):
    """The place of bottleneck adapters at one sublayer."""

    def forward(self, stream: Tensor, read: Tensor, given: Tensor, step: Step) -> Tensor:
        """What the sublayer gave with what each row's adapter adds, [B, T, C]. `stream`: what came in; `read`: the same, normed."""
        out = given
        for name, rows in self.chosen(step):
            update = self.adapters[name]
            if rows is None:
                return given + update(stream, read, given, step)
            out = out.index_add(0, rows, update(stream[rows], read[rows], given[rows], step))
        return out
