"""The native kernels with their gradients. Callers ask `native.takes` first. None can be differentiated twice (an error says so)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import native

Backward = TypeVar("Backward", bound=Callable[..., Any])


def _once(backward: Backward) -> Backward:
    """torch's own `once_differentiable` lets a second derivative pass, as zero, where the incoming gradient is a constant."""

    @functools.wraps(backward)
    def checked(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():  # in a backward, only under create_graph
            raise RuntimeError("a native kernel has no second derivative; set TRIVIUM_NATIVE=0 to run on torch")
        return backward(ctx, grad)

    return checked  # type: ignore[return-value]


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, offset: float, round_first: bool) -> Tensor:
    """x / rms(x) * (weight + offset) over the last dimension, x [..., C], weight [C]."""
    if not torch.is_grad_enabled():  # a decoding step is small enough for autograd's own cost to show
        return native.rms_norm(x.contiguous(), weight, eps=eps, offset=offset, round_first=round_first)[0]
    return _RMSNorm.apply(x.contiguous(), weight, (eps, offset, round_first))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, form: tuple[float, float, bool]) -> Tensor:
        eps, offset, round_first = form
        y, scales = native.rms_norm(x, weight, eps=eps, offset=offset, round_first=round_first)
        ctx.save_for_backward(x, weight, scales)
        ctx.offset, ctx.round_first = offset, round_first
        return y

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scales = ctx.saved_tensors
        grad_x, grad_weight = native.rms_norm_backward(
            x, weight, scales, grad.contiguous(), offset=ctx.offset, round_first=ctx.round_first, weight_too=ctx.needs_input_grad[1]
        )
        return grad_x, grad_weight, None


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape; only the two are kept for the backward."""
    if not torch.is_grad_enabled():
        return native.silu_times(gate.contiguous(), up.contiguous())
    return _SiLUTimes.apply(gate.contiguous(), up.contiguous())


class _SiLUTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return native.silu_times(gate, up)

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return native.silu_times_backward(gate, up, grad.contiguous())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+D/2}) of x [B, H, T, D] by its angle; cos, sin [B|1, 1, T, D/2]. The result lies in memory as x does."""
    if not torch.is_grad_enabled():
        return native.rotate(x if x.stride(-1) == 1 else x.contiguous(), cos.contiguous(), sin.contiguous())
    return _Rotate.apply(x, cos.contiguous(), sin.contiguous())


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return native.rotate(x if x.stride(-1) == 1 else x.contiguous(), cos, sin)

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return native.rotate(grad if grad.stride(-1) == 1 else grad.contiguous(), cos, sin, back=True), None, None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """softmax(q k^T * scale) v where a query sees the keys up to its own place: q [B, H, T, D], k, v [B, K, T, D], H a multiple of K.

    The products are torch's, over all queries that share a key head at once; the softmax is made in place between them.
    """
    return _CausalAttention.apply(q, k, v, scale)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        batch, heads, time, dim = q.shape
        groups = batch * k.shape[1]
        grouped = q.reshape(groups, -1, dim)  # [B K, H/K T, D]
        keys, values = k.reshape(groups, time, dim), v.reshape(groups, time, -1)
        weights = native.causal_softmax_(torch.bmm(grouped, keys.transpose(1, 2)), scale)
        ctx.save_for_backward(grouped, keys, values, weights)
        ctx.scale, ctx.shapes = scale, (q.shape, k.shape, v.shape)
        return torch.bmm(weights, values).view(batch, heads, time, -1)

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        grouped, keys, values, weights = ctx.saved_tensors
        q, k, v = ctx.shapes
        grad = grad.reshape(*grouped.shape[:2], -1)
        scores = native.causal_softmax_backward_(weights, torch.bmm(grad, values.transpose(1, 2)), ctx.scale)
        grad_q, grad_k = torch.bmm(scores, keys), torch.bmm(scores.transpose(1, 2), grouped)
        return grad_q.view(q), grad_k.view(k), torch.bmm(weights.transpose(1, 2), grad).view(v), None
