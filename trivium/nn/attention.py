"""Multi-head, grouped and multi-query attention: one module, told apart by the number of kv heads.

arXiv:1706.03762 (multi-head), arXiv:1911.02150 (multi-query), arXiv:2305.13245 (grouped).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, SerializeAsAny, model_validator
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.registry import Registry
from ..core.spec import Part, Spec
from .adapted_attention import AttentionPrompts
from .backends import Extras, attend, backends, weighted, weights_of
from .keepers import PerToken, Slots, State
from .linear import Linear, OwnStart, Projections
from .norms import Norm
from .patterns import Full, Pattern
from .positions import Position, Rope
from .products import Product
from .rebased import rebase
from .ring import Rolling, held
from .step import Step
from .store import Handle


@dataclass(frozen=True)
class Place:
    """Where a mixer stands: its layer's number in the whole model, and the names of the blocks up to and with its own."""

    index: int = 0
    names: tuple[str, ...] = ()

    def nearest(self, name: str) -> int:
        """The number of the nearest earlier layer whose block is named so; `ConfigError` where there is none."""
        for index in range(self.index - 1, -1, -1):
            if self.names[index] == name:
                return index
        raise ConfigError(f"layer {self.index} shares with block {name!r}, but no layer before it is one", field="share", value=name)


class Mixer(Part, registry=Registry("mixer", "trivium.nn")):
    """Root of the parts that mix positions: `build(dim)` gives a `MixerModule`."""

    def build(self, dim: int) -> MixerModule:
        raise AssertionError


class MixerModule(nn.Module):
    """A built mixer: `mixer(x [B, T, C], step, handle) -> [B, T, C]`, and the state that it keeps for decoding. `place` is set
    by the layer that holds it; `backend` names the attention backend, for mixers that have attention."""

    place = Place()
    backend = "auto"
    lends = False  # whether a later layer uses what this one computes: only then is it kept for it

    def settle(self, place: Place) -> None:
        """Learn where this mixer stands."""
        self.place = place

    def lender(self) -> int | None:
        """The layer whose mixer this one uses; `ConfigError` where there is none."""
        return None

    def state(self) -> State:
        """What a store must keep for this layer."""
        raise AssertionError

    def products(self, step: Step, flows: Mapping[str, bool]) -> list[Product]:
        """The matrix products of `step` beside those of the linear maps. `flows`: which maps' outputs have gradients."""
        raise AssertionError


class Scores(Spec):
    """How query-key products become scores."""

    scale: float | None = Field(None, description="what products are multiplied by; head_dim ** -0.5 if none is given")
    softcap: float | None = Field(None, gt=0, description="scores s become c * tanh(s / c) (Gemma 2)")
    sinks: bool = Field(False, description="each head learns the score of a key without a value that all queries see (gpt-oss)")


class Attention(Mixer):
    """softmax(q k^T * scale) v over the positions that causality, pattern and documents leave in sight."""

    kind: Literal["attention"] = "attention"
    heads: int = Field(gt=0, description="query heads")
    kv_heads: int = Field(gt=0, description="key and value heads: equal to heads is multi-head, 1 is multi-query")
    head_dim: int = Field(gt=0, description="width of one head")
    bias: tuple[Literal["q", "k", "v", "gate", "out"], ...] = Field((), description="which maps have a bias")
    position: SerializeAsAny[Position] | None = Field(None, description="what is done to queries and keys so that order matters")
    pattern: SerializeAsAny[Pattern] = Field(Full(), description="which positions are in reach")
    qk_norm: SerializeAsAny[Norm] | None = Field(None, description="the norm of queries and keys, before positions (arXiv:2302.05442)")
    qk_norm_over: Literal["head", "projection"] = Field("head", description="each head alone, or all heads together (OLMo 2)")
    v_norm: SerializeAsAny[Norm] | None = Field(None, description="the norm of each head's values (Gemma 4)")
    scores: Scores = Field(Scores(), description="how products become scores")
    gate: Literal["channel", "head"] | None = Field(None, description="a sigmoid of the input that multiplies what the heads give")
    share: str | None = Field(None, description="block whose nearest earlier layer gives keys and values; this one has none of its own")
    dropout: float = Field(0.0, ge=0, lt=1, description="chance of an attention weight to be dropped, in training (by eager)")

    @classmethod
    def tiny(cls) -> Attention:
        return cls(heads=6, kv_heads=2, head_dim=8)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        scaling = self.position.scaling if isinstance(self.position, Rope) else None
        if self.pattern.places is not None and (not isinstance(self.position, Rope) or (scaling is not None and scaling.by_length)):
            raise ValueError("a pattern that counts positions as places in the cache needs rotary positions whose angles no length changes")
        return self

    def build(self, dim: int) -> MixerModule:
        return AttentionMixer(self, dim)


