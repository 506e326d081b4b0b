"""Attention over a compressed past: text is read in segments, and what came before them is remembered in a state of fixed size.

`SegmentMixer` does what such mixers share; each says how a segment is read beside the memory and how the memory takes it in.
Here: keys and values of the last tokens as they were (Transformer-XL, arXiv:1901.02860), and those before them pooled
(Compressive Transformer, arXiv:1911.05507; its auxiliary loss is left out: a convolution is trained by the task).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, SerializeAsAny, model_validator
from torch import Tensor, nn

from .attention import Mixer, MixerModule
from .backends import backends
from .keepers import Fixed, State
from .linear import Linear, OwnStart, Projections
from .linear_attention import extents
from .positions import Rope
from .products import Product
from .rebased import at
from .recurrent import States, recur
from .step import Step
from .store import Handle


class Segmented(Mixer):
    """What the specs of such mixers share; not a kind of its own."""

    kind: str
    heads: int = Field(gt=0, description="query heads")
    kv_heads: int = Field(gt=0, description="key and value heads")
    head_dim: int = Field(gt=0, description="width of one head")
    position: SerializeAsAny[Rope] | None = Field(None, description="rotary positions, counted as places among what is read")
    size: int = Field(gt=0, description="tokens in a segment")
    through: bool = Field(False, description="whether gradients flow through the memory into earlier segments")

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.position is not None and self.position.scaling is not None and self.position.scaling.by_length:
            raise ValueError("positions are places in what is read: their angles cannot depend on the length of the text")
        return self


class SegmentMixer(MixerModule):
    """Keeps the tokens of the segment that is under way, how many tokens came in all, and the memory of whole segments."""

    placed = True  # whether positions are places among what is read; else what is read was turned by its position in the text

    def __init__(self, spec: Segmented, dim: int):
        super().__init__()
        self.spec, self.scale = spec, spec.head_dim**-0.5
        widths = {"q": spec.heads, "k": spec.kv_heads, "v": spec.kv_heads}
        self.inp = Projections(**{name: Linear(dim, heads * spec.head_dim) for name, heads in widths.items()})
        self.out = Linear(spec.heads * spec.head_dim, dim)

    def memory(self) -> dict[str, Fixed]:
        """What is remembered of whole segments, by name, in the order that `read` and `absorb` know."""
        raise AssertionError

    def read(self, q: Tensor, k: Tensor, v: Tensor, memory: States, *, seen: int, step: Step) -> Tensor:
        """Queries [N, t, H, D], the last of their segment so far, whose keys and values are [N, fill + t, K, D], with what is
        remembered of the tokens before it -> [N, t, H, D]. `seen`: tokens before these queries."""
        raise AssertionError

    def absorb(self, k: Tensor, v: Tensor, memory: States, *, seen: int) -> States:
        """The memory with a whole segment [N, size, K, D] in it. `seen`: tokens up to its end."""
        raise AssertionError

    def state(self) -> State:
        own = Fixed((self.spec.size, self.spec.kv_heads, self.spec.head_dim))
        return {"seen": Fixed((), torch.int64), "own_k": own, "own_v": own, **self.memory()}

    def forward(self, x: Tensor, step: Step, handle: Handle) -> Tensor:
        y = recur(partial(self._scan, step=step), self.heads(x, step), list(self.state()), step, handle, mixer=self.spec.kind)
        return self.out(y.flatten(2), step)

    def heads(self, x: Tensor, step: Step) -> list[Tensor]:
        """Queries [B, T, H, D], keys and values [B, T, K, D]."""
        return [y.unflatten(-1, (-1, self.spec.head_dim)) for y in self.inp(x, step)]

    def _scan(self, inputs: tuple[Tensor, ...], states: States | None, *, step: Step) -> tuple[Tensor, States]:
        """Rows that have come equally far are computed together."""
        k = inputs[1]
        if states is None:
            states = tuple(
                torch.zeros(len(k), *entry.shape, dtype=entry.dtype or k.dtype, device=k.device)
                for entry in self.state().values()
                if isinstance(entry, Fixed)
            )
            return self._run(inputs, states, seen=0, step=step)
        counts: list[int] = states[0].tolist()
        if len(set(counts)) == 1:
            return self._run(inputs, states, seen=counts[0], step=step)
        order, outs = [], []
        for count in sorted(set(counts)):
            rows = torch.tensor([row for row, own in enumerate(counts) if own == count], device=k.device)
            y, new = self._run(tuple(x[rows] for x in inputs), tuple(state[rows] for state in states), seen=count, step=step)
            order.append(rows)
            outs.append((y, *new))
        back = torch.argsort(torch.cat(order))
        y, *new = (torch.cat(parts)[back] for parts in zip(*outs, strict=True))
        return y, tuple(new)

    def _run(self, inputs: tuple[Tensor, ...], states: States, *, seen: int, step: Step) -> tuple[Tensor, States]:
        q, k, v = inputs
        _, own_k, own_v, *kept = states
        memory, outs, start = tuple(kept), [], 0
        for fill, count in self.pieces(seen, q.shape[1]):
            end = start + count
            own_k, own_v = (torch.cat([own[:, :fill].to(x.dtype), x[:, start:end]], 1) for own, x in ((own_k, k), (own_v, v)))
            outs.append(self.read(q[:, start:end], own_k, own_v, memory, seen=seen, step=step))
            start, seen = end, seen + count
            if fill + count == self.spec.size:
                given = (own_k, own_v) if self.spec.through else (own_k.detach(), own_v.detach())
                memory = self.absorb(*given, memory, seen=seen)
        own_k, own_v = (F.pad(own, (0, 0) * 2 + (0, self.spec.size - own.shape[1])) for own in (own_k, own_v))
        total = torch.full((len(q),), seen, dtype=torch.int64, device=q.device)
        return torch.cat(outs, 1), (total, own_k, own_v, *memory)

    def pieces(self, seen: int, count: int) -> Iterator[tuple[int, int]]:
        """How `count` tokens after `seen` ones fall into segments: (tokens that the segment has before, tokens that come)."""
        while count:
            fill = seen % self.spec.size
            new = min(self.spec.size - fill, count)
            yield fill, new
            seen, count = seen + new, count - new

    def local(self, q: Tensor, k: Tensor, v: Tensor, *, step: Step) -> Tensor:
        """Queries [N, t, H, D] over keys and values [N, S, K, D], which end with the queries' own -> [N, H, t, D]. Positions are
        places among the keys."""
        total, before = k.shape[1], k.shape[1] - q.shape[1]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if self.placed and self.spec.position is not None:
            turn = self.spec.position.turn
            q, k = turn(q, _places(step, before, total)), turn(k, _places(step, 0, total))
        places = torch.arange(total, device=q.device)
        mask = (places <= places[before:, None])[None, None]
        return backends.get(self.backend)(q, k, v, scale=self.scale, causal=False, mask=mask)

    def local_products(self, rows: int, count: int, keys: int, flows: Mapping[str, bool]) -> list[Product]:
        """The products of `local`."""
        flops = 2 * rows * self.spec.heads * count * keys * self.spec.head_dim
        scores = Product(flops, flows["q"], flows["k"])
        return [scores, Product(flops, scores.left or scores.right, flows["v"])]


def _places(step: Step, start: int, end: int) -> Step:
    """The step as it would stand at these places."""
    return step.memo(("places", start, end), lambda: at(step, torch.arange(start, end, device=step.positions.device)[None]))


class Compressive(Segmented):
    """Attention over the query's own segment up to itself, the `memory` tokens before the segment, and `compressed` entries for
    what came before those, each made of `rate` tokens' keys and values. Without compressed entries it is Transformer-XL's."""

    kind: Literal["compressive"] = "compressive"
    memory: int = Field(gt=0, description="tokens before the segment that are kept as they were")
    compressed: int = Field(0, ge=0, description="entries kept of what came before those")
    rate: int = Field(1, gt=0, description="tokens that become one entry")
    pool: Literal["mean", "max", "conv"] = Field("mean", description="how they do; conv: by weights of each channel, which are trained")

    @classmethod
    def tiny(cls) -> Compressive:
        return cls(heads=6, kv_heads=2, head_dim=8, position=Rope(base=50.0), size=3, memory=3, compressed=2, rate=3, pool="conv")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.compressed and (self.size % self.rate or self.memory % self.rate):
            raise ValueError(f"size ({self.size}) and memory ({self.memory}) must be multiples of rate ({self.rate})")
        return self

    def build(self, dim: int) -> MixerModule:
        return CompressiveMixer(self, dim)


class CompressiveMixer(SegmentMixer):
    spec: Compressive

    def __init__(self, spec: Compressive, dim: int):
        super().__init__(spec, dim)
        convolved = spec.compressed > 0 and spec.pool == "conv"
        self.pool = nn.ModuleDict({name: Pool(spec) for name in "kv"}) if convolved else None

    def memory(self) -> dict[str, Fixed]:
        spec = self.spec
        lengths = {"memory": spec.memory, "compressed": spec.compressed} if spec.compressed else {"memory": spec.memory}
        return {f"{name}_{x}": Fixed((length, spec.kv_heads, spec.head_dim)) for name, length in lengths.items() for x in "kv"}

    def held(self, seen: int) -> tuple[int, int]:
        """How many tokens and how many compressed entries the memory holds after this many tokens."""
        whole = seen // self.spec.size * self.spec.size
        packed = max(whole - self.spec.memory, 0) // self.spec.rate
        return min(whole, self.spec.memory), min(packed, self.spec.compressed)

    def read(self, q: Tensor, k: Tensor, v: Tensor, memory: States, *, seen: int, step: Step) -> Tensor:
        tokens, entries = self.held(seen)
        parts = zip((tokens, entries), (memory[:2], memory[2:]), strict=True)
        kept = [[x[:, :length].to(k.dtype) for x in pair] for length, pair in parts if pair][::-1]  # the oldest first
        keys, values = (torch.cat([*(pair[i] for pair in kept), own], 1) for i, own in enumerate((k, v)))
        return self.local(q, keys, values, step=step).transpose(1, 2)

    def absorb(self, k: Tensor, v: Tensor, memory: States, *, seen: int) -> States:
        spec = self.spec
        tokens, entries = self.held(seen - spec.size)
        kept: list[Tensor] = []
        packed: list[Tensor] = []
        for i, (name, own) in enumerate((("k", k), ("v", v))):
            line = torch.cat([memory[i][:, :tokens].to(own.dtype), own], 1)
            over = max(line.shape[1] - spec.memory, 0)
            kept.append(_filled(line[:, over:], spec.memory))
            if spec.compressed:
                old = memory[2 + i][:, :entries].to(own.dtype)
                new = torch.cat([old, self._packed(line[:, :over], name)], 1)[:, -spec.compressed :] if over else old
                packed.append(_filled(new, spec.compressed))
        return (*kept, *packed)

    def _packed(self, x: Tensor, name: str) -> Tensor:
        """[N, n * rate, K, D] -> [N, n, K, D]."""
        x = x.unflatten(1, (-1, self.spec.rate))
        if self.pool is not None:
            return self.pool[name](x)
        return x.mean(2) if self.spec.pool == "mean" else x.amax(2)

    def products(self, step: Step, flows: Mapping[str, bool]) -> list[Product]:
        made = []
        for rows, length in extents(step):
            seen = step.slots.start
            for fill, count in self.pieces(seen, length):
                made += self.local_products(rows, count, sum(self.held(seen)) + fill + count, flows)
                seen += count
        return made


class Pool(OwnStart):
    """A convolution of each channel on its own, over `rate` tokens and that far on; it starts as their mean."""

    def __init__(self, spec: Compressive):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.rate, spec.kv_heads, spec.head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """[N, n, rate, K, D] -> [N, n, K, D]."""
        return (x * self.weight).sum(2)

    def reset(self) -> None:
        nn.init.constant_(self.weight, 1 / len(self.weight))


def _filled(x: Tensor, length: int) -> Tensor:
    """[N, n, K, D] with zeros after it, up to `length`."""
    return F.pad(x, (0, 0, 0, 0, 0, length - x.shape[1]))
