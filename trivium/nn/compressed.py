"""DeepSeek-V4's attention: a window of recent tokens, and beside it entries that each stand for a whole stretch of tokens.

One narrow key, which is the value too, serves all heads. `rate` tokens make one entry; with an `index`, a query reads the
`top_k` entries that a small indexer scores highest (compressed sparse attention, few tokens an entry), without one it reads
all (heavily compressed attention, many tokens an entry). Both halves share one softmax, with a learned sink. Values carry
their position, which is turned back out of the result; the output map is low-rank, by groups of heads. Weights are not
over tokens and are not recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.spec import Spec
from .attention import Mixer, MixerModule, Sinks, split_heads
from .compressor import Compressor, completed
from .inputs import Prefix
from .keepers import Slots, State
from .linear import Linear, Projections
from .norms import RMS
from .positions import Rope, rotate
from .products import Product
from .ring import Rolling
from .sparse import QUERIES, Aside, Query, Selection, choose, divergence, index_scores, pick, scores_of_chosen
from .step import Step
from .store import Handle
from .strided import Entries, Strided


class Index(Spec):
    """What selects entries: heads of their own over entries of their own, pooled from the same tokens."""

    heads: int = Field(gt=0, description="heads of the indexer")
    head_dim: int = Field(gt=0, description="width of its queries, and of the keys that its heads share")
    top_k: int = Field(gt=0, description="how many entries a query reads")


class Compress(Spec):
    """How the past is compressed."""

    rate: int = Field(gt=1, description="tokens that make one entry")
    overlap: bool = Field(False, description="an entry is made from the stretch before its own too")
    index: Index | None = Field(None, description="what selects the entries that a query reads; none: it reads all")


class CompressedAttention(Mixer):
    """softmax over a window's tokens, compressed entries and a sink, with one key for all heads that is the value as well."""

    kind: Literal["compressed"] = "compressed"
    heads: int = Field(gt=0, description="query heads")
    head_dim: int = Field(gt=0, description="width of one head, and of the key")
    rope_dim: int = Field(gt=0, description="last channels of these, which positions turn")
    q_rank: int = Field(gt=0, description="width of the latent that queries are made from")
    window: int = Field(gt=0, description="tokens seen as they are, the query's own included")
    compress: Compress | None = Field(None, description="how what came before is seen; none: not at all")
    groups: int = Field(1, gt=0, description="groups of heads, each with an output map of its own")
    group_rank: int = Field(gt=0, description="width that each of these maps to")
    norm: RMS = Field(RMS(eps=1e-6, round_first=False), description="the norm of latents, keys and entries; of queries, without a weight")
    position: Rope = Field(Rope(layout="interleaved"), description="how channels are turned")

    @classmethod
    def tiny(cls) -> CompressedAttention:
        sparse = Compress(rate=2, overlap=True, index=Index(heads=5, head_dim=6, top_k=2))
        return cls(heads=4, head_dim=10, rope_dim=4, q_rank=14, window=3, compress=sparse, groups=2, group_rank=9, position=Rope(base=50.0))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.heads % self.groups:
            raise ValueError(f"heads ({self.heads}) must be a multiple of groups ({self.groups})")
        narrow = self.head_dim if self.compress is None or self.compress.index is None else min(self.head_dim, self.compress.index.head_dim)
        if self.rope_dim > narrow:
            raise ValueError(f"rope_dim ({self.rope_dim}) is more channels than there are ({narrow})")
        return self

    def build(self, dim: int) -> CompressedMixer:
        return CompressedMixer(self, dim)


