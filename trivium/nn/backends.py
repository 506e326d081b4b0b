"""Attention itself, softmax(q k^T * scale) v, behind one signature and several backends.

`eager` states it naively, and its weights can be asked for; `native` is eager with a native softmax; `sdpa` is torch's; further
ones stand in `backends_*.py`. All take grouped heads as they are. `why` says which of them `auto` takes, and for what reason.
`attend` is what attention layers call: it computes documents apart, gathered into groups of like length, and tells a
backend no more than it must know: nothing, the causal triangle, or the view, which gives the mask whole or by tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import ConfigError
from ..core.registry import Registry
from ..kernels import functions, native
from .blocked import Plan, in_blocks, in_later_blocks
from .step import Documents, View

Bias = Callable[[Tensor, Tensor], Tensor]  # positions of queries [B|1, T] and keys [B|1, S] -> [B|1, H|1, T, S]


@dataclass(frozen=True)
class Extras:
    """What changes scores beside their scale. `softcap`: c * tanh(score / c). `bias`: what is added to scores, a function
    of the positions `places` of queries [B|1, T] and keys [B|1, S], so that a backend that works in tiles asks for a tile;
    `learned`: the tensors that it reads and whose gradients are wanted, which a backend that computes it again must know.
    `sinks` [H]: the score of one more key that every query sees and that has no value (gpt-oss)."""

    softcap: float | None = None
    bias: Bias | None = None
    places: tuple[Tensor, Tensor] | None = None
    sinks: Tensor | None = None
    learned: tuple[Tensor, ...] = ()

    @property
    def none(self) -> bool:
        return self.softcap is None and self.bias is None and self.sinks is None


NONE = Extras()
WHOLE = 1 << 28  # numbers: a matrix of scores larger than this is not made by choice
Mask = Tensor | View  # whole, or a view that can be asked for the whole or for tiles


class Backend(Protocol):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Mask | None, extras: Extras = NONE) -> Tensor:
        """q [B, H, T, D], k [B, K, S, D] and v [B, K, S, E], H a multiple of K -> [B, H, T, E]. `causal`: T = S, later keys
        hidden. `mask` [B|1, H|1, T|1, S] bool, true where a key is seen, or a view. A query that sees nothing gives zeros.
        What a backend cannot do is a `ConfigError` whose field is "backend" and whose value is its name."""
        ...


backends: Registry[Backend] = Registry("attention backend", "trivium.nn")
skipping: set[str] = set()  # backends that leave out by themselves what a pattern hides: they are given whole rows


@dataclass(frozen=True, eq=False)
class Added:
    """A bias that is a tensor: an additive mask `table` [B|1, H|1, T, S], indexed by positions that all rows share."""

    table: Tensor

    def __call__(self, queries: Tensor, keys: Tensor) -> Tensor:
        assert len(queries) == len(keys) == 1
        return self.table[..., queries[0][:, None], keys[0][None]]


def dense(mask: Mask | None) -> Tensor | None:
    """The whole mask [B|1, H|1, T|1, S]."""
    return mask.mask() if isinstance(mask, View) else mask


def eager_weights(q: Tensor, k: Tensor, *, scale: float, causal: bool, mask: Mask | None, extras: Extras = NONE) -> Tensor:
    """Attention weights [B, H, T, S] in q's dtype; rows that see nothing are zero. torch's softmax sums in float32 at least."""
    mask = dense(mask)
    batch, heads, count, dim = q.shape
    kv_heads, slots = k.shape[1], k.shape[2]
    grouped = (q * scale).reshape(batch, kv_heads, heads // kv_heads * count, dim)
    scores = (grouped @ k.transpose(-1, -2)).view(batch, heads, count, slots)
    if extras.softcap is not None:
        scores = extras.softcap * torch.tanh(scores / extras.softcap)
    if extras.bias is not None:
        assert extras.places is not None
        scores = scores + extras.bias(*extras.places).to(scores.dtype)
    if causal:
        scores = scores + torch.full((count, slots), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
    elif mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if extras.sinks is not None:
        sinks = extras.sinks.to(scores.dtype)[None, :, None, None].expand(batch, -1, count, 1)
        return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
    weights = torch.softmax(scores, -1)
    return weights if mask is None or causal else weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)


@backends.register("eager")
def eager(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Mask | None, extras: Extras = NONE) -> Tensor:
    """The naive statement, products and softmax apart."""
    return weighted(eager_weights(q, k, scale=scale, causal=causal, mask=mask, extras=extras), v)


def dropping(dropout: float) -> Backend:
    """`eager` that drops each weight with this probability, by torch's global generator."""

    def run(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Mask | None, extras: Extras = NONE) -> Tensor:
        return weighted(F.dropout(eager_weights(q, k, scale=scale, causal=causal, mask=mask, extras=extras), dropout), v)

    return run


def weighted(weights: Tensor, v: Tensor) -> Tensor:
    """weights [B, H, T, S], v [B, K, S, E] -> [B, H, T, E]."""
    batch, heads, count, slots = weights.shape
    kv_heads = v.shape[1]
    return (weights.view(batch, kv_heads, -1, slots) @ v).view(batch, heads, count, -1)


