"""Linear maps whose weights take two or three values: BitNet (arXiv:2310.11453) and b1.58 (arXiv:2402.17764).

Training keeps a full weight, rounds it and the activations in every forward, and passes gradients through the rounding
as if it were not there. For inference the rounded weights are packed, 1 or 2 bits each, and applied by additions alone.
Left out: kernels that are faster than the products they replace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.registry import Registry
from .linear import Linear
from .products import Multiplies, Product
from .step import Step

Coded = tuple[Tensor, Tensor]  # whole numbers, and what they are divided by


@dataclass(frozen=True)
class Scheme:
    """How weights become whole numbers, the codes: -1 and every `stride`-th number up to 1, of `bits` bits each. `code`: a
    float32 matrix -> its codes, and the number that they are divided by."""

    bits: int
    stride: int
    code: Callable[[Tensor], Coded]


schemes: Registry[Scheme] = Registry("low-bit scheme", "trivium.nn.low_bit")


def _sign(weight: Tensor) -> Coded:
    """1 above the mean of the matrix, -1 elsewhere, times the mean magnitude (arXiv:2310.11453, equations 1 to 3 and 12)."""
    return torch.where(weight > weight.mean(), 1.0, -1.0), _inverse(weight.abs().mean())


def _ternary(weight: Tensor) -> Coded:
    """The nearest of -1, 0, 1 to the weight over the mean magnitude (absmean; arXiv:2402.17764, equations 1 to 3)."""
    scale = _inverse(weight.abs().mean())
    return (weight * scale).round().clamp(-1, 1), scale


def _inverse(size: Tensor) -> Tensor:
    return 1.0 / size.clamp(min=1e-5)


schemes.add("sign", Scheme(bits=1, stride=2, code=_sign))
schemes.add("ternary", Scheme(bits=2, stride=1, code=_ternary))


def code_activations(x: Tensor, bits: int) -> Coded:
    """[..., C] float32 -> whole numbers of `bits` bits, and each token's scale [..., 1]: the largest magnitude becomes the largest
    positive number (absmax)."""
    top = 2 ** (bits - 1) - 1
    scale = top / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (x * scale).round().clamp(-top - 1, top), scale


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, code: Callable[[Tensor], Coded]) -> Tensor:
        codes, scale = code(x.float())
        return (codes / scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def rounded(x: Tensor, code: Callable[[Tensor], Coded]) -> Tensor:
    """`x` as its codes have it; the gradient is that of `x` itself (straight through, arXiv:1308.3432)."""
    return _Rounded.apply(x, code)


class LowBitLinear(Multiplies):
    """Stands in for a `Linear`, whose parameters it takes: norm, rounded activations times rounded weights, bias.
    `activation_bits`: None leaves activations as they are. `norm`: what the input goes through first."""

    def __init__(self, linear: Linear, *, scheme: str, activation_bits: int | None, norm: nn.Module | None):
        super().__init__()
        self.scheme, self.activation_bits = scheme, activation_bits
        self.weight, self.bias, self.norm = linear.weight, linear.bias, norm

    def forward(self, x: Tensor, step: Step) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        if (bits := self.activation_bits) is not None:
            x = rounded(x, lambda values: code_activations(values, bits))
        return F.linear(x, rounded(self.weight, schemes.get(self.scheme).code), self.bias)

    def multiplied(self, tokens: int, *, flowing: bool) -> list[Product]:
        flowing = flowing or (self.norm is not None and any(p.requires_grad for p in self.norm.parameters()))
        return [Product(2 * tokens * self.weight.numel(), flowing, self.weight.requires_grad)]

    @torch.no_grad()
    def packed(self) -> PackedLinear:
        """The same map for inference, by what its weights are now."""
        return PackedLinear(self)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, {self.scheme}{'' if self.bias is None else ', bias'}"


class PackedLinear(nn.Module):
    """What a `LowBitLinear` computes, for inference: packed codes, no full weight, no product of matrices. Weights select
    which whole numbers of the input are added and which are taken away; one division for each output ends it."""

    def __init__(self, source: LowBitLinear):
        super().__init__()
        self.scheme, self.activation_bits, self.norm = schemes.get(source.scheme), source.activation_bits, source.norm
        codes, scale = self.scheme.code(source.weight.float())
        self.rows = len(codes)
        self.codes: Tensor
        self.scale: Tensor
        self.register_buffer("codes", pack(codes, self.scheme), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias = source.bias

    def forward(self, x: Tensor, step: Step) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        values, scale = x.float(), self.scale
        if self.activation_bits is not None:
            values, token_scale = code_activations(values, self.activation_bits)
            values, scale = values.to(torch.int32), scale * token_scale
        y = add_up(values.flatten(0, -2), unpack(self.codes, self.scheme, self.rows)).unflatten(0, x.shape[:-1])
        y = (y / scale).to(x.dtype)
        return y if self.bias is None else y + self.bias


def add_up(x: Tensor, codes: Tensor) -> Tensor:
    """x [N, in] int32 or float, codes [out, in] of -1, 0, 1 -> [N, out]: the sum of the inputs that have a 1 less that of those
    that have a -1. The naive statement, some outputs at a time."""
    block, zero = max(1, 2**20 // max(x.numel(), 1)), x.new_zeros(())
    parts = [
        torch.where(part > 0, x[:, None], zero).sum(-1, dtype=x.dtype) - torch.where(part < 0, x[:, None], zero).sum(-1, dtype=x.dtype)
        for part in codes.split(block)
    ]
    return torch.cat(parts, -1)


def pack(codes: Tensor, scheme: Scheme) -> Tensor:
    """[out, in] codes -> [ceil(out * bits / 8), in] uint8. With n codes to a byte the rows are cut into n equal parts, and byte
    [r, c] holds row r of each part, the first in its lowest bits: transformers' layout for BitNet. What the last part lacks is 0."""
    per = 8 // scheme.bits
    values = ((codes + 1) / scheme.stride).to(torch.uint8)
    rows = -(-len(values) // per)
    parts = F.pad(values, (0, 0, 0, rows * per - len(values))).view(per, rows, -1)
    out = torch.zeros_like(parts[0])
    for place, part in enumerate(parts):
        out |= part << place * scheme.bits
    return out


def unpack(packed: Tensor, scheme: Scheme, rows: int) -> Tensor:
    """What `pack` did, undone: the codes [rows, in], int8."""
    places = range(0, 8, scheme.bits)
    values = torch.cat([packed >> place & 2**scheme.bits - 1 for place in places])[:rows]
    return values.to(torch.int8) * scheme.stride - 1
