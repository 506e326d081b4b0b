"""Gradient checkpointing (arXiv:1604.06174): the backward computes activations again instead of keeping them.

torch's non-reentrant `checkpoint` does the work and gives back the random state of the first pass, so gradients are
bit-identical, dropout included. Kept are the inputs of what is computed again; offloading them is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.spec import Spec
from ..nn.step import Step
from .block import Layer

Piece = Callable[[Tensor, Step], Tensor]


class Recompute(Spec):
    """What the backward computes again. Whole layers in stretches of `every`, whose inputs alone are kept: n layers keep
    n / every inputs and, during the backward, the inside of one stretch. Or, layer by layer, one half of each."""

    every: int = Field(1, gt=0, description="layers that are computed again together")
    only: Literal["mixer", "ffn"] | None = Field(None, description="one half of each layer; none given: whole layers")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.only is not None and self.every != 1:
            raise ValueError(f"every ({self.every}) counts whole layers; leave it out, or leave out only ({self.only})")
        return self


def recomputed(layers: nn.ModuleList, x: Tensor, step: Step, recompute: Recompute) -> Tensor:
    """All `layers`, [B, T, C] -> [B, T, C], as `recompute` says."""
    for pieces, again in stretches(layers, recompute):
        run = partial(_run, pieces)
        x = checkpoint(run, x, step, use_reentrant=False) if again else run(x, step)
    return x


def stretches(layers: nn.ModuleList, recompute: Recompute) -> Iterator[tuple[list[Piece], bool]]:
    """Pieces that run one after another, in order, and whether the backward computes them again."""
    stack = [layer for layer in layers if isinstance(layer, Layer)]
    assert len(stack) == len(layers)
    if recompute.only is None:
        for start in range(0, len(stack), recompute.every):
            yield list(stack[start : start + recompute.every]), True
        return
    for layer in stack:
        yield [layer.mix], recompute.only == "mixer"
        yield [layer.feed], recompute.only == "ffn"


def _run(pieces: list[Piece], x: Tensor, step: Step) -> Tensor:
    for piece in pieces:
        x = piece(x, step)
    return x
