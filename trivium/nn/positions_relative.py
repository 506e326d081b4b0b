"""Relative positions: what attention adds by how far apart query and key are, instead of turning them.

ALiBi subtracts a multiple of the distance (arXiv:2108.12409). T5 adds a learned number for each bucket of distances
(arXiv:1910.10683). Shaw's representations add learned vectors to keys and values (arXiv:1803.02155): each query is
multiplied with every distance's vector once and the products are placed by distance, which is what skewing does
(arXiv:1809.04281), so that nothing is as large as T x T x D. All are functions of positions, and so work for any tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..core.errors import ConfigError
from .backends import NONE, Bias, Extras, Mask, attend, eager_weights, weighted
from .positions import Position
from .products import Product
from .step import Step, View


def steps_apart(queries: Tensor, keys: Tensor, *, reach: int) -> Tensor:
    """Which of the 2 * reach + 1 distances from -reach to reach, as a row of a table, lies from each query to each key, of
    positions [B|1, T] and [B|1, S]: [B|1, T, S]. What is further counts as furthest."""
    return (keys[:, None, :] - queries[:, :, None]).clamp_(-reach, reach) + reach


class Alibi(Position):
    """Scores fall by a slope times the distance, a slope for each head: powers of two from 2 ** -(8 / heads) to 1/256, and those
    halfway between where the number of heads is no power of two."""

    kind: Literal["alibi"] = "alibi"

    @classmethod
    def tiny(cls) -> Alibi:
        return cls()

    def bias(self, heads: int, table: nn.Module | None) -> Bias:
        def bias(queries: Tensor, keys: Tensor) -> Tensor:
            slopes = torch.tensor(alibi_slopes(heads), dtype=torch.float32, device=keys.device)
            distance = (keys[:, None, :] - queries[:, :, None]).abs_()
            return -slopes[:, None, None] * distance[:, None]

        return bias


def alibi_slopes(heads: int) -> list[float]:
    """Each head's slope."""
    whole = 2 ** math.floor(math.log2(heads))
    between = [2.0 ** (-4 * i / whole) for i in range(1, 2 * (heads - whole), 2)]
    return [2.0 ** (-8 * i / whole) for i in range(1, whole + 1)] + between


