"""The gated attention unit and FLASH (arXiv:2202.10447): one head whose weights are squared ReLUs, inside a gate.

`quadratic` attends to everything. `mixed` attends within chunks of `span` tokens and adds, for all chunks before, linear
attention with queries and keys of its own, so that its cost grows with the length alone. Positions turn queries and keys;
the paper's additive position bias is left out. The unit takes the place of mixer and feed-forward part both.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .attention import Mixer, MixerModule
from .keepers import Fixed, PerToken, State
from .linear import Linear, Projections
from .linear_attention import each_document, extents, refuse_cache, wide
from .positions import Rope
from .products import Product
from .recurrent import States, recur
from .step import Step
from .store import Handle


class GatedUnit(Mixer):
    """out(u * A v), u and v maps of the input; A = relu(q . k / span)^2, q and k scaled and shifted copies of one narrow map."""

    kind: Literal["gated_unit"] = "gated_unit"
    inner: int = Field(gt=0, description="width of the gate and of the values; the paper has twice the model's")
    key_dim: int = Field(gt=0, description="width of queries and keys; the paper has 128")
    form: Literal["mixed", "quadratic"] = Field("mixed", description="linear beyond a chunk, or quadratic throughout")
    span: int = Field(256, gt=0, description="tokens of a chunk; what products are divided by, so the length of a quadratic form")
    position: Rope | None = Field(Rope(), description="how queries and keys turn")

    @classmethod
    def tiny(cls) -> GatedUnit:
        return cls(inner=20, key_dim=8, span=4, position=Rope(base=50.0))

    def build(self, dim: int) -> MixerModule:
        return (MixedUnit if self.form == "mixed" else QuadraticUnit)(self, dim)


class Unit(MixerModule):
    """What both forms share. `copies`: queries and keys in all."""

    copies = 2

    def __init__(self, spec: GatedUnit, dim: int):
        super().__init__()
        self.spec = spec
        self.inp = Projections(u=Linear(dim, spec.inner), v=Linear(dim, spec.inner), z=Linear(dim, spec.key_dim))
        self.copy = Copies(self.copies, spec.key_dim)
        self.out = Linear(spec.inner, dim)

    def forward(self, x: Tensor, step: Step, handle: Handle) -> Tensor:
        u, v, z = (F.silu(y) for y in self.inp(x, step))
        copies = self.copy(z)  # [B, n, T, D]
        if self.spec.position is not None:
            copies = self.spec.position.turn(copies, step)
        return self.out(u * self.attend(copies.unbind(1), v, step, handle).to(u.dtype), step)

    def attend(self, copies: tuple[Tensor, ...], v: Tensor, step: Step, handle: Handle) -> Tensor:
        """A v [B, T, E], from queries and keys [B, T, D] and v [B, T, E]."""
        raise AssertionError

    def flowing(self, flows: Mapping[str, bool]) -> tuple[bool, bool]:
        """Whether queries and keys, and values, have gradients."""
        return flows["z"] or self.copy.weight.requires_grad, flows["v"]


class Copies(nn.Module):
    """Several copies of one map's output, each channel of each with a scale and a shift of its own."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))
        self.bias = nn.Parameter(torch.empty(count, width))

    def forward(self, z: Tensor) -> Tensor:
        """[B, T, D] -> [B, n, T, D]."""
        return z[:, None] * self.weight[:, None] + self.bias[:, None]


class QuadraticUnit(Unit):
    def state(self) -> State:
        return {"k": PerToken((self.spec.key_dim,)), "v": PerToken((self.spec.inner,))}

    def products(self, step: Step, flows: Mapping[str, bool]) -> list[Product]:
        (keys, values), pairs = self.flowing(flows), step.view().pairs
        return [Product(2 * pairs * self.spec.key_dim, keys, keys), Product(2 * pairs * self.spec.inner, keys, values)]

    def attend(self, copies: tuple[Tensor, ...], v: Tensor, step: Step, handle: Handle) -> Tensor:
        q, k = copies
        k, v = handle.extend(k=k, v=v)
        view = step.view()
        if view.documents is not None:
            return each_document(partial(_whole, span=self.spec.span, causal=view.causal), (q, k, v), step)
        mask = view.mask()
        weights = squared_relu(q, k, self.spec.span)
        return (weights if mask is None else weights.masked_fill(~mask[:, 0], 0.0)) @ v


