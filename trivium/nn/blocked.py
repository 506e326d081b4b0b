"""Attention in blocks: where a pattern needs few blocks of keys for a block of queries, only those are gathered and computed.

A `Plan` says which; it is made for a length and knows nothing of tensors. `Blocks` are the plan's indices and masks on a
device, built once per forward. Any backend computes the gathered blocks, so softcaps, sinks and biases work as ever;
gradients are autograd's. Work and memory grow with the number of blocks that are needed: BigBird, arXiv:2007.14062.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Sees(Protocol):
    """The naive statement that a plan must cover (see `patterns`)."""

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor: ...


class Run(Protocol):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        """q [N, H, b, D], k [N, K, m, D] and v [N, K, m, E], mask [N, 1, b, m], positions [N, b] and [N, m] -> [N, H, b, E]."""
        ...


@dataclass(frozen=True)
class Plan:
    """Which blocks of keys each block of queries needs, over `length` tokens in blocks of `size`. With a `stride` of d, tokens
    are taken d apart: all those of remainder 0 first, in blocks of their own, then those of remainder 1, and so on. Queries
    are the tokens from `start` on. `groups`: blocks of queries that need equally many blocks of keys (-1: none), as (queries, keys of each)."""

    length: int
    size: int
    stride: int
    start: int
    groups: tuple[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]], ...]

    @property
    def pairs(self) -> int:
        """Query-key products of one head, those that are masked included."""
        return sum(len(queries) * len(keys[0]) for queries, keys in self.groups) * self.size**2

    def tokens(self) -> Tensor:
        """[N, size]: the token at each place; `length` and more: none."""
        run = -(-self.length // self.stride)
        blocks = -(-run // self.size)
        places = torch.arange(blocks * self.size)
        tokens = torch.arange(self.stride)[:, None] + self.stride * places
        return torch.where(tokens < self.length, tokens, self.length).view(-1, self.size)


def plan(
    length: int,
    size: int,
    needs: Callable[[int], Collection[int]],
    *,
    causal: bool,
    stride: int = 1,
    start: int = 0,
    keys: int | None = None,
) -> Plan | None:
    """The plan in which the block of queries `i` needs the blocks of keys `needs(i)`; None where it would not halve the work,
    which is that of `keys` for each query (by default `length`). Blocks are numbered in the plan's order; those that are not
    there, or hold later tokens alone, may be named. Later queries alone (`start`) are planned for tokens in order."""
    per_run = -(-length // (stride * size))  # blocks of one remainder
    total = stride * per_run
    if total - start // size < (2 if start else 4) or (start and stride > 1):
        return None
    by_count: dict[int, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
    for query in range(start // size, total):
        last = (query % per_run + 1) * size * stride if causal else length  # no later key is seen
        found = sorted(key for key in set(needs(query)) if 0 <= key < total and (key % per_run) * size * stride < last)
        by_count[_rounded(len(found))].append((query, tuple(found)))
    groups = []
    for members in by_count.values():
        widest = max(len(keys) for _, keys in members)
        groups.append((tuple(query for query, _ in members), tuple(keys + (-1,) * (widest - len(keys)) for _, keys in members)))
    made = Plan(length, size, stride, start, tuple(groups))
    return made if made.pairs * 2 <= (length - start) * (keys or length) else None


def _rounded(count: int) -> int:
    """Counts with the same result share a group: those within 2, or within about a quarter, so that little is computed for nothing."""
    step = max(2, 1 << max(count.bit_length() - 3, 0))
    return -(-max(count, 1) // step) * step


@dataclass(frozen=True)
class Part:
    """Blocks of queries [n] and the blocks of keys [n, m] that each needs; positions [n, b] and [n, m * b]; mask [n, 1, b, m * b]."""

    queries: Tensor
    keys: Tensor
    query_positions: Tensor
    key_positions: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Blocks:
    """A plan on a device. `order` [N * b]: the token at each place, None where places are in order; `back` [N]: where each block
    stands in the parts' concatenated queries; `places` [length]: where each token stands."""

    length: int
    size: int
    order: Tensor | None
    places: Tensor | None
    back: Tensor
    parts: tuple[Part, ...]

    def cut(self, x: Tensor) -> Tensor:
        """[B, H, length, D] -> [B, H, N, b, D]."""
        if self.order is not None:
            x = x.index_select(2, self.order)
        else:
            x = F.pad(x, (0, 0, 0, len(self.back) * self.size - self.length))
        return x.unflatten(2, (-1, self.size))

    def join(self, x: Tensor) -> Tensor:
        """What `cut` did, undone: [B, H, N, b, E] -> [B, H, length, E]."""
        x = x.flatten(2, 3)
        return x[:, :, : self.length] if self.places is None else x.index_select(2, self.places)


