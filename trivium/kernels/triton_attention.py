"""Attention in Triton, fused, forward and backward: no score leaves the chip, and backward computes them again.

Queries of one head stand still while keys go by (forward, and the gradient of queries); keys stand still while the queries of
all heads of their group go by (the gradients of keys and values), so that no sum is atomic and results are the same every run.
arXiv:2205.14135, arXiv:2307.08691. Left out: dropout, and tuning of tiles by device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numpy has no bfloat16: the interpreter's products are wrong in it, and it rounds toward zero.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class How:
    """What is computed. Query i stands at key `offset` + i. `causal`: keys after it are hidden; `window` > 0: so are keys `window`
    or more away. `softcap` > 0: c * tanh(score / c). `block`: queries and keys of a tile, powers of two from 16 on."""

    scale: float
    causal: bool = False
    offset: int = 0
    window: int = 0
    softcap: float = 0.0
    block: tuple[int, int] | None = None

    def tile(self, q: Tensor, v: Tensor) -> tuple[int, int]:
        """Sizes whose operands fit the shared memory of a current GPU."""
        small = q.dtype == torch.float32 or max(q.shape[-1], v.shape[-1]) > 128
        return self.block or ((32, 32) if small else (64, 64))


def forward(
    q: Tensor, k: Tensor, v: Tensor, how: How, *, bias: Tensor | None, mask: Tensor | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D], k [B, K, S, D], v [B, K, S, E]; `bias` (numbers) and `mask` (bool) [B|1, H|1, T|1, S|1]; `sinks` [H] ->
    what attention gives [B, H, T, E], and the log of each query's sum [B, H, T], float32, -inf where it sees nothing."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    batch, heads, count, _ = q.shape
    out, lse = q.new_empty(batch, heads, count, v.shape[-1]), q.new_empty(batch, heads, count, dtype=torch.float32)
    rows, _ = how.tile(q, v)
    grid = (triton.cdiv(count, rows) * batch * heads,)
    _forward[grid](
        q, k, v, out, lse, q if sinks is None else sinks, *_common(q, k, v, how, bias, mask), SINKS=tl.constexpr(sinks is not None)
    )
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    how: How,
    *,
    bias: Tensor | None,
    mask: Tensor | None,
    wants_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of q, k and v; sum(dO * O) [B, H, T], of which the sinks' follows; and with `wants_bias` that of the bias
    [B, H, T, S], float32."""
    grad, q, k, v = (x.contiguous() for x in (grad, q, k, v))
    batch, heads, count, _ = q.shape
    kv_heads, slots = k.shape[1:3]
    delta = (grad.float() * out.float()).sum(-1)
    lse = torch.where(lse == -torch.inf, torch.inf, lse)  # a query that sees nothing has weights of zero
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dbias = torch.zeros(batch, heads, count, slots, device=q.device) if wants_bias else None
    common, (rows, cols) = _common(q, k, v, how, bias, mask), how.tile(q, v)
    _backward_queries[(triton.cdiv(count, rows) * batch * heads,)](q, k, v, grad, lse, delta, dq, *common)
    _backward_keys[(triton.cdiv(slots, cols) * batch * kv_heads,)](
        q, k, v, grad, lse, delta, dk, dv, q if dbias is None else dbias, *common, WANTS_BIAS=tl.constexpr(wants_bias)
    )
    return dq, dk, dv, delta, dbias


def _common(q: Tensor, k: Tensor, v: Tensor, how: How, bias: Tensor | None, mask: Tensor | None) -> tuple:
    """The arguments that all three kernels end with, in their order."""
    batch, heads, count, dim = q.shape
    kv_heads, slots, width = k.shape[1], k.shape[2], v.shape[-1]
    whole = (batch, heads, count, slots)
    given = [
        (q, (0, 0, 0, 0)) if x is None else (x, x.expand(whole).stride()) for x in (bias, None if mask is None else mask.view(torch.uint8))
    ]
    flat = [y for x, strides in given for y in (x, *strides)]
    rows, cols = how.tile(q, v)
    wide = [max(16, triton.next_power_of_2(x)) for x in (dim, width)]
    flags = (how.causal, how.window, how.softcap, bias is not None, mask is not None, dim, width, *wide, rows, cols)
    return (*flat, heads, kv_heads, count, slots, how.offset, how.scale, *flags)


