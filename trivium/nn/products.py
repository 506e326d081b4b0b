"""Matrix products as they are counted: nearly all of a model's arithmetic, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Product:
    """One product of two matrices. `flops`: two for each multiplication and addition; `left` and `right`: whether the
    gradient of that side is computed, which takes as many again."""

    flops: int
    left: bool
    right: bool

    @property
    def backward(self) -> int:
        return self.flops * (self.left + self.right)


class Multiplies(nn.Module):
    """A module that multiplies by matrices of its own, beside the linear maps in it."""

    def multiplied(self, tokens: int, *, flowing: bool) -> list[Product]:
        """Its own products for `tokens` tokens. `flowing`: whether its input has a gradient."""
        raise AssertionError
