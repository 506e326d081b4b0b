"""FlashAttention in plain torch: attention by tiles, forward and backward, in memory that grows with T and not with T x S.

Forward keeps of each query what softmax needs (`online_softmax`) and saves one number for it, the log of its sum; backward
computes each tile of weights again from that number. The statement of the algorithm that fused kernels are read beside, and the
way to run what no kernel takes; tiles that hide everything are skipped. arXiv:2205.14135, arXiv:2307.08691.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import NONE, Bias, Extras, Mask, backends, weighted
from .online_softmax import Partial, Running, finite
from .step import View

BLOCK = (128, 256)  # queries and keys of a tile


@backends.register("tiled")
def tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    mask: Mask | None,
    extras: Extras = NONE,
    block: tuple[int, int] = BLOCK,
) -> Tensor:
    """Online softmax over tiles of `block` queries and keys. Computes in float32 at least, whatever the inputs' type."""
    learned = extras.learned if extras.bias is not None else ()
    check_learned(extras)
    tiles = Tiles(scale, causal, mask, extras.softcap, extras.bias, extras.places, block)
    return _Tiled.apply(tiles, q, k, v, extras.sinks, *learned)


def check_learned(extras: Extras) -> None:
    """A bias that has gradients must say whose: what computes it again would else lose them without a word."""
    if extras.bias is not None and not extras.learned and torch.is_grad_enabled():
        assert extras.places is not None
        queries, keys = extras.places
        assert not extras.bias(queries[:, :1], keys[:, :1]).requires_grad, "a bias with gradients lists its tensors in Extras.learned"