@triton.jit
def _dot(a, b):
    """Products in full precision, summed in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _round(x, dtype: tl.constexpr):
    """float32 to another type, to the nearest, half to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _load(x, rows, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """These rows of the matrix at `x`, [M, BLOCK], zero outside."""
    wide = tl.arange(0, BLOCK)
    return tl.load(x + rows[:, None] * WIDTH + wide[None, :], mask=(rows[:, None] < count) & (wide[None, :] < WIDTH), other=0.0)


@triton.jit
def _store(x, value, rows, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    wide = tl.arange(0, BLOCK)
    inside = (rows[:, None] < count) & (wide[None, :] < WIDTH)
    tl.store(x + rows[:, None] * WIDTH + wide[None, :], _round(value, x.dtype.element_ty), mask=inside)


@triton.jit
def _scores(
    q,
    k,
    rows,
    cols,
    bias,
    bias_t,
    bias_s,
    mask,
    mask_t,
    mask_s,
    count,
    slots,
    offset,
    scale,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
):
    """Scores [M, N] of q [M, D] and k [N, D], -inf where hidden; and tanh(score / softcap), for the gradient."""
    scores = _dot(q, tl.trans(k)) * scale
    bent = scores
    if SOFTCAP > 0:
        bent = 2 * tl.sigmoid(2 * scores / SOFTCAP) - 1
        scores = SOFTCAP * bent
    seen = (rows[:, None] < count) & (cols[None, :] < slots)
    if BIAS:
        scores += tl.load(bias + rows[:, None] * bias_t + cols[None, :] * bias_s, mask=seen, other=0.0).to(tl.float32)
    back = rows[:, None] + offset - cols[None, :]
    if CAUSAL:
        seen = seen & (back >= 0)
    if WINDOW > 0:
        seen = seen & (back < WINDOW) & (back > -WINDOW)
    if MASK:
        seen = seen & (tl.load(mask + rows[:, None] * mask_t + cols[None, :] * mask_s, mask=seen, other=0) != 0)
    return tl.where(seen, scores, float("-inf")), bent


@triton.jit
def _keys_of(first, offset, slots, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The range of keys that the M queries from `first` on can reach, from the start of a tile."""
    low, high = 0, slots
    if CAUSAL:
        high = tl.minimum(high, first + M + offset)
    if WINDOW > 0:
        low = tl.maximum(low, first + offset - WINDOW + 1) // N * N
        high = tl.minimum(high, first + M + offset + WINDOW - 1)
    return low, high


@triton.jit
def _queries_of(first, offset, count, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The range of queries that can reach the N keys from `first` on, from the start of a tile."""
    low, high = 0, count
    if CAUSAL:
        low = tl.maximum(low, first - offset) // M * M
    if WINDOW > 0:
        low = tl.maximum(low, (first - offset - WINDOW + 1) // M * M)
        high = tl.minimum(high, first + N - offset + WINDOW - 1)
    return low, high


@triton.jit
def _forward(
    q,
    k,
    v,
    out,
    lse,
    sinks,
    bias,
    bias_b,
    bias_h,
    bias_t,
    bias_s,
    mask,
    mask_b,
    mask_h,
    mask_t,
    mask_s,
    heads,
    kv_heads,
    count,
    slots,
    offset,
    scale,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SINKS: tl.constexpr,
):
    blocks = tl.cdiv(count, M)
    first, both = tl.program_id(0) % blocks * M, (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = both // heads, both % heads
    pair = batch * kv_heads + head // (heads // kv_heads)
    bias += batch * bias_b + head * bias_h
    mask += batch * mask_b + head * mask_h
    rows = first + tl.arange(0, M)
    query = _load(q + both * count * DIM, rows, count, DIM, D)
    top, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    if SINKS:  # one key whose score is known and whose value is zero
        top, total = tl.zeros([M], tl.float32) + tl.load(sinks + head).to(tl.float32), tl.full([M], 1.0, tl.float32)
    mixed = tl.zeros([M, E], tl.float32)
    low, high = _keys_of(first, offset, slots, CAUSAL, WINDOW, M, N)
    for at in range(low, high, N):
        cols = at + tl.arange(0, N)
        key, value = _load(k + pair * slots * DIM, cols, slots, DIM, D), _load(v + pair * slots * WIDTH, cols, slots, WIDTH, E)
        scores, _ = _scores(
            query,
            key,
            rows,
            cols,
            bias,
            bias_t,
            bias_s,
            mask,
            mask_t,
            mask_s,
            count,
            slots,
            offset,
            scale,
            CAUSAL,
            WINDOW,
            SOFTCAP,
            BIAS,
            MASK,
        )
        best = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(best == float("-inf"), 0.0, best)
        weights, kept = tl.exp(scores - safe[:, None]), tl.exp(top - safe)
        total = total * kept + tl.sum(weights, 1)
        mixed = mixed * kept[:, None] + _dot(_round(weights, value.dtype), value)
        top = best
    whole = tl.where(total > 0, total, 1.0)
    _store(out + both * count * WIDTH, mixed / whole[:, None], rows, count, WIDTH, E)
    tl.store(lse + both * count + rows, tl.where(total > 0, top + tl.log(whole), float("-inf")), mask=rows < count)


@triton.jit
def _backward_queries(
    q,
    k,
    v,
    grad,
    lse,
    delta,
    dq,
    bias,
    bias_b,
    bias_h,
    bias_t,
    bias_s,
    mask,
    mask_b,
    mask_h,
    mask_t,
    mask_s,
    heads,
    kv_heads,
    count,
    slots,
    offset,
    scale,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    blocks = tl.cdiv(count, M)
    first, both = tl.program_id(0) % blocks * M, (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = both // heads, both % heads
    pair = batch * kv_heads + head // (heads // kv_heads)
    bias += batch * bias_b + head * bias_h
    mask += batch * mask_b + head * mask_h
    rows = first + tl.arange(0, M)
    query, given = _load(q + both * count * DIM, rows, count, DIM, D), _load(grad + both * count * WIDTH, rows, count, WIDTH, E)
    sums = tl.load(lse + both * count + rows, mask=rows < count, other=float("inf"))
    shared = tl.load(delta + both * count + rows, mask=rows < count, other=0.0)
    found = tl.zeros([M, D], tl.float32)
    low, high = _keys_of(first, offset, slots, CAUSAL, WINDOW, M, N)
    for at in range(low, high, N):
        cols = at + tl.arange(0, N)
        key, value = _load(k + pair * slots * DIM, cols, slots, DIM, D), _load(v + pair * slots * WIDTH, cols, slots, WIDTH, E)
        scores, bent = _scores(
            query,
            key,
            rows,
            cols,
            bias,
            bias_t,
            bias_s,
            mask,
            mask_t,
            mask_s,
            count,
            slots,
            offset,
            scale,
            CAUSAL,
            WINDOW,
            SOFTCAP,
            BIAS,
            MASK,
        )
        dscores = tl.exp(scores - sums[:, None]) * (_dot(given, tl.trans(value)) - shared[:, None])
        if SOFTCAP > 0:
            dscores = dscores * (1 - bent * bent)
        found += _dot(_round(dscores, key.dtype), key)
    _store(dq + both * count * DIM, found * scale, rows, count, DIM, D)


@triton.jit
def _backward_keys(
    q,
    k,
    v,
    grad,
    lse,
    delta,
    dk,
    dv,
    dbias,
    bias,
    bias_b,
    bias_h,
    bias_t,
    bias_s,
    mask,
    mask_b,
    mask_h,
    mask_t,
    mask_s,
    heads,
    kv_heads,
    count,
    slots,
    offset,
    scale,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WANTS_BIAS: tl.constexpr,
):
    blocks = tl.cdiv(slots, N)
    first, pair = tl.program_id(0) % blocks * N, (tl.program_id(0) // blocks).to(tl.int64)
    batch, group = pair // kv_heads, heads // kv_heads
    cols = first + tl.arange(0, N)
    key, value = _load(k + pair * slots * DIM, cols, slots, DIM, D), _load(v + pair * slots * WIDTH, cols, slots, WIDTH, E)
    key_sums, value_sums = tl.zeros([N, D], tl.float32), tl.zeros([N, E], tl.float32)
    low, high = _queries_of(first, offset, count, CAUSAL, WINDOW, M, N)
    for member in range(group):
        head = (pair % kv_heads) * group + member
        both = batch * heads + head
        bias_at, mask_at = bias + batch * bias_b + head * bias_h, mask + batch * mask_b + head * mask_h
        for at in range(low, high, M):
            rows = at + tl.arange(0, M)
            query, given = _load(q + both * count * DIM, rows, count, DIM, D), _load(grad + both * count * WIDTH, rows, count, WIDTH, E)
            sums = tl.load(lse + both * count + rows, mask=rows < count, other=float("inf"))
            shared = tl.load(delta + both * count + rows, mask=rows < count, other=0.0)
            scores, bent = _scores(
                query,
                key,
                rows,
                cols,
                bias_at,
                bias_t,
                bias_s,
                mask_at,
                mask_t,
                mask_s,
                count,
                slots,
                offset,
                scale,
                CAUSAL,
                WINDOW,
                SOFTCAP,
                BIAS,
                MASK,
            )
            weights = tl.exp(scores - sums[:, None])
            value_sums += _dot(tl.trans(_round(weights, given.dtype)), given)
            dscores = weights * (_dot(given, tl.trans(value)) - shared[:, None])
            if WANTS_BIAS:
                inside = (rows[:, None] < count) & (cols[None, :] < slots)
                tl.store(dbias + both * count * slots + rows[:, None] * slots + cols[None, :], dscores, mask=inside)
            if SOFTCAP > 0:
                dscores = dscores * (1 - bent * bent)
            key_sums += _dot(tl.trans(_round(dscores, query.dtype)), query)
    _store(dk + pair * slots * DIM, key_sums * scale, cols, slots, DIM, D)
    _store(dv + pair * slots * WIDTH, value_sums, cols, slots, WIDTH, E)
