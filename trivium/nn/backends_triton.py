"""Our attention kernels in Triton (`kernels/triton_attention`), as a backend.

A causal triangle and a sliding window over a plain row are the kernel's own business; any other mask, and a bias, is handed to it
whole. Without a GPU it runs in Triton's interpreter where TRITON_INTERPRET=1 asks for it, to be looked into; `tiled` is the same
algorithm in plain torch.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.errors import ConfigError, MissingExtra
from .backends import NONE, Extras, Mask, backends, dense, skipping
from .backends_tiled import tiled
from .patterns import Window
from .step import View

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


skipping.add("triton")


@backends.register("triton")
def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    mask: Mask | None,
    extras: Extras = NONE,
    block: tuple[int, int] | None = None,
) -> Tensor:
    """Fused forward and backward. `block`: queries and keys of a tile, powers of two from 16 on; None: by type and width."""
    if q.device.type == "cpu" and not interpreted():
        raise ConfigError(
            "the triton kernels need a GPU; use 'tiled', the same algorithm in torch, or set TRITON_INTERPRET=1 to look into them",
            field="backend",
            value="triton",
        )
    if not q.numel() or not k.numel():
        return tiled(q, k, v, scale=scale, causal=causal, mask=mask, extras=extras)
    if q.dtype not in DTYPES:
        raise ConfigError(f"the triton kernels take 16 and 32 bits, not {q.dtype}; use 'tiled'", field="backend", value="triton")
    shape = _Shape(causal)
    if isinstance(mask, View):
        shape = _shape(mask)
    seen = None if isinstance(mask, View) and shape.complete else dense(mask)
    bias = None
    if extras.bias is not None:
        assert extras.places is not None
        bias = extras.bias(*extras.places)
    how = kernels().How(scale, shape.causal, shape.offset, shape.window, extras.softcap or 0.0, block)
    return _Fused.apply(how, seen, q, k, v, bias, extras.sinks)


@dataclass(frozen=True)
class _Shape:
    """What the kernel can tell by itself of who sees whom; `complete`: that is all there is to it."""

    causal: bool
    offset: int = 0
    window: int = 0
    complete: bool = True


def _shape(view: View) -> _Shape:
    """Of a view over rows of one document each, without holes; anything else keeps its mask."""
    reach = view.bounded
    if not view.even or view.prefix is not None or not (reach is None or isinstance(reach, Window)):
        return _Shape(causal=False, complete=False)
    return _Shape(view.causal, view.slots.start, 0 if reach is None else reach.size)


def interpreted() -> bool:
    """Whether Triton was told to interpret."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def kernels() -> ModuleType:
    try:
        return importlib.import_module("trivium.kernels.triton_attention")
    except ModuleNotFoundError as error:
        raise MissingExtra("triton", "gpu", "the attention backend 'triton'") from error


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, how: Any, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None) -> Tensor:
        out, lse = kernels().forward(q, k, v, how, bias=bias, mask=mask, sinks=sinks)
        ctx.save_for_backward(q, k, v, out, lse, mask, bias, sinks)
        ctx.how = how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mask, bias, sinks = ctx.saved_tensors
        wants_bias = ctx.needs_input_grad[5]
        dq, dk, dv, delta, dbias = kernels().backward(grad, q, k, v, out, lse, ctx.how, bias=bias, mask=mask, wants_bias=wants_bias)
        if dbias is not None:
            dbias = dbias.sum_to_size(bias.shape).to(bias.dtype)
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[6]:  # the sink's weight is exp(sink - lse), its value zero
            dsinks = -(torch.exp(sinks.float()[:, None] - lse) * delta).sum((0, 2)).to(sinks.dtype)
        return None, None, dq, dk, dv, dbias, dsinks
