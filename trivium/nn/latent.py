"""Multi-head latent attention (MLA): keys and values of all heads come from one narrow latent, which is all that is cached.

Beside the latent stands one rotary key that all heads share. The expanded form makes every head's keys and values;
the absorbed form folds the maps that make them into queries and outputs, and attends to the latents themselves, as one
key and value head. Equal by associativity; what is cheaper runs. arXiv:2405.04434, arXiv:2412.19437.
With an `indexer`, each query attends only to the tokens that it selects (see `sparse`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field, SerializeAsAny, model_validator
from torch import Tensor

from .attention import Mixer, MixerModule, split_heads
from .backends import attend, weighted, weights_of
from .keepers import PerToken, State
from .linear import Linear, Projections
from .norms import RMS, Norm
from .patterns import Full, Pattern
from .positions import Rope
from .products import Product
from .sparse import Indexer, Query, Selection, attend_selected, scatter_selected, selects_all
from .step import Step, View
from .store import Handle


class LatentAttention(Mixer):
    """softmax((q k + q' k') * scale) v, where k and v of each head are linear in a latent and k' is one rotary key for all. A
    pattern hides tokens; the cache keeps all of them."""

    kind: Literal["latent"] = "latent"
    heads: int = Field(gt=0, description="query heads")
    kv_rank: int = Field(gt=0, description="width of the latent that keys and values are made from")
    q_rank: int | None = Field(None, gt=0, description="width of the latent that queries are made from; none: from the input")
    head_dim: int = Field(gt=0, description="channels of a head's queries and keys that no position turns")
    rope_dim: int = Field(gt=0, description="channels of a head's queries, and of the one shared key, that positions turn")
    v_dim: int = Field(gt=0, description="width of a head's values")
    bias: tuple[Literal["q", "kv", "rope", "out"], ...] = Field((), description="which maps have a bias")
    norm: SerializeAsAny[Norm] = Field(RMS(eps=1e-6), description="the norm of the latents")
    position: Rope | None = Field(Rope(), description="how the rotary channels are turned")
    pattern: SerializeAsAny[Pattern] = Field(Full(), description="which positions are in reach")
    scale: float | None = Field(None, description="what products are multiplied by; (head_dim + rope_dim) ** -0.5 if none is given")
    indexer: Indexer | None = Field(None, description="what selects the tokens that are attended to; none: all")

    @classmethod
    def tiny(cls) -> LatentAttention:
        return cls(heads=3, kv_rank=10, q_rank=14, head_dim=6, rope_dim=4, v_dim=8, position=Rope(base=50.0))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pattern.places is not None:
            raise ValueError("latent attention caches keys as they were turned: its pattern cannot count positions as places in the cache")
        if self.indexer is not None and self.indexer.rope_dim > self.indexer.head_dim:
            raise ValueError(f"the indexer's rope_dim ({self.indexer.rope_dim}) is more than its head_dim ({self.indexer.head_dim})")
        return self

    def build(self, dim: int) -> LatentMixer:
        return LatentMixer(self, dim)


class LatentMixer(MixerModule):
    """`form`: "expanded" or "absorbed" computes so always; "auto" absorbs where a cache is read and that takes fewer products.
    It leaves maps that a pass replaced as they are; what an indexer selects is always attended to in the absorbed form."""

    form: Literal["auto", "expanded", "absorbed"] = "auto"

    def __init__(self, spec: LatentAttention, dim: int):
        super().__init__()
        self.spec = spec
        self.scale = (spec.head_dim + spec.rope_dim) ** -0.5 if spec.scale is None else spec.scale
        wide = spec.heads * (spec.head_dim + spec.rope_dim)
        widths = {"q": spec.q_rank or wide, "kv": spec.kv_rank, "rope": spec.rope_dim}
        self.inp = Projections(**{name: Linear(dim, width, bias=name in spec.bias) for name, width in widths.items()})
        if spec.q_rank is not None:
            self.q_norm = spec.norm.build(spec.q_rank)
            self.q_up = Linear(spec.q_rank, wide)
        self.kv_norm = spec.norm.build(spec.kv_rank)
        self.up = Projections(k=Linear(spec.kv_rank, spec.heads * spec.head_dim), v=Linear(spec.kv_rank, spec.heads * spec.v_dim))
        self.out = Linear(spec.heads * spec.v_dim, dim, bias="out" in spec.bias)
        self.indexer = None if spec.indexer is None else spec.indexer.build(dim, spec.q_rank or dim)

    def state(self) -> State:
        """One entry a token for all heads: the latent, and after it the rotary key."""
        latent = {"kv": PerToken((1, self.spec.kv_rank + self.spec.rope_dim))}
        return latent if self.indexer is None else {**latent, "index": PerToken((1, self.indexer.spec.head_dim))}

    def forward(self, x: Tensor, step: Step, handle: Handle) -> Tensor:
        spec = self.spec
        q, kv, rope = self.inp(x, step)
        latent, q_latent = self.kv_norm(kv), x
        if spec.q_rank is not None:
            q_latent = self.q_norm(q)
            q = self.q_up(q_latent, step)
        q = split_heads(q, spec.head_dim + spec.rope_dim)
        q = torch.cat([q[..., : spec.head_dim], self._turn(q[..., spec.head_dim :], step)], -1)
        new = torch.cat([latent[:, None], self._turn(rope[:, None], step)], -1)  # [B, 1, T, kv_rank + rope_dim]
        if self.indexer is None:
            (kv,) = handle.extend(kv=new)
            mixed = self._attend(q, kv, step)
        else:
            query, key = self.indexer(x, q_latent, step)
            kv, keys = handle.extend(kv=new, index=key)
            mixed = self._attend_indexed(q, kv, query, keys, step)
        return self.out(mixed.transpose(1, 2).flatten(2), step)

    def _turn(self, x: Tensor, step: Step) -> Tensor:
        return x if self.spec.position is None else self.spec.position.turn(x, step)

    def _attend(self, q: Tensor, kv: Tensor, step: Step) -> Tensor:
        """q [B, H, T, head_dim + rope_dim] over latents and rotary keys kv [B, 1, S, *] -> [B, H, T, v_dim]."""
        view = step.view(self.spec.pattern.reach)
        if self._absorbs(step):
            return self._leave(self._attention(self._enter(q, step), kv, kv[..., : self.spec.kv_rank], view), step)
        return self._attention(q, *self._expand(kv, step), view)

    def _attend_indexed(self, q: Tensor, kv: Tensor, query: Query, keys: Tensor, step: Step) -> Tensor:
        """As `_attend`, over what the indexer selects by its query and keys [B, 1, S, *], always from the latents."""
        assert self.indexer is not None
        view = step.view(self.spec.pattern.reach)
        selection = self.indexer.select(query, keys, view)
        if selection is None:
            if self.training:
                weights = weights_of(q.detach(), self._expand(kv.detach(), step)[0], view, scale=self.scale)
                self._teach(query, keys, weights, view, None)
            return self._attend(q, kv, step)
        mixed, weights = attend_selected(self._enter(q, step), kv[:, 0], self.spec.kv_rank, selection, scale=self.scale)
        if self.training:
            self._teach(query, keys, weights, view, selection)
        if step.wants_weights:
            step.aux.weights[self.place.index] = scatter_selected(weights, selection, kv.shape[2])
        return self._leave(mixed, step)

    def _teach(self, query: Query, keys: Tensor, weights: Tensor, view: View, selection: Selection | None) -> None:
        assert self.indexer is not None
        term = self.indexer.divergence(query, keys, weights.sum(1), view, selection)
        view.step.aux.terms["indexer", self.place.index] = term

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, view: View) -> Tensor:
        if view.step.wants_weights:
            weights = view.step.aux.weights[self.place.index] = weights_of(q, k, view, scale=self.scale)
            return weighted(weights, v)
        return attend(q, k, v, view, scale=self.scale, backend=self.backend)

    def _expand(self, kv: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Every head's keys [B, H, S, head_dim + rope_dim] and values [B, H, S, v_dim]."""
        latent, rope = kv.split([self.spec.kv_rank, self.spec.rope_dim], -1)
        k, v = self.up(latent[:, 0], step)
        k, v = split_heads(k, self.spec.head_dim), split_heads(v, self.spec.v_dim)
        return torch.cat([k, rope.expand(-1, self.spec.heads, -1, -1)], -1), v

    def _absorbs(self, step: Step) -> bool:
        if self.form != "auto":
            return self.form == "absorbed"
        spec, queries, keys = self.spec, step.count, step.slots.end
        made = spec.kv_rank * (spec.head_dim + spec.v_dim)
        expanded = keys * made + queries * keys * (spec.head_dim + spec.rope_dim + spec.v_dim)
        absorbed = queries * made + queries * keys * (2 * spec.kv_rank + spec.rope_dim)
        return step.slots.start > 0 and absorbed < expanded and all(isinstance(linear, Linear) for linear in self.up.children())

    def _enter(self, q: Tensor, step: Step) -> Tensor:
        """Queries as they meet latents: [B, H, T, kv_rank + rope_dim]."""
        plain, turned = q.split([self.spec.head_dim, self.spec.rope_dim], -1)
        return torch.cat([_each_head(plain, self._matrix("k", plain, step).transpose(-1, -2)), turned], -1)

    def _leave(self, mixed: Tensor, step: Step) -> Tensor:
        """Mixed latents [B, H, T, kv_rank] as each head's mixed values [B, H, T, v_dim]."""
        return _each_head(mixed, self._matrix("v", mixed, step))

    def _matrix(self, name: str, like: Tensor, step: Step) -> Tensor:
        """What `up`'s map does to a latent, [H, kv_rank, D], or [B, H, kv_rank, D] where a pass replaced the map, which may
        then differ by row."""
        linear = self.up.get_submodule(name)
        if isinstance(linear, Linear):
            return linear.weight.unflatten(0, (self.spec.heads, -1)).transpose(-1, -2)
        units = torch.eye(self.spec.kv_rank, dtype=like.dtype, device=like.device).expand(len(like), -1, -1)
        matrix = linear(units, step).transpose(1, 2).contiguous()  # lies as a weight does
        return matrix.unflatten(1, (self.spec.heads, -1)).transpose(-1, -2)

    def products(self, step: Step, flows: Mapping[str, bool]) -> list[Product]:
        """Beside the term that an indexer trains on, which is left out."""
        spec, (batch, count) = self.spec, step.inputs.shape
        view, found = step.view(spec.pattern.reach), []
        pairs, selected = view.pairs, spec.indexer is not None and not selects_all(view, spec.indexer.top_k)
        if spec.indexer is not None and selected:
            looked = 2 * spec.indexer.heads * spec.indexer.head_dim * batch * count * step.slots.end
            found.append(Product(looked, left=False, right=False))
            pairs = batch * count * spec.indexer.top_k
        q = flows["q"] or (spec.q_rank is not None and any(p.requires_grad for p in self.q_up.parameters()))
        latent = flows["kv"] or any(p.requires_grad for p in self.kv_norm.parameters())
        key, value = latent or flows["rope"] or flows["k"], latent or flows["v"]
        if selected or self._absorbs(step):
            q, key, value = q or flows["k"], latent or flows["rope"], latent
            widths = (spec.kv_rank + spec.rope_dim, spec.kv_rank)
        else:
            widths = (spec.head_dim + spec.rope_dim, spec.v_dim)
            again = 2 * batch * (step.slots.end - count) * spec.kv_rank * spec.heads * (spec.head_dim + spec.v_dim)
            if again:
                found.append(Product(again, left=latent, right=flows["k"]))
        found.append(Product(2 * spec.heads * widths[0] * pairs, left=q, right=key))
        found.append(Product(2 * spec.heads * widths[1] * pairs, left=q or key, right=value))
        return found


def _each_head(x: Tensor, matrix: Tensor) -> Tensor:
    """x [B, H, T, D] times the matrix of its head, [H, D, E] or [B, H, D, E]."""
    return torch.einsum("bhtd,hde->bhte" if matrix.dim() == 3 else "bhtd,bhde->bhte", x, matrix)