def squared_relu(q: Tensor, k: Tensor, span: int) -> Tensor:
    """[..., T, D], [..., S, D] -> [..., T, S]."""
    return F.relu(q @ k.transpose(-1, -2) / span).square()


def _whole(inputs: tuple[Tensor, ...], real: Tensor | None, *, span: int, causal: bool) -> Tensor:
    q, k, v = inputs
    if causal:  # what stands for no token comes last
        return squared_relu(q, k, span).tril() @ v
    return squared_relu(q, k if real is None else k * real[..., None], span) @ v  # a key of zeros has no weight


class MixedUnit(Unit):
    """State for decoding: the linear part's sum over the chunks before, that over this chunk so far, and this chunk's keys
    and values, `held` of them."""

    copies = 4

    def state(self) -> State:
        spec = self.spec
        sums = Fixed((spec.key_dim, spec.inner), torch.float32)
        chunk = {"keys": Fixed((spec.span, spec.key_dim)), "values": Fixed((spec.span, spec.inner))}
        return {"before": sums, "within": sums, **chunk, "held": Fixed((), torch.float32)}

    def products(self, step: Step, flows: Mapping[str, bool]) -> list[Product]:
        spec, (keys, values), made, held = self.spec, self.flowing(flows), [], step.slots.start > 0

        def near(pairs: int) -> list[Product]:
            return [Product(2 * pairs * spec.key_dim, keys, keys), Product(2 * pairs * spec.inner, keys, values)]

        for rows, length in extents(step):
            if held and length == 1:
                made += [*near(rows * spec.span), Product(2 * rows * spec.key_dim * spec.inner, keys, keys or values)]
                continue
            size = min(spec.span, length)
            chunks = -(-length // size)
            made += near(rows * chunks * size * size)
            sums = 2 * rows * spec.key_dim * spec.inner * (chunks * size if step.causal else length)
            followed = chunks > 1 or not step.causal
            made.append(Product(sums, keys and followed, values and followed))
            if followed or held:
                made.append(Product(sums, keys, keys or values))
        return made

    def attend(self, copies: tuple[Tensor, ...], v: Tensor, step: Step, handle: Handle) -> Tensor:
        spec, inputs = self.spec, tuple(wide(y) for y in (*copies, v))
        if step.causal:
            return recur(partial(_scan, span=spec.span), inputs, tuple(self.state()), step, handle, mixer=spec.kind)
        refuse_cache(step, spec.kind)
        return each_document(partial(_both_ways, span=spec.span), inputs, step)


def _both_ways(inputs: tuple[Tensor, ...], real: Tensor | None, *, span: int) -> Tensor:
    """Not causal: chunks see all of themselves, and the linear part is the mean over all tokens."""
    q, k, linear_q, linear_k, v = inputs
    count: Tensor | int = v.shape[1]
    if real is not None:
        k, linear_k, count = k * real[..., None], linear_k * real[..., None], real.sum(1)[:, None, None]
    size = min(span, v.shape[1])
    near = squared_relu(_chunks(q, size), _chunks(k, size), span) @ _chunks(v, size)
    far = linear_q @ (linear_k.transpose(-1, -2) @ v / count)
    return near.flatten(1, 2)[:, : v.shape[1]] + far


def _chunks(x: Tensor, size: int) -> Tensor:
    """[N, T, D] -> [N, M, size, D]; what the last chunk lacks is zero."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))


def naive(q: Tensor, k: Tensor, linear_q: Tensor, linear_k: Tensor, v: Tensor, *, span: int) -> Tensor:
    """The mixed form's naive statement, causal: all T x T pairs, [N, T, D] and v [N, T, E] -> [N, T, E]."""
    chunk = torch.arange(v.shape[1], device=v.device) // span
    near = squared_relu(q, k, span).tril() * (chunk[:, None] == chunk)
    far = linear_q @ linear_k.transpose(-1, -2) / span * (chunk[:, None] > chunk)
    return (near + far) @ v


def _scan(inputs: tuple[Tensor, ...], states: States | None, *, span: int) -> tuple[Tensor, States]:
    """The same in chunks. inputs: as `naive`; states: `before`, `within`, `keys`, `values`, `held` (see `MixedUnit`)."""
    dtype, device = inputs[-1].dtype, inputs[-1].device
    rows, count = inputs[-1].shape[:2]
    held, size, before, within = torch.zeros(rows, dtype=torch.int64, device=device), min(span, count), None, None
    if states is not None:
        before, within, keys, values = (state.to(dtype) for state in states[:4])
        held, size = states[4].long(), span
        if count == 1:
            return _next(inputs, before, within, keys, values, held)
        inputs = tuple(_align(x, old, held, span) for x, old in zip(inputs, (None, keys, None, None, values), strict=True))
    q, k, linear_q, linear_k, v = (_chunks(x, size) for x in inputs)  # [N, M, L, *]
    y = squared_relu(q, k, span).tril() @ v
    sums = linear_k.transpose(-1, -2) @ v / span  # [N, M, D, E]
    if within is not None:
        sums = torch.cat([sums[:, :1] + within[:, None], sums[:, 1:]], 1)
    so_far = F.pad(sums, (0, 0, 0, 0, 1, 0)).cumsum(1)
    if before is not None:
        so_far = so_far + before[:, None]
    if before is not None or y.shape[1] > 1:
        y = y + linear_q @ so_far[:, :-1]
    asked = held[:, None] + torch.arange(count, device=device)
    y = y.flatten(1, 2)[:, :count] if before is None else _rows(y.flatten(1, 2), asked)
    done, left, here = (held + count) // span, (held + count) % span, torch.arange(rows, device=device)
    chunk = done[:, None] * span + torch.arange(span, device=device)
    kept = [_rows(F.pad(x.flatten(1, 2), (0, 0, 0, span)), chunk) for x in (k, v)]
    return y, (so_far[here, done], F.pad(sums, (0, 0, 0, 0, 0, 1))[here, done], *kept, left.to(torch.float32))


def _next(inputs: tuple[Tensor, ...], before: Tensor, within: Tensor, keys: Tensor, values: Tensor, held: Tensor) -> tuple[Tensor, States]:
    """One token more in every row: what decoding computes."""
    q, k, linear_q, linear_k, v = inputs
    here, span = torch.arange(len(held), device=held.device), keys.shape[1]
    keys = keys.index_put((here, held), k[:, 0])
    values = values.index_put((here, held), v[:, 0])
    y = squared_relu(q, keys, span) @ values + linear_q @ before  # places that no token has are zero, and so are their weights
    within = within + linear_k[:, 0, :, None] * v[:, 0, None, :] / span
    ends = (held + 1 == span)[:, None, None]
    keys, values = (torch.where(ends, 0.0, x) for x in (keys, values))
    states = (torch.where(ends, before + within, before), torch.where(ends, 0.0, within), keys, values)
    return y, (*states, ((held + 1) % span).to(torch.float32))


def _align(x: Tensor, old: Tensor | None, held: Tensor, span: int) -> Tensor:
    """[N, T, D] behind the first `held` [N] of `old` [N, span, D] (None: zeros), so that every row starts with a chunk; zeros to the
    end of what the row with most held needs."""
    rows, count, width = x.shape
    old = x.new_zeros(rows, span, width) if old is None else old
    place = torch.arange(-(-(span - 1 + count) // span) * span, device=x.device)[None]
    start = held[:, None]
    new = torch.where(place < start + count, span + place - start, span + count)
    return _rows(torch.cat([old, x, x.new_zeros(rows, 1, width)], 1), torch.where(place < start, place, new))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [N, T, D] at index [N, n] -> [N, n, D]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