@backends.register("native")
def products(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Mask | None, extras: Extras = NONE) -> Tensor:
    """As eager, the causal softmax in one native pass where the library takes these tensors."""
    if causal and extras.none and scale > 0 and q.numel() and q.shape[-1] == v.shape[-1] and native.takes(q, k, v):
        return functions.causal_attention(q, k, v, scale=scale)
    return eager(q, k, v, scale=scale, causal=causal, mask=mask, extras=extras)


@backends.register("sdpa")
def sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Mask | None, extras: Extras = NONE) -> Tensor:
    """torch's scaled_dot_product_attention. A bias becomes a T x S mask of numbers, sinks one more key; it has no softcap."""
    if extras.softcap is not None:
        raise ConfigError(
            "torch's scaled_dot_product_attention has no softcap; use another attention backend", field="backend", value="sdpa"
        )
    mask = dense(mask)
    grouped, added, width = q.shape[1] != k.shape[1], mask, v.shape[-1]
    if extras.bias is not None or extras.sinks is not None:
        causal, added, k, v = False, *_added(q, k, v, causal=causal, mask=mask, extras=extras)
    if q.device.type == "cpu" and q.shape[-1] > width:  # its fused kernel there wants one width; zeros cost less than every score in memory
        v = F.pad(v, (0, q.shape[-1] - width))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, is_causal=causal, scale=scale, enable_gqa=grouped)[..., :width]
    if mask is not None and extras.sinks is None:
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return out


