"""Linear maps that hold their weights in four bits (QLoRA, arXiv:2305.14314): NormalFloat codes in blocks, whose scales are
quantized again to eight bits.

The full weight is made for a product and dropped after it; the backward makes it again. It has no gradient: what is trained stands
beside it. Left out: products of the codes themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import ConfigError
from . import blockwise
from .linear import Linear, OwnStart

OUTER = 256  # scales that share a scale


class Nf4Linear(Linear, OwnStart):
    """`x [..., in] -> [..., out]`. `codes`: two to a byte. `scales`: of blocks of `block` weights in their order; with `double`, each in
    8 bits about their mean, in blocks of 256, whose own scales and the mean are `outer`. Numbers of 32 bits are held as integers of the same
    bits, so that a cast of the model leaves them as they are; `like`, which is empty, is cast with it, and says what `weight` comes in."""

    def __init__(self, inputs: int, outputs: int, *, block: int, double: bool):
        nn.Module.__init__(self)  # not the one of Linear: there is no weight to hold
        self.inputs, self.outputs, self.block, self.double = inputs, outputs, block, double
        blocks = -(-inputs * outputs // block)
        self.codes = _frozen(torch.empty(-(-inputs * outputs // 2), dtype=torch.uint8))
        self.scales = _frozen(torch.empty(blocks, dtype=torch.uint8 if double else torch.int32))
        self.outer = _frozen(torch.empty(-(-blocks // OUTER) + 1, dtype=torch.int32)) if double else None
        self.like = _frozen(torch.empty(0))
        self.bias: nn.Parameter | None = None
        self.origin: torch.dtype | None = None  # what the weights came in

    @torch.no_grad()
    def take(self, weight: Tensor) -> None:
        """Hold what is nearest to `weight` [out, in]. `ConfigError` where it is not finite."""
        codes, scales = blockwise.encode(weight, "nf4", block=self.block)
        if not scales.isfinite().all():
            raise ConfigError("holds weights that are not finite")
        self.codes.copy_(blockwise.pack(codes))
        self.origin = weight.dtype
        if self.outer is None:
            self.scales.copy_(scales.view(torch.int32))
            return
        mean = scales.mean()
        inner, outer = blockwise.encode(scales - mean, "dynamic", block=OUTER)
        self.scales.copy_(inner)
        self.outer.copy_(torch.cat([outer, mean[None]]).view(torch.int32))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], made anew."""
        count = self.inputs * self.outputs
        return blockwise.decode_packed(self.codes, self._scales(), count=count, block=self.block, dtype=dtype).view(
            self.outputs, self.inputs
        )

    def _scales(self) -> Tensor:
        """Of each block, float32."""
        if self.outer is None:
            return self.scales.view(torch.float32)
        outer = self.outer.view(torch.float32)
        return blockwise.decode(self.scales, outer[:-1], "dynamic", block=OUTER).add_(outer[-1])

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """What `dense` gives in the model's dtype: a copy, so that nothing is changed by writing to it."""
        return self.dense(self.like.dtype)

    @property
    def frozen(self) -> bool:
        return True

    @property
    def source(self) -> Callable[[torch.dtype], Tensor]:
        return self.dense

    @torch.no_grad()
    def put(self, weight: Tensor, bias: Tensor | None) -> None:
        """Round `weight` to four bits again, which loses what a merged update is too small to reach."""
        self.take(weight)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def times(self, x: Tensor) -> Tensor:
        y = _Product.apply(x, self.dense) if torch.is_grad_enabled() and x.requires_grad else F.linear(x, self.dense(x.dtype))
        return y if self.bias is None else y + self.bias

    def reset(self) -> None:
        raise ConfigError("weights of four bits are made of others: draw the model first, then apply the pass 'nf4'")

    @property
    def bytes(self) -> int:
        """That the weights take, scales included."""
        return sum(part.nbytes for part in (self.codes, self.scales, self.outer) if part is not None)

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {self.outputs}, nf4{'' if self.bias is None else ', bias'}"


class _Product(torch.autograd.Function):
    """x W^T for a W that is made for the product, and once more in the backward: between them, nobody holds it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.weight(grad.dtype), None


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