class RelativeBias(Position):
    """T5's: each head adds a learned number for the bucket of the distance. The nearest distances have buckets of their own,
    further ones share logarithmically wider ones, up to `distance`, from which on there is one."""

    kind: Literal["relative_bias"] = "relative_bias"
    buckets: int = Field(32, ge=2, description="rows of the table")
    distance: int = Field(128, gt=0, description="the distance from which on all is one bucket")
    bidirectional: bool = Field(False, description="half of the buckets are for keys after the query (encoders)")
    shared: bool = Field(True, description="the first layer of a block holds the table for all layers of it (T5); else each has its own")

    @classmethod
    def tiny(cls) -> RelativeBias:
        return cls(buckets=6, distance=9)

    @model_validator(mode="after")
    def _check(self) -> Self:
        exact = self._exact
        if exact < 1 or self.distance <= exact or (self.bidirectional and self.buckets % 2):
            raise ValueError(
                f"{self.buckets} buckets up to a distance of {self.distance} cannot be: buckets must be even (a multiple of 4 if "
                f"bidirectional), and the distance beyond the {exact} nearest"
            )
        return self

    @property
    def _exact(self) -> int:
        """How many of the nearest distances have a bucket of their own, on one side."""
        return self.buckets // (4 if self.bidirectional else 2)

    def owner(self, index: int, names: Sequence[str]) -> int:
        return names.index(names[index]) if self.shared else index

    def build(self, heads: int, head_dim: int) -> nn.Module:
        return BucketTable(self, heads)

    def bias(self, heads: int, table: nn.Module | None) -> Bias:
        assert isinstance(table, BucketTable)

        def bias(queries: Tensor, keys: Tensor) -> Tensor:
            places = steps_apart(queries, keys, reach=self.distance)
            by_distance = F.embedding(self.bucket(torch.arange(-self.distance, self.distance + 1, device=keys.device)), table.weight)
            return by_distance.T[:, places].transpose(0, 1)

        return bias

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of each distance from a query to a key (int64, of any shape)."""
        buckets, exact = self.buckets, self._exact
        side = torch.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            side = (distance > 0) * buckets
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        wide = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.distance / exact) * (buckets - exact)
        return side + torch.where(distance < exact, distance, (exact + wide.long()).clamp(max=buckets - 1))


class BucketTable(nn.Module):
    """A number for each bucket and head."""

    def __init__(self, spec: RelativeBias, heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.buckets, heads))


class Relative(Position):
    """Shaw's relative representations: a learned vector for each distance up to `reach` is added to keys, and another to values,
    the same for all heads. The weights themselves are needed, so attention is computed by `eager`."""

    kind: Literal["relative"] = "relative"
    naive: ClassVar[bool] = True
    reach: int = Field(16, gt=0, description="the distance from which on all have one vector")

    @classmethod
    def tiny(cls) -> Relative:
        return cls(reach=4)

    def build(self, heads: int, head_dim: int) -> nn.Module:
        return RelativeVectors(self, head_dim)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        view: View,
        *,
        table: nn.Module | None,
        scale: float,
        backend: str,
        extras: Extras,
        dropout: float,
    ) -> tuple[Tensor, Tensor | None]:
        assert isinstance(table, RelativeVectors)
        if backend not in ("auto", "eager", "native"):  # where there is no native kernel, native is eager
            raise ConfigError(
                f"relative representations need the attention weights, which the backend {backend!r} does not give: use 'eager' or 'auto'",
                field="backend",
                value=backend,
            )
        if view.step.wants_weights:
            places = view.step.positions, view.key_positions
            weights = table.weights(q, k, scale=scale, causal=False, mask=view, extras=replace(extras, places=places))
            return table.mixed(weights, v, *places), weights

        def run(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Mask | None, extras: Extras = NONE) -> Tensor:
            assert extras.places is not None
            weights = table.weights(q, k, scale=scale, causal=causal, mask=mask, extras=extras)
            return table.mixed(F.dropout(weights, dropout) if dropout else weights, v, *extras.places)

        extras = replace(extras, bias=table.places)  # whatever computes a part must say where it lies
        return attend(q, k, v, view, scale=scale, backend=run, extras=extras), None

    def products(self, step: Step, view: View, *, wide: int, table: nn.Module | None, q: bool, weights: bool) -> list[Product]:
        assert isinstance(table, RelativeVectors)
        count = step.inputs.shape.numel() if view.documents is None else len(view.documents.slots)
        flops = 2 * count * wide * (2 * self.reach + 1)
        return [
            Product(flops, left=q, right=table.keys.requires_grad),
            Product(flops, left=weights or table.keys.requires_grad, right=table.values.requires_grad),
        ]


class RelativeVectors(nn.Module):
    """A vector for each distance, from `reach` before the query to `reach` after it."""

    def __init__(self, spec: Relative, head_dim: int):
        super().__init__()
        self.reach = spec.reach
        self.keys = nn.Parameter(torch.empty(2 * spec.reach + 1, head_dim))
        self.values = nn.Parameter(torch.empty(2 * spec.reach + 1, head_dim))

    def places(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[B|1, 1, T, S]: the row of the tables for each query and key."""
        return steps_apart(queries, keys, reach=self.reach)[:, None]

    def weights(self, q: Tensor, k: Tensor, *, scale: float, causal: bool, mask: Mask | None, extras: Extras) -> Tensor:
        """[B, H, T, S]: softmax of q (k + the distance's vector), queries and keys at `extras.places`."""
        products = (q * scale) @ self.keys.T  # [B, H, T, R]

        def bias(queries: Tensor, keys: Tensor) -> Tensor:
            return products.gather(-1, self.places(queries, keys).expand(*products.shape[:-1], -1))

        return eager_weights(q, k, scale=scale, causal=causal, mask=mask, extras=replace(extras, bias=bias))

    def mixed(self, weights: Tensor, v: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """[B, H, T, D]: weights [B, H, T, S] of v [B, K, S, D] and of each distance's vector: weights are added up by distance first."""
        by_distance = weights.new_zeros(*weights.shape[:-1], 2 * self.reach + 1)
        by_distance = by_distance.scatter_add(-1, self.places(queries, keys).expand(weights.shape), weights)
        return weighted(weights, v) + by_distance @ self.values