class CompressedMixer(MixerModule):
    def __init__(self, spec: CompressedAttention, dim: int):
        super().__init__()
        if spec.position.scaling is not None and spec.position.scaling.by_length:
            raise ConfigError("compressed attention cannot turn entries by a scaling that depends on the length", field="position")
        self.spec, self.scale = spec, spec.head_dim**-0.5
        self.inp = Projections(q=Linear(dim, spec.q_rank), kv=Linear(dim, spec.head_dim))
        self.q_norm, self.kv_norm = spec.norm.build(spec.q_rank), spec.norm.build(spec.head_dim)
        self.q_up = Linear(spec.q_rank, spec.heads * spec.head_dim)
        self.sinks = Sinks(spec.heads)
        self.compressor, self.indexer = None, None
        if spec.compress is not None:
            how = spec.compress
            self.compressor = Compressor(dim, spec.head_dim, rate=how.rate, overlap=how.overlap, name="entry")
            self.entry_norm = spec.norm.build(spec.head_dim)
            if how.index is not None:
                self.indexer = EntryIndex(how.index, how, spec.norm, dim, spec.q_rank)
        wide = spec.heads * spec.head_dim // spec.groups
        self.group_out = nn.ModuleList(Linear(wide, spec.group_rank) for _ in range(spec.groups))
        self.out = Linear(spec.groups * spec.group_rank, dim)

    def state(self) -> State:
        """The window's tokens, an entry for each stretch, and what is left of the stretch that is open."""
        kept: dict = {"kv": Rolling((1, self.spec.head_dim), last=self.spec.window)}
        if self.compressor is not None:
            kept |= {"entries": Strided(self.spec.head_dim, self.compressor.rate), **self.compressor.state()}
        if self.indexer is not None:
            kept |= {"index_keys": Strided(self.indexer.spec.head_dim, self.indexer.compressor.rate), **self.indexer.compressor.state()}
        return kept

    def forward(self, x: Tensor, step: Step, handle: Handle) -> Tensor:
        spec, turn = self.spec, Turn(self.spec.position, self.spec.rope_dim)
        q_latent, kv = self.inp(x, step)
        q_latent = self.q_norm(q_latent)
        q = split_heads(self.q_up(q_latent, step), spec.head_dim)
        q = turn(F.rms_norm(q, (spec.head_dim,), eps=spec.norm.eps), step)
        (kv,), slots = handle.recall(step.memo, kv=turn(self.kv_norm(kv)[:, None], step))
        recent = Slots(0, step.count, step.positions, step.segments) if slots is None else slots
        entries = asked = None
        if self.compressor is not None:
            found = completed(self.compressor(x, step, handle), step, self.compressor.rate)
            values = turn.at(self.entry_norm(found.values), found.positions - self.compressor.rate + 1)
            entries = handle.accrue("entries", Entries(values, found.positions, found.segments, found.at))
        if self.indexer is not None:
            asked = self.indexer(x, q_latent, step, handle, turn)
        mixed = turn(self._attend(q, kv[:, 0], recent, entries, asked, step), step, back=True)
        grouped = mixed.transpose(1, 2).flatten(2).chunk(spec.groups, -1)
        return self.out(torch.cat([linear(part, step) for linear, part in zip(self.group_out, grouped, strict=True)], -1), step)

    def _attend(self, q: Tensor, kv: Tensor, recent: Slots, entries: Entries | None, asked: Asked | None, step: Step) -> Tensor:
        """q [B, H, T, D] over recent tokens kv [B, S, D] and entries -> [B, H, T, D], some queries at a time."""
        mixed, terms = [], []
        for part in self._parts(step, kv.shape[1], 0 if entries is None else entries.values.shape[1]):
            near = torch.cat([kv[:, : part.held], kv[:, part.start : part.end]], 1)
            sides, seen, selection = [(near, self._sees(recent, part, step))], None, None
            if entries is not None and part.entries:
                shown, seen = entries.values[:, : part.entries], sees_entries(entries, part, step)
                selection = None if asked is None else asked.select(part, seen)
                sides.append((shown, seen) if selection is None else (pick(shown, selection), selection.seen))
            weights = self._weights(q[:, :, part.first : part.last], sides)
            mixed.append(torch.stack([_times(w, values) for w, (values, _) in zip(weights, sides, strict=True)]).sum(0))
            if self.training and asked is not None and seen is not None:
                terms.append(asked.divergence(part, selection, seen, weights[1].sum(1)))
        if terms:
            step.aux.terms["indexer", self.place.index] = torch.stack(terms).sum()
        return torch.cat(mixed, 2)

    def _weights(self, q: Tensor, sides: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Of queries q [B, H, t, D] on each side's values [B, K, D] or [B, t, K, D], where they are seen [B|1, t, K]; [B, H, t, K]."""
        scores = [_times(q * self.scale, values.transpose(-1, -2)).masked_fill(~seen[:, None], float("-inf")) for values, seen in sides]
        sinks = self.sinks.weight.to(q.dtype)[None, :, None, None].expand(*q.shape[:3], 1)
        return list(torch.cat([*scores, sinks], -1).softmax(-1)[..., :-1].split([x.shape[-1] for x in scores], -1))

    def _parts(self, step: Step, keys: int, entries: int) -> Iterator[Part]:
        """`keys`: how many recent tokens there are, those of this step last, but for a single one, which may lie anywhere."""
        count, reach = step.count, self.spec.window - 1
        held = 0 if keys == count else keys if count == 1 else keys - count
        ahead = _ahead(step)
        for first in range(0, count, QUERIES):
            last = min(first + QUERIES, count)
            near = held if first < reach or not step.even else 0
            start, end = held + max(first - reach, 0), min(held + (min(last + reach, count) if ahead else last), keys)
            limited = self.compressor is not None and step.even and not ahead
            seen = min(entries, (step.slots.start + last) // self.compressor.rate) if limited and self.compressor is not None else entries
            yield Part(first, last, near, start, end, seen)

    def _sees(self, recent: Slots, part: Part, step: Step) -> Tensor:
        """[B|1, t, K]: which recent tokens the queries of `part` see."""
        assert recent.positions is not None
        queries, keys = step.positions[:, part.first : part.last, None], _chosen(recent.positions, part)[:, None]
        seen = (queries - keys).abs() < self.spec.window
        seen = seen & _in_time(queries, keys, step)
        if step.segments is None or recent.segments is None:
            return seen
        own = step.segments[:, part.first : part.last, None]
        return seen & (own == _chosen(recent.segments, part)[:, None]) & (own >= 0)

    def products(self, step: Step, flows: Mapping[str, bool]) -> list[Product]:
        """Beside the term that an index trains on, which is left out."""
        spec, count, end = self.spec, step.count, step.slots.end
        rate = spec.compress.rate if spec.compress is not None else 1
        entries = 0 if spec.compress is None else end // rate if step.even else -(-count // rate)
        keys = count if step.slots.start == 0 else min(end, spec.window) if count == 1 else min(step.slots.start, spec.window) + count
        index = None if spec.compress is None else spec.compress.index
        pairs, looked = 0, 0
        for part in self._parts(step, keys, entries):
            chosen = part.entries if index is None else min(part.entries, index.top_k)
            pairs += (part.last - part.first) * (part.held + part.end - part.start + chosen)
            if index is not None and part.entries > chosen:
                looked += (part.last - part.first) * part.entries * index.heads * index.head_dim
        rows = step.inputs.shape[0]
        flops = 2 * rows * spec.heads * spec.head_dim * pairs
        q = flows["q"] or any(p.requires_grad for p in self.q_up.parameters())
        kv = flows["kv"] or (self.compressor is not None and any(p.requires_grad for p in self.compressor.parameters()))
        return [
            Product(2 * rows * looked, left=False, right=False),
            Product(flops, left=q, right=kv),
            Product(flops, left=q or kv, right=kv),
        ]


@dataclass(frozen=True)
class Part:
    """Some queries, `first` to `last`, and what they may see: the first `held` recent tokens, those from `start` to `end`, and the
    first `entries` entries."""

    first: int
    last: int
    held: int
    start: int
    end: int
    entries: int


@dataclass(frozen=True)
class Turn:
    """Rotary positions of the last `dim` channels."""

    position: Rope
    dim: int

    def __call__(self, x: Tensor, step: Step, *, back: bool = False) -> Tensor:
        """x [B, H, T, D], each by its position; `back`: the other way."""
        cos, sin = self.position.tables(self.dim, step, x.dtype)
        return self._turned(x, cos, -sin if back else sin)

    def at(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, E, D] by `positions` [B|1, E]."""
        frequencies = self.position.frequencies(self.dim, torch.zeros((), dtype=torch.int64, device=x.device))
        angles, scaling = positions[..., None].float() * frequencies, self.position.scaling
        magnitude = 1.0 if scaling is None else scaling.magnitude
        return self._turned(x, (angles.cos() * magnitude).to(x.dtype), (angles.sin() * magnitude).to(x.dtype))

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        plain, turned = x.split([x.shape[-1] - self.dim, self.dim], -1)
        return torch.cat([plain, rotate(turned, cos, sin, layout=self.position.layout)], -1)


@dataclass(frozen=True)
class Asked:
    """An index's queries and the keys [B, E, D] of all entries."""

    query: Query
    keys: Tensor
    top_k: int

    def select(self, part: Part, seen: Tensor) -> Selection | None:
        """The entries that each query reads; None: all it sees."""
        if part.entries <= self.top_k:
            return None
        return choose(self.query.rows(part.first, part.last), self.keys[:, : part.entries], seen, self.top_k)

    def divergence(self, part: Part, selection: Selection | None, seen: Tensor, looked: Tensor) -> Tensor:
        """Of its scores from how attention `looked` [B, t, K] at what was selected: see `sparse.divergence`."""
        query, keys = self.query.rows(part.first, part.last), self.keys[:, : part.entries]
        if selection is not None:
            return divergence(scores_of_chosen(query, keys, selection), selection.seen, looked)
        scores = index_scores(query, keys)
        return divergence(scores, seen.expand(scores.shape), looked)


class EntryIndex(Aside):
    """An indexer whose keys are entries, made from the stretches that attention's entries are made from."""

    def __init__(self, spec: Index, how: Compress, norm: RMS, dim: int, latent: int):
        super().__init__()
        self.spec = spec
        self.compressor = Compressor(dim, spec.head_dim, rate=how.rate, overlap=how.overlap, name="index")
        self.norm = norm.build(spec.head_dim)
        self.q, self.weight = Linear(latent, spec.heads * spec.head_dim), Linear(dim, spec.heads)

    def forward(self, x: Tensor, latent: Tensor, step: Step, handle: Handle, turn: Turn) -> Asked:
        spec, x, rate = self.spec, x.detach(), self.compressor.rate
        found = completed(self.compressor(x, step, handle), step, rate)
        keys = turn.at(self.norm(found.values), found.positions - rate + 1)
        keys = handle.accrue("index_keys", Entries(keys, found.positions, found.segments, found.at)).values
        q = turn(split_heads(self.q(latent.detach(), step), spec.head_dim), step).transpose(1, 2)
        return Asked(Query(q, self.weight(x, step) * (spec.heads * spec.head_dim) ** -0.5), keys, spec.top_k)


def sees_entries(entries: Entries, part: Part, step: Step) -> Tensor:
    """[B|1, t, E]: which entries the queries of `part` see: those complete by then, of their own document."""
    queries, ends = step.positions[:, part.first : part.last, None], entries.positions[:, None, : part.entries]
    seen = _in_time(queries, ends, step)
    if entries.segments is None:
        return seen
    theirs = entries.segments[:, None, : part.entries]
    if step.segments is None:
        return seen & (theirs >= 0)
    own = step.segments[:, part.first : part.last, None]
    return seen & (theirs == own) & (own >= 0)


def _ahead(step: Step) -> bool:
    """Whether a query may see what comes after it."""
    return not step.causal or isinstance(step.inputs.mask, Prefix)


def _in_time(queries: Tensor, keys: Tensor, step: Step) -> Tensor:
    """Whether a key's position is open to a query's, documents aside."""
    if not step.causal:
        return torch.ones_like(queries <= keys)
    seen = keys <= queries
    if isinstance(step.inputs.mask, Prefix):
        within = step.inputs.mask.lengths[:, None, None]
        seen = seen | ((queries < within) & (keys < within))
    return seen


def _chosen(x: Tensor, part: Part) -> Tensor:
    """Of recent tokens' x [B|1, S], those that `part` sees."""
    return torch.cat([x[:, : part.held], x[:, part.start : part.end]], 1)


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """x [B, H, t, A] times [B, A, E], one matrix for all queries, or [B, t, A, E], one for each: [B, H, t, E]."""
    if matrix.dim() == 3:
        return (x.flatten(1, 2) @ matrix).unflatten(1, x.shape[1:3])
    return (x.transpose(1, 2) @ matrix).transpose(1, 2)