def _added(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, extras: Extras) -> tuple[Tensor, Tensor, Tensor]:
    """What is added to scores, [B|1, H|1, T, S], and keys and values with the sink's, which are zero."""
    count, slots = q.shape[2], k.shape[2]
    added = torch.zeros(1, 1, count, slots, dtype=q.dtype, device=q.device)
    if extras.bias is not None:
        assert extras.places is not None
        added = extras.bias(*extras.places).to(q.dtype)
    if causal:
        mask = torch.ones(count, slots, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        added = torch.where(mask, added, float("-inf"))
    if extras.sinks is not None:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        sinks = extras.sinks.to(q.dtype)[None, :, None, None].expand(len(added), -1, count, 1)
        added = torch.cat([added.expand(-1, len(extras.sinks), -1, -1), sinks], -1)
    return added, k, v


class Choice(NamedTuple):
    """A backend, and why it."""

    name: str
    reason: str


def why(q: Tensor, k: Tensor, *, mask: Mask | None = None, extras: Extras = NONE) -> Choice:
    """What `auto` takes for queries [B, H, T, D] and keys [B, K, S, D]. Nothing but shapes, device and what is asked is looked
    at. (Times: benchmarks/NOTES.md.)"""
    batch, heads, count, _ = q.shape
    pairs = count * k.shape[2]
    trained = q.requires_grad or k.requires_grad
    if q.device.type == "cpu":
        if count <= 16:
            return Choice("native", "few queries: plain products on a CPU")
        if mask is None and pairs <= (512 * 512 if trained else 256 * 256):
            return Choice("native", "short: on a CPU, SDPA's backward costs several times its forward")
    if extras.softcap is not None:
        if pairs < 1024 * 1024 and batch * heads * pairs <= WHOLE:
            return Choice("native", "SDPA has no softcap")
        return Choice("tiled", "SDPA has no softcap, and plain products would hold every score")
    if extras.bias is not None and heads * pairs > WHOLE:
        return Choice("tiled", "SDPA would hold every score's bias")
    if isinstance(mask, View) and mask.bounded is not None and pairs > WHOLE:
        return Choice("tiled", "SDPA would hold the whole mask, of which a pattern leaves little")
    return Choice("sdpa", "the fastest kernel that torch has for this device")


@backends.register("auto")
def auto(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Mask | None, extras: Extras = NONE) -> Tensor:
    """Whatever `why` says: plain products for few queries and short documents on a CPU, SDPA where it can do what is asked, tiles
    where anything else would hold a large matrix of scores."""
    return backends.get(why(q, k, mask=mask, extras=extras).name)(q, k, v, scale=scale, causal=causal, mask=mask, extras=extras)


def attend(
    q: Tensor, k: Tensor, v: Tensor, view: View, *, scale: float, backend: str | Backend, extras: Extras = NONE, dropout: float = 0.0
) -> Tensor:
    """q [B, H, T, D], k [B, K, S, D] and v [B, K, S, E] -> [B, H, T, E], each query over what `view` lets it see.

    Only `eager` holds the weights that `dropout` drops: `auto` then means `eager`, any other backend is a `ConfigError`.
    """
    run: Backend = backends.get(backend) if isinstance(backend, str) else backend
    if dropout:
        if backend not in ("auto", "eager"):
            raise ConfigError(
                f"the attention backend {backend!r} cannot drop weights; use 'eager' or 'auto', or set the attention's dropout to 0",
                field="dropout",
                value=dropout,
            )
        run = dropping(dropout)
    documents = view.documents
    if documents is not None and (extras.bias is None or view.step.inputs.positions is None):
        return _attend_documents(q, k, v, documents, run, scale=scale, view=view, extras=extras)
    if backend not in skipping and (plan := view.row_plan) is not None and not isinstance(extras.bias, Added):
        return _attend_blocks(q, k, v, plan, run, scale=scale, view=view, extras=extras)
    if extras.bias is not None:
        extras = replace(extras, places=(view.step.positions, view.key_positions))
    plain = view.plain
    causal = not plain and view.triangle
    return run(q, k, v, scale=scale, causal=causal, mask=None if plain or causal else view, extras=extras)


def weights_of(q: Tensor, k: Tensor, view: View, *, scale: float, extras: Extras = NONE) -> Tensor:
    """The attention weights [B, H, T, S] that `attend` gives values by, computed naively."""
    if extras.bias is not None:
        extras = replace(extras, places=(view.step.positions, view.key_positions))
    return eager_weights(q, k, scale=scale, causal=False, mask=view.mask(), extras=extras)


def _attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, run: Backend, *, scale: float, view: View, extras: Extras, lengths: Tensor | None = None
) -> Tensor:
    """`attend` for rows [B, H, L, D] of one document each, in the blocks of `plan`. `lengths` [B]: keys from there on are none."""

    def block(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        placed = extras if extras.bias is None else replace(extras, places=places)
        return run(q, k, v, scale=scale, causal=False, mask=mask, extras=placed)

    if plan.start:
        return in_later_blocks(block, q, k, v, view.later_blocks(plan))
    return in_blocks(block, q, k, v, view.blocks(plan), lengths=lengths)


def _attend_documents(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, run: Backend, *, scale: float, view: View, extras: Extras
) -> Tensor:
    batch, heads, count, _ = q.shape
    q, k, v = (x.transpose(1, 2).reshape(batch * count, -1, x.shape[-1]) for x in (q, k, v))
    gathered = [gather_documents(x, documents) for x in (q, k, v)]
    outs, base = [], 0
    for group in documents.groups:
        rows, length = group.slots.shape
        mine = (x[base : base + rows * length].view(rows, length, -1, x.shape[-1]).transpose(1, 2) for x in gathered)
        part: tuple[Tensor, Tensor, Tensor] = tuple(mine)  # type: ignore[assignment]
        lengths = group.lengths if group.ragged and not view.causal else None
        if (plan := view.plan(length)) is not None and not isinstance(extras.bias, Added):
            out = _attend_blocks(*part, plan, run, scale=scale, view=view, extras=extras, lengths=lengths)
        else:
            out = _attend_rows(*part, run, scale=scale, view=view, extras=extras, lengths=lengths)
        outs.append(out.transpose(1, 2).reshape(rows * length, heads, -1))
        base += rows * length
    joined = outs[0] if len(outs) == 1 else torch.cat(outs)
    return scatter_documents(joined, documents).view(batch, count, heads, -1).transpose(1, 2)


def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, run: Backend, *, scale: float, view: View, extras: Extras, lengths: Tensor | None
) -> Tensor:
    """`attend` for rows [B, H, L, D] of one document each, all of it."""
    places = torch.arange(q.shape[2], device=q.device)
    if extras.bias is not None:
        extras = replace(extras, places=(places[None], places[None]))
    mask = None if lengths is None else (places < lengths[:, None])[:, None, None]
    causal = view.causal
    if (reach := view.hides(q.shape[2])) is not None:
        seen = reach.sees(places[:, None], places) & (places <= places[:, None]) if causal else reach.sees(places[:, None], places)
        mask, causal = seen[None, None] if mask is None else mask & seen, False
    return run(q, k, v, scale=scale, causal=causal, mask=mask, extras=extras)


def gather_documents(x: Tensor, documents: Documents) -> Tensor:
    """[B*T, ...] -> [sum n*L, ...]: the tokens in the order of the documents' groups."""
    return _Regroup.apply(x, documents.slots, documents.places, documents.padding, documents.again)


def scatter_documents(x: Tensor, documents: Documents) -> Tensor:
    """What `gather_documents` did, undone; padding gets what stands first."""
    return _Regroup.apply(x, documents.places, documents.slots, documents.spare, None)


class _Regroup(torch.autograd.Function):
    """`x[there]`, where `back` undoes it: each row of `x` that counts stands in one place that counts, so the gradient
    is a gather too. `back_void` lists the rows of `x` that stand for nothing; their gradients are zero. `again`: places where a
    row of `x` stands once more, whose gradients are added."""

    @staticmethod
    def forward(ctx, x: Tensor, there: Tensor, back: Tensor, back_void: Tensor | None, again: Tensor | None) -> Tensor:
        ctx.there, ctx.back, ctx.back_void, ctx.again = there, back, back_void, again
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        out = grad.index_select(0, ctx.back)
        if ctx.back_void is not None:
            out.index_fill_(0, ctx.back_void, 0.0)
        if ctx.again is not None:
            out.index_add_(0, ctx.there[ctx.again], grad[ctx.again])
        return out, None, None, None, None