def blocks(made: Plan, pattern: Sees, *, causal: bool, device: torch.device) -> Blocks:
    """The plan's indices and masks."""
    tokens = made.tokens().to(device)
    parts = []
    for queries, keys in made.groups:
        rows, needed = torch.tensor(queries, device=device), torch.tensor(keys, device=device)
        at = tokens[rows]
        reached = torch.where((needed >= 0)[..., None], tokens[needed.clamp_min(0)], made.length).flatten(1)
        mask = pattern.sees(at[:, :, None], reached[:, None, :]) & (reached < made.length)[:, None, :]
        if causal:
            mask = mask & (reached[:, None, :] <= at[:, :, None])
        parts.append(Part(rows, needed.clamp_min(0), at, reached, mask[:, None]))
    back = torch.argsort(torch.cat([part.queries for part in parts]))
    if made.stride == 1:
        return Blocks(made.length, made.size, None, None, back, tuple(parts))
    flat = tokens.flatten()
    places = torch.argsort(flat, stable=True)[: made.length]
    return Blocks(made.length, made.size, flat.clamp_max(made.length - 1), places, back, tuple(parts))


def in_blocks(run: Run, q: Tensor, k: Tensor, v: Tensor, cut: Blocks, *, lengths: Tensor | None = None) -> Tensor:
    """q [B, H, L, D], k [B, K, L, D] and v [B, K, L, E] -> [B, H, L, E]. `lengths` [B]: keys from there on are hidden."""
    q, k, v = (cut.cut(x) for x in (q, k, v))
    outs = []
    for part in cut.parts:
        count, width = part.keys.shape
        queries = q.index_select(2, part.queries)  # [B, H, n, b, D]
        keys, values = (x.index_select(2, part.keys.flatten()).unflatten(2, (count, width)).flatten(3, 4) for x in (k, v))
        outs.append(_run_part(run, queries, keys, values, part, lengths=lengths))
    joined = torch.cat(outs, 1).index_select(1, cut.back)
    return cut.join(joined.transpose(1, 2))


def _run_part(run: Run, q: Tensor, k: Tensor, v: Tensor, part: Part, *, lengths: Tensor | None = None) -> Tensor:
    """Gathered blocks, q [B, H, n, b, D], k [B, K, n, m, D] and v [B, K, n, m, E] -> [B, n, H, b, E]."""
    batch = len(q)
    mask = part.mask.expand(batch, -1, -1, -1, -1)
    if lengths is not None:
        mask = mask & (part.key_positions < lengths[:, None, None])[:, :, None, None, :]
    places = tuple(x.expand(batch, -1, -1).flatten(0, 1) for x in (part.query_positions, part.key_positions))
    folded = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out = run(*folded, mask=mask.flatten(0, 1), places=(places[0], places[1]))
    return out.unflatten(0, (batch, -1))


@dataclass(frozen=True)
class Later:
    """A plan for queries that come after some of their keys, on a device. Here parts' `queries` [n, b] and `keys` [n, m * b] are
    places among what is given. `places` [T]: where each query stands in the parts' concatenated ones."""

    parts: tuple[Part, ...]
    places: Tensor


def later(made: Plan, pattern: Sees, *, causal: bool, keys: Tensor) -> Later:
    """`keys` [S]: the position of each key that is given, in any order."""
    count, tokens = made.length - made.start, made.tokens().to(keys.device)
    order = torch.argsort(keys)
    known = keys[order]
    parts = []
    for queries, needed in made.groups:
        blocks = torch.tensor(needed, device=keys.device)
        at = tokens[torch.tensor(queries, device=keys.device)]
        reached = torch.where((blocks >= 0)[..., None], tokens[blocks.clamp_min(0)], made.length).flatten(1)
        found = torch.searchsorted(known, reached).clamp_max(len(known) - 1)
        mask = pattern.sees(at[:, :, None], reached[:, None, :]) & (known[found] == reached)[:, None, :]
        if causal:
            mask = mask & (reached[:, None, :] <= at[:, :, None])
        parts.append(Part((at - made.start).clamp(0, count - 1), order[found], at, reached, mask[:, None]))
    first = made.start // made.size
    back = torch.argsort(torch.tensor([query for queries, _ in made.groups for query in queries], device=keys.device))
    token = torch.arange(made.start, made.length, device=keys.device)
    return Later(tuple(parts), back[token // made.size - first] * made.size + token % made.size)


def in_later_blocks(run: Run, q: Tensor, k: Tensor, v: Tensor, cut: Later) -> Tensor:
    """q [B, H, T, D], k [B, K, S, D] and v [B, K, S, E] -> [B, H, T, E]."""
    outs = []
    for part in cut.parts:
        queries = q.index_select(2, part.queries.flatten()).unflatten(2, part.queries.shape)
        keys, values = (x.index_select(2, part.keys.flatten()).unflatten(2, part.keys.shape) for x in (k, v))
        outs.append(_run_part(run, queries, keys, values, part))
    return torch.cat(outs, 1).transpose(1, 2).flatten(2, 3).index_select(2, cut.places)
