"""Attention itself, softmax(q k^T * scale) v, behind one signature and several backends.

`eager` states it naively and can return its weights; `native` is eager with a native softmax; `sdpa` is torch's. All take
grouped heads as they are.
`attend` is what attention layers call: it computes documents apart, gathered into groups of like length, and tells a
backend no more than it must know: nothing, the causal triangle, or a mask.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import ConfigError
from ..core.registry import Registry
from ..kernels import functions, native
from .step import Documents, View


class Backend(Protocol):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
        """q [B, H, T, D], k and v [B, K, S, D], H a multiple of K -> [B, H, T, D]. `causal`: T = S, later keys hidden.
        `mask` [B|1, 1, T|1, S] bool, true where a key is seen. A query that sees nothing gives zeros."""
        ...


backends: Registry[Backend] = Registry("attention backend", "trivium.nn")


def eager_weights(q: Tensor, k: Tensor, *, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    """Attention weights [B, H, T, S] in q's dtype; rows that see nothing are zero. torch's softmax sums in float32 at least."""
    batch, heads, count, dim = q.shape
    kv_heads, slots = k.shape[1], k.shape[2]
    grouped = (q * scale).reshape(batch, kv_heads, heads // kv_heads * count, dim)
    scores = (grouped @ k.transpose(-1, -2)).view(batch, heads, count, slots)
    if causal:
        return torch.softmax(scores + torch.full((count, slots), float("-inf"), dtype=q.dtype, device=q.device).triu_(1), -1)
    if mask is None:
        return torch.softmax(scores, -1)
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1)
    return weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)


@backends.register("eager")
def eager(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    """The naive statement, products and softmax apart."""
    return _weighted(eager_weights(q, k, scale=scale, causal=causal, mask=mask), v)


def eager_dropping(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None, dropout: float) -> Tensor:
    """`eager` with each weight dropped with probability `dropout`, by torch's global generator."""
    return _weighted(F.dropout(eager_weights(q, k, scale=scale, causal=causal, mask=mask), dropout), v)


def _weighted(weights: Tensor, v: Tensor) -> Tensor:
    """weights [B, H, T, S], v [B, K, S, D] -> [B, H, T, D]."""
    batch, heads, count, slots = weights.shape
    kv_heads = v.shape[1]
    return (weights.view(batch, kv_heads, -1, slots) @ v).view(batch, heads, count, -1)


@backends.register("native")
def products(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    """As eager, the causal softmax in one native pass where the library takes these tensors."""
    if causal and scale > 0 and q.numel() and native.takes(q, k, v):
        return functions.causal_attention(q, k, v, scale=scale)
    return eager(q, k, v, scale=scale, causal=causal, mask=mask)


@backends.register("sdpa")
def sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    """torch's scaled_dot_product_attention."""
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    if mask is not None:
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return out


@backends.register("auto")
def auto(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    """On a CPU, plain products for few queries, and for short documents (SDPA's backward there costs several times
    its forward; measured in benchmarks/NOTES.md); SDPA otherwise."""
    short = q.shape[2] <= 16 or q.shape[2] * k.shape[2] <= (512 * 512 if q.requires_grad or k.requires_grad else 256 * 256)
    return (products if q.device.type == "cpu" and short else sdpa)(q, k, v, scale=scale, causal=causal, mask=mask)


def attend(q: Tensor, k: Tensor, v: Tensor, view: View, *, scale: float, backend: str, dropout: float = 0.0) -> Tensor:
    """q [B, H, T, D], k and v [B, K, S, D] -> [B, H, T, D], each query over what `view` lets it see.

    Only `eager` holds the weights that `dropout` drops: `auto` then means `eager`, any other backend is a `ConfigError`.
    """
    run: Backend = backends.get(backend)
    if dropout:
        if backend not in ("auto", "eager"):
            raise ConfigError(
                f"the attention backend {backend!r} cannot drop weights; use 'eager' or 'auto', or set the attention's dropout to 0",
                field="dropout",
                value=dropout,
            )
        run = partial(eager_dropping, dropout=dropout)
    documents = view.documents
    if documents is not None:
        return _attend_documents(q, k, v, documents, run, scale=scale, causal=view.causal)
    if view.plain:
        return run(q, k, v, scale=scale, causal=False, mask=None)
    if view.triangle:
        return run(q, k, v, scale=scale, causal=True, mask=None)
    return run(q, k, v, scale=scale, causal=False, mask=view.mask())


def _attend_documents(q: Tensor, k: Tensor, v: Tensor, documents: Documents, run: Backend, *, scale: float, causal: bool) -> Tensor:
    batch, heads, count, _ = q.shape
    q, k, v = (x.transpose(1, 2).reshape(batch * count, -1, x.shape[-1]) for x in (q, k, v))
    gathered = [_Regroup.apply(x, documents.slots, documents.places, documents.padding) for x in (q, k, v)]
    outs, base = [], 0
    for group in documents.groups:
        rows, length = group.slots.shape
        part = [x[base : base + rows * length].view(rows, length, -1, x.shape[-1]).transpose(1, 2) for x in gathered]
        mask = None
        if group.ragged and not causal:
            mask = (torch.arange(length, device=q.device) < group.lengths[:, None])[:, None, None]
        out = run(*part, scale=scale, causal=causal, mask=mask)
        outs.append(out.transpose(1, 2).reshape(rows * length, heads, -1))
        base += rows * length
    joined = outs[0] if len(outs) == 1 else torch.cat(outs)
    out = _Regroup.apply(joined, documents.places, documents.slots, documents.spare)
    return out.view(batch, count, heads, -1).transpose(1, 2)


class _Regroup(torch.autograd.Function):
    """`x[there]`, where `back` undoes it: each row of `x` that counts stands in one place that counts, so the gradient
    is a gather too. `back_void` lists the rows of `x` that stand for nothing; their gradients are zero."""

    @staticmethod
    def forward(ctx, x: Tensor, there: Tensor, back: Tensor, back_void: Tensor | None) -> Tensor:
        ctx.back, ctx.back_void = back, back_void
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        out = grad.index_select(0, ctx.back)
        if ctx.back_void is not None:
            out.index_fill_(0, ctx.back_void, 0.0)
        return out, None, None, None