class AttentionMixer(MixerModule):
    def __init__(self, spec: Attention, dim: int):
        super().__init__()
        self.spec = spec
        self.scale = spec.head_dim**-0.5 if spec.scores.scale is None else spec.scores.scale
        wide = spec.heads * spec.head_dim
        widths = {"q": wide} if spec.share is not None else {"q": wide, **dict.fromkeys("kv", spec.kv_heads * spec.head_dim)}
        if spec.gate is not None:
            widths["gate"] = wide if spec.gate == "channel" else spec.heads
        self.inp = Projections(**{name: Linear(dim, width, bias=name in spec.bias) for name, width in widths.items()})
        self.out = Linear(wide, dim, bias="out" in spec.bias)
        if spec.qk_norm is not None:
            over = {name: spec.head_dim if spec.qk_norm_over == "head" else widths[name] for name in "qk" if name in widths}
            self.norms = nn.ModuleDict({name: spec.qk_norm.build(width) for name, width in over.items()})
        self.v_norm = spec.v_norm.build(spec.head_dim) if spec.v_norm is not None and spec.share is None else None
        self.sinks = Sinks(spec.heads) if spec.scores.sinks else None
        self.table = spec.position.build(spec.heads, spec.head_dim) if spec.position is not None else None
        self.prompts: AttentionPrompts | None = None  # an adapter's
        self.owner: int | None = None  # the layer that holds the table of this one's positions, where another does

    def settle(self, place: Place) -> None:
        super().settle(place)
        if self.spec.position is not None and place.names:
            owner = self.spec.position.owner(place.index, place.names)
            if owner != place.index:
                self.owner, self.table = owner, None

    def lender(self) -> int | None:
        return None if self.spec.share is None else self.place.nearest(self.spec.share)

    def state(self) -> State:
        if self.spec.share is not None:
            return {}
        shape, keeps = (self.spec.kv_heads, self.spec.head_dim), self.spec.pattern.keeps
        entry = PerToken(shape) if keeps is None else Rolling(shape, last=keeps[0], first=keeps[1])
        return {"k": entry, "v": entry}

    def products(self, step: Step, flows: Mapping[str, bool]) -> list[Product]:
        pairs, keeps = step.view(self.spec.pattern.reach).pairs, self.spec.pattern.keeps
        if keeps is not None and step.slots.start:
            pairs = math.prod(step.inputs.shape) * held(step.slots, last=keeps[0], first=keeps[1])
        flops = 2 * self.spec.heads * self.spec.head_dim * pairs
        doubled = 1 if self.spec.pattern.places is None else 2
        scores = Product(doubled * flops, left=flows["q"], right=flows.get("k", True))
        mixed = Product(flops, left=scores.left or scores.right, right=flows.get("v", True))
        wide, view = self.spec.heads * self.spec.head_dim, step.view(self.spec.pattern.reach)
        learned = [] if self.prompts is None else self.prompts.products(step, self.inp, wide=wide, q=flows["q"])
        if (position := self.spec.position) is None or not position.naive:
            return [scores, mixed, *learned]
        own = position.products(step, view, wide=wide, table=self.table, q=flows["q"], weights=mixed.left)
        return [scores, Product(flops, left=own[-1].left, right=mixed.right), *own, *learned]

    def forward(self, x: Tensor, step: Step, handle: Handle) -> Tensor:
        spec = self.spec
        given = dict(zip(self.inp.names, self.inp(x, step), strict=True))
        q = self._heads(given["q"], "q", step)
        if spec.share is None:
            k, v = self._heads(given["k"], "k", step), split_heads(given["v"], spec.head_dim)
            v = v if self.v_norm is None else self.v_norm(v)
            if step.virtual is not None:
                k, v = step.virtual.keyed(self.place.index, k, v)
            slots = None
            if spec.pattern.keeps is None:
                k, v = handle.extend(k=k, v=v)
            else:
                (k, v), slots = handle.recall(step.memo, k=k, v=v)
            if self.lends:
                step.hand(("kv", self.place.index), (k, v, slots, spec.pattern))
        else:
            k, v, slots, pattern = step.handed(("kv", self.lender()))
            self._check_reach(pattern)
        mixed = self._attend(q, k, v, step, slots)
        if self.prompts is not None:
            mixed = self.prompts(q, mixed, self.inp, self.scale, step)
        mixed = mixed.transpose(1, 2)  # [B, T, H, D]
        if spec.gate is not None:
            gate = given["gate"].sigmoid()
            mixed = mixed * (gate.view(mixed.shape) if spec.gate == "channel" else gate[..., None])
        return self.out(mixed.reshape(*x.shape[:-1], -1), step)

    def _heads(self, x: Tensor, name: str, step: Step) -> Tensor:
        """Queries or keys, [B, T, H * D] -> [B, H, T, D], normed and turned."""
        spec = self.spec
        if spec.qk_norm is not None and spec.qk_norm_over == "projection":
            x = self.norms[name](x)
        x = split_heads(x, spec.head_dim)
        if spec.qk_norm is not None and spec.qk_norm_over == "head":
            x = self.norms[name](x)
        return x if spec.position is None or spec.pattern.places is not None else spec.position.turn(x, step)

    def _check_reach(self, pattern: Pattern) -> None:
        """Keys that roll, or that are turned by places, serve layers of the same pattern alone."""
        if pattern != self.spec.pattern and (pattern.keeps is not None or self.spec.pattern.places is not None):
            raise ConfigError(
                f"block {self.spec.share!r} keeps no more keys than its pattern {pattern.kind!r} reaches: a layer that shares them must "
                "have the same pattern",
                field="pattern",
                value=self.spec.pattern.kind,
            )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step, slots: Slots | None) -> Tensor:
        spec, view = self.spec, step.view(self.spec.pattern.reach, slots=slots)
        if (places := spec.pattern.places) is not None:
            assert spec.position is not None and spec.pattern.keeps is not None
            q, k = rebase(q, k, spec.position.turn, view, places=places, first=spec.pattern.keeps[1])
        table = self._table(step)
        bias = spec.position.bias(spec.heads, table) if spec.position is not None else None
        sinks = self.sinks.weight if self.sinks is not None else None
        learned = tuple(table.parameters()) if table is not None else ()
        extras = Extras(spec.scores.softcap, bias, None, sinks, learned)
        dropout = spec.dropout if self.training else 0.0
        if spec.position is not None and spec.position.naive:
            mixed, weights = spec.position.attend(
                q, k, v, view, table=table, scale=self.scale, backend=self.backend, extras=extras, dropout=dropout
            )
            if weights is not None:
                step.aux.weights[self.place.index] = weights
            return mixed
        if step.wants_weights:
            weights = step.aux.weights[self.place.index] = weights_of(q, k, view, scale=self.scale, extras=extras)
            return weighted(weights, v)
        return attend(q, k, v, view, scale=self.scale, backend=self.backend, extras=extras, dropout=dropout)

    def _table(self, step: Step) -> nn.Module | None:
        """What is learned of positions: this layer's own, or that of the layer that holds it for this one."""
        if self.owner is not None:
            return step.handed(("table", self.owner))
        if self.table is not None:
            step.hand(("table", self.place.index), self.table)
        return self.table


class Sinks(OwnStart):
    """One score for each head."""

    def __init__(self, heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads))

    def reset(self) -> None:
        nn.init.zeros_(self.weight)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, T, H * D] -> [B, H, T, D]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def use_backend(model: nn.Module, name: str) -> None:
    """Compute every attention layer of `model` with the backend `name`; an unknown name is an error that lists them."""
    backends.get(name)
    for module in model.modules():
        if isinstance(module, MixerModule):
            module.backend = name