@dataclass(frozen=True, eq=False)
class Tiles:
    """How scores are made, tile by tile. `rows` and `cols` are ranges of queries and of keys."""

    scale: float
    causal: bool
    mask: Mask | None
    softcap: float | None
    bias: Bias | None
    places: tuple[Tensor, Tensor] | None
    block: tuple[int, int]

    def walk(self, count: int, axis: int) -> Iterator[slice]:
        size = self.block[axis]
        return (slice(start, min(start + size, count)) for start in range(0, count, size))

    def sees(self, rows: slice, cols: slice, device: torch.device) -> Tensor | bool:
        """Whether all keys of the tile are seen, or none; else which, [B|1, H|1, t|1, s]."""
        if self.causal:
            if cols.start >= rows.stop or cols.stop <= rows.start + 1:
                return cols.start < rows.stop
            queries, keys = (torch.arange(x.start, x.stop, device=device) for x in (rows, cols))
            return keys <= queries[:, None]
        if self.mask is None:
            return True
        if isinstance(self.mask, View):
            seen = self.mask.tile(rows, cols)
        else:
            seen = self.mask[..., rows if self.mask.shape[-2] > 1 else slice(None), cols if self.mask.shape[-1] > 1 else slice(None)]
        return True if seen.all() else seen if seen.any() else False

    def scores(self, q: Tensor, k: Tensor, rows: slice, cols: slice, *, seen: Tensor | bool) -> tuple[Tensor, Tensor | None]:
        """Scores [B, H, t, s] of q [B, H, t, D], already scaled, and k [B, K, s, D]; and what softcap's slope is there."""
        scores, slope = spread(q, k), None
        if self.softcap is not None:
            bent = torch.tanh(scores / self.softcap)
            scores, slope = self.softcap * bent, 1 - bent.square()
        if self.bias is not None:
            scores = scores + self.tile(rows, cols).to(scores.dtype)
        if isinstance(seen, Tensor):
            scores = scores.masked_fill(~seen, -torch.inf)
        return scores, slope

    def tile(self, rows: slice, cols: slice) -> Tensor:
        """The bias [B|1, H|1, t, s] there."""
        assert self.bias is not None and self.places is not None
        return self.bias(self.places[0][:, rows], self.places[1][:, cols])


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *learned: Tensor) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        batch, heads, count, _ = q.shape
        out, lse = q.new_empty(batch, heads, count, v.shape[-1], dtype=wide), q.new_empty(batch, heads, count, dtype=wide)
        for rows in tiles.walk(count, 0):
            part = _unseen(q[:, :, rows], v, sinks, wide)
            scaled = q[:, :, rows].to(wide) * tiles.scale
            for cols in tiles.walk(k.shape[2], 1):
                seen = tiles.sees(rows, cols, q.device)
                if seen is False:
                    continue
                scores, _ = tiles.scores(scaled, k[:, :, cols].to(wide), rows, cols, seen=seen)
                part = part.merge(_seen(scores, v[:, :, cols].to(wide)))
            out[:, :, rows], lse[:, :, rows] = part.finish(), part.running.lse
        ctx.save_for_backward(q, k, v, out, lse, sinks, *learned)
        ctx.tiles = tiles
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With weights P = exp(S - lse) and dP = dO V^T: dS = P * (dP - delta), where delta = sum(dO * O) is what all of a query's
        keys share (FlashAttention, section 3.1 and algorithm 4)."""
        q, k, v, out, lse, sinks, *learned = ctx.saved_tensors
        tiles, wide, kv_heads = ctx.tiles, lse.dtype, k.shape[1]
        delta = (grad.to(wide) * out).sum(-1)  # of the output as it was before rounding to 16 bits
        lse = torch.where(lse == -torch.inf, torch.inf, lse)  # a query that sees nothing has weights of zero
        dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
        wanted = [x for x, needed in zip(learned, ctx.needs_input_grad[5:], strict=True) if needed]
        dlearned = [torch.zeros_like(x, dtype=wide) for x in wanted]
        for cols in tiles.walk(k.shape[2], 1):
            key, value = k[:, :, cols].to(wide), v[:, :, cols].to(wide)
            for rows in tiles.walk(q.shape[2], 0):
                seen = tiles.sees(rows, cols, q.device)
                if seen is False:
                    continue
                scaled, given = q[:, :, rows].to(wide) * tiles.scale, grad[:, :, rows].to(wide)
                scores, slope = tiles.scores(scaled, key, rows, cols, seen=seen)
                weights = torch.exp(scores - lse[:, :, rows, None])
                dv[:, :, cols] += collected(weights, given, kv_heads)
                dscores = weights * (spread(given, value) - delta[:, :, rows, None])
                if wanted:
                    _add_grads(dlearned, tiles, wanted, dscores, rows, cols)
                if slope is not None:
                    dscores = dscores * slope
                dq[:, :, rows] += weighted(dscores, key) * tiles.scale
                dk[:, :, cols] += collected(dscores, scaled, kv_heads)
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[4]:
            dsinks = -(torch.exp(sinks.to(wide)[:, None] - lse) * delta).sum((0, 2)).to(sinks.dtype)
        given = iter(dlearned)
        rest = [next(given).to(x.dtype) if needed else None for x, needed in zip(learned, ctx.needs_input_grad[5:], strict=True)]
        return None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, *rest


def _unseen(q: Tensor, v: Tensor, sinks: Tensor | None, dtype: torch.dtype) -> Partial:
    """Where a block of queries starts: having seen nothing, or the sink, whose value is zero."""
    nothing = q.new_zeros(q.shape[:-1], dtype=dtype)
    mixed = q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=dtype)
    if sinks is None:
        return Partial(Running(nothing - torch.inf, nothing), mixed)
    return Partial(Running(nothing + sinks.to(dtype)[:, None], nothing + 1), mixed)


def _seen(scores: Tensor, v: Tensor) -> Partial:
    """Attention over a tile's keys, of scores [B, H, t, s] and v [B, K, s, E]."""
    top = scores.amax(-1)
    weights = torch.exp(scores - finite(top)[..., None])
    return Partial(Running(top, weights.sum(-1)), weighted(weights, v))


def _add_grads(sums: list[Tensor], tiles: Tiles, learned: list[Tensor], dscores: Tensor, rows: slice, cols: slice) -> None:
    """Add to `sums` what this tile's bias gives the tensors that it was computed from."""
    with torch.enable_grad():
        bias = tiles.tile(rows, cols)
    found = torch.autograd.grad(bias, learned, dscores.sum_to_size(bias.shape).to(bias.dtype), allow_unused=True)
    for total, one in zip(sums, found, strict=True):
        if one is not None:
            total += one


def spread(q: Tensor, k: Tensor) -> Tensor:
    """Products [B, H, T, S] of q [B, H, T, D] and k [B, K, S, D]."""
    batch, heads, count, dim = q.shape
    kv_heads, slots = k.shape[1], k.shape[2]
    return (q.reshape(batch, kv_heads, heads // kv_heads * count, dim) @ k.mT).view(batch, heads, count, slots)


def collected(weights: Tensor, x: Tensor, kv_heads: int) -> Tensor:
    """What keys are given, [B, K, S, E], by weights [B, H, T, S] and x [B, H, T, E]: summed over queries and each group's heads."""
    batch, _, _, slots = weights.shape
    return weights.view(batch, kv_heads, -1, slots).mT @ x.reshape(batch, kv_heads, -1, x.shape[-1])
