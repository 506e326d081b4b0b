"""Virtual tokens: what an adapter puts before each document, as rows that stand for embeddings (prompt tuning, arXiv:2104.08691)
or as keys and values of every layer (prefix tuning, arXiv:2101.00190; P-tuning v2, arXiv:2110.07602).

They are inserted before the step exists, so that documents, padding, positions, patterns, backends and caches treat them as
tokens like all others, and taken out before the head. A cache holds them from its first forward on. Keys and values of a
prefix take the place of what the layers compute there, after positions, as PEFT's do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from .adapted import Adapted, Place, Update
from .inputs import Inputs, Prefix
from .inserted import Inserted
from .linear import Linear


class Soft(Update):
    """`length` virtual tokens. `table` [length, width] holds them, or what `through`, a small network, makes them of."""

    def __init__(self, length: int, width: int, *, through: nn.Module | None, like: Tensor):
        super().__init__()
        self.table = nn.Parameter(like.new_empty(length, width))
        self.through = through

    @property
    def length(self) -> int:
        return len(self.table)

    def values(self) -> Tensor:
        """What stands for the tokens, [length, W]."""
        return self.table if self.through is None else self.through(self.table)

    def embeds(self, dim: int) -> Tensor:
        """What the model embeds them as, [length, C]."""
        raise AssertionError

    def keys(self) -> Tensor | None:
        """Keys and values of every layer, [length, layers, 2, K, D]; None: the layers compute them."""
        return None

    @torch.no_grad()
    def reset(self, generator: torch.Generator, host: Adapted, model: nn.Module) -> None:
        """Normal, with deviation 0.02; the network's matrices uniform as torch draws a linear map's, its biases zero."""
        self.table.copy_(torch.randn(self.table.shape, generator=generator) * 0.02)
        for parameter in () if self.through is None else self.through.parameters():
            drawn = torch.zeros(parameter.shape)
            if parameter.dim() == 2:
                drawn = (torch.rand(parameter.shape, generator=generator) * 2 - 1) / parameter.shape[1] ** 0.5
            parameter.copy_(drawn)


class SoftPrompt(Soft):
    """Virtual tokens that are embeddings. They start as the rows of `ids`, again and again, or of ids drawn at random."""

    def __init__(self, length: int, dim: int, *, ids: tuple[int, ...], through: nn.Module | None, like: Tensor):
        super().__init__(length, dim, through=through, like=like)
        self.ids = ids

    def embeds(self, dim: int) -> Tensor:
        return self.values()

    @torch.no_grad()
    def reset(self, generator: torch.Generator, host: Adapted, model: nn.Module) -> None:
        super().reset(generator, host, model)
        weight = model.get_parameter("embed.weight")
        ids = torch.tensor(self.ids).repeat(self.length)[: self.length]
        if not self.ids:
            ids = torch.randint(0, len(weight), (self.length,), generator=generator)
        self.table.copy_(weight[ids.to(weight.device)])


class SoftPrefix(Soft):
    """Virtual tokens that are keys and values of every layer."""

    def __init__(self, length: int, *, layers: int, heads: int, head_dim: int, width: int, through: nn.Module | None, like: Tensor):
        super().__init__(length, width, through=through, like=like)
        self.shape = (layers, 2, heads, head_dim)

    def embeds(self, dim: int) -> Tensor:
        return self.table.new_zeros(self.length, dim)

    def keys(self) -> Tensor:
        return self.values().unflatten(-1, self.shape)


class Through(nn.Module):
    """A network of linear maps with an activation between each two, for what no step runs through."""

    def __init__(self, *widths: int, activation: Callable[[Tensor], Tensor], like: Tensor):
        super().__init__()
        self.activation = activation
        maps = [Linear(a, b, bias=True) for a, b in pairwise(widths)]
        self.maps = nn.ModuleList(maps).to(device=like.device, dtype=like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        for number, linear in enumerate(self.maps):
            x = torch.nn.functional.linear(self.activation(x) if number else x, linear.weight, linear.bias)  # type: ignore[arg-type]
        return x


class VirtualTokens(Place):
    """The place of virtual tokens: before all layers."""

    @property
    def softs(self) -> dict[str, Soft]:
        return {name: update for name, update in self.adapters.items() if isinstance(update, Soft)}

    @property
    def longest(self) -> int:
        return max(soft.length for soft in self.softs.values())

    def insert(self, inputs: Inputs, rows_of: Callable[[Tensor], Tensor]) -> Inserted | None:
        """`inputs` with virtual tokens before each document; None where a cache holds them already. `rows_of` embeds tokens."""
        if inputs.images is not None:
            raise ConfigError("virtual tokens stand before tokens alone: leave out Inputs(images=...)", field="images")
        if inputs.cache is not None and inputs.cache.used:
            return None
        x = rows_of(inputs.tokens) if inputs.tokens is not None else inputs.embeds
        assert x is not None
        lengths, first = self._by_row(inputs)
        spread = _spread(inputs, lengths)
        count = lengths[spread.rows]
        document = torch.arange(len(count), device=x.device).repeat_interleave(count)
        number = torch.arange(len(document), device=x.device) - (count.cumsum(0) - count)[document]
        rows, places = spread.rows[document], (spread.starts - count)[document] + number
        which = first[rows] + number
        table = torch.cat([soft.embeds(x.shape[-1]) for soft in self.softs.values()]).to(x.dtype)
        changes: dict[str, Any] = {"tokens": None, "embeds": spread(x).index_put((rows, places), table[which])}
        if spread.segments is not None:
            names = spread.segments[spread.rows, spread.starts]
            changes["segments"] = spread.segments.index_put((rows, places), names[document])
        if inputs.positions is not None:
            changes["positions"] = spread(inputs.positions + lengths[:, None]).index_put((rows, places), number)
        if inputs.types is not None:
            changes["types"] = spread(inputs.types)
        if isinstance(inputs.mask, Prefix):
            changes["mask"] = Prefix(inputs.mask.lengths + lengths)
        at, keys = self._keys(rows, places, which)
        return Inserted(inputs, replace(inputs, **changes), spread.places, at, keys)

    def widened(self, segments: Tensor) -> Tensor:
        """The segments [B, T'] of a batch with these [B, T], on the CPU, once virtual tokens are in: for counting."""
        inputs = Inputs(torch.zeros_like(segments), segments=segments)
        lengths = torch.full((len(segments),), self.longest)
        spread = _spread(inputs, lengths)
        wide = spread.segments
        assert wide is not None
        for row, start in zip(spread.rows.tolist(), spread.starts.tolist(), strict=True):
            wide[row, start - self.longest : start] = wide[row, start]
        return wide

    def _by_row(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """How many virtual tokens each row's documents get [B], and the first of them in the table of all [B]."""
        if inputs.adapters is None:
            names: list[str | None] = [self.only()] * inputs.shape[0]
        else:
            names = [None if number < 0 else self.named(number) for number in inputs.adapters.tolist()]
        found, base = {}, 0
        for name, soft in self.softs.items():
            found[name] = (soft.length, base)
            base += soft.length
        pairs = [(0, 0) if name is None else found.get(name, (0, 0)) for name in names]
        lengths, first = torch.tensor(pairs, device=inputs.device).unbind(1)
        return lengths, first

    def _keys(self, rows: Tensor, places: Tensor, which: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """Where the virtual tokens with keys of their own stand, and those keys."""
        keys = [soft.keys() for soft in self.softs.values()]
        if not (some := [part for part in keys if part is not None]):
            return (rows, places), None
        own = torch.cat(
            [torch.full((soft.length,), part is not None, device=rows.device) for soft, part in zip(self.softs.values(), keys, strict=True)]
        )
        has = own[which]
        return (rows[has], places[has]), torch.cat(some)[(own.cumsum(0) - 1)[which[has]]]


@dataclass(frozen=True)
class _Spread:
    """Room made before documents. `rows` and `starts`: each document's row, and where its first token now stands."""

    places: Tensor  # [B, T]
    segments: Tensor | None  # [B, total]: -1 in the room that was made; None: one document a row, nothing else
    rows: Tensor
    starts: Tensor
    total: int

    def __call__(self, x: Tensor) -> Tensor:
        """[B|1, T, ...] -> [B, total, ...], zero in the room that was made."""
        batch = len(self.places)
        index = self.places.view(*self.places.shape, *[1] * (x.dim() - 2)).expand(*self.places.shape, *x.shape[2:])
        return x.new_zeros(batch, self.total, *x.shape[2:]).scatter(1, index, x.expand(batch, *x.shape[1:]))


def _spread(inputs: Inputs, lengths: Tensor) -> _Spread:
    """Room for `lengths` [B] tokens before each document of a row."""
    batch, count = inputs.shape
    index = torch.arange(count, device=inputs.device).expand(batch, count)
    if inputs.segments is None:
        longest, rows = int(lengths.max()), torch.arange(batch, device=inputs.device)
        places, total = index + longest, longest + count  # shorter prompts have padding before them: tokens end together
        given = None if bool((lengths == longest).all()) else torch.zeros_like(index)
        starts = torch.full_like(rows, longest)
    else:
        begins, given = inputs.segments >= 0, inputs.segments
        begins[:, 1:] &= inputs.segments[:, 1:] != inputs.segments[:, :-1]
        places = index + lengths[:, None] * begins.cumsum(1)
        rows, tokens = begins.nonzero().unbind(1)
        starts, total = places[rows, tokens], int(places.max()) + 1
    segments = None if given is None else torch.full((batch, total), -1, device=inputs.device).scatter(1, places, given)
    return _Spread(places, segments, rows, starts, total)
