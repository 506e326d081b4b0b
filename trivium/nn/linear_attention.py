"""Linear attention (arXiv:2006.16236): phi(q) . phi(k) in the place of exp(q . k), so that sums over keys become a state.

One sum, S = sum of phi(k) v^T, written three ways: `parallel` states it over all pairs, `chunked` trains (pairs within a
chunk, the state between chunks), `recurrent` decodes. The normalizer is one more channel of v, which is one. Feature maps
are parts: elu + 1, relu, identity, and random features of the softmax (arXiv:2009.14794). Relative positions are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, SerializeAsAny, model_validator
from torch import Tensor

from ..core.errors import ConfigError
from ..core.registry import Registry
from ..core.seed import generator
from ..core.spec import Part
from .attention import Mixer, MixerModule
from .backends import gather_documents, scatter_documents
from .keepers import Fixed, State
from .linear import Linear, Projections
from .products import Product
from .recurrent import States, recur
from .step import Step
from .store import Handle

CHUNK = 64  # tokens whose pairs are computed in the training form; changes no result


class FeatureMap(Part, registry=Registry("feature map", "trivium.nn")):
    """Root of the feature maps phi, of queries and keys alike."""

    positive: ClassVar[bool] = True  # whether every feature is at least 0, so that sums of products can be divided by

    def width(self, head_dim: int) -> int:
        """How many features a head of this width has."""
        return head_dim

    def features(self, x: Tensor, step: Step) -> Tensor:
        """[..., D] -> [..., F]."""
        raise AssertionError


class EluFeatures(FeatureMap):
    """elu(x) + 1: positive everywhere, with a gradient everywhere (arXiv:2006.16236)."""

    kind: Literal["elu"] = "elu"

    @classmethod
    def tiny(cls) -> EluFeatures:
        return cls()

    def features(self, x: Tensor, step: Step) -> Tensor:
        return F.relu(x) + x.clamp(max=0).exp()  # F.elu(x) + 1 is 0 far below 0: 1 - 1


class ReluFeatures(FeatureMap):
    """max(0, x) + 0.001, so that no query is without features (the generalized kernel of arXiv:2009.14794)."""

    kind: Literal["relu"] = "relu"

    @classmethod
    def tiny(cls) -> ReluFeatures:
        return cls()

    def features(self, x: Tensor, step: Step) -> Tensor:
        return F.relu(x) + 1e-3


class IdentityFeatures(FeatureMap):
    """x: a fast-weight memory without a normalizer (arXiv:2102.11174)."""

    kind: Literal["identity"] = "identity"
    positive = False

    @classmethod
    def tiny(cls) -> IdentityFeatures:
        return cls()

    def features(self, x: Tensor, step: Step) -> Tensor:
        return x


class SoftmaxFeatures(FeatureMap):
    """Positive random features whose products are exp(q . k / sqrt(D)) on average (FAVOR+, arXiv:2009.14794): with w orthogonal
    Gaussian directions, exp(w . x - |x|^2 / 2) / sqrt(F), x scaled by D^(-1/4). The exponent is at most |w|^2 / 2, about D / 2."""

    kind: Literal["favor"] = "favor"
    count: int = Field(gt=0, description="features; the error of a weight falls as 1 / sqrt(count)")
    seed: int = Field(0, description="of the directions, which are drawn and not trained")

    @classmethod
    def tiny(cls) -> SoftmaxFeatures:
        return cls(count=12)

    def width(self, head_dim: int) -> int:
        return self.count

    def directions(self, head_dim: int) -> Tensor:
        """[F, D] float32: rows orthogonal in groups of D, each as long as a Gaussian vector."""
        source = generator(self.seed, "favor", self.count, head_dim)
        groups = [_rotation(head_dim, source) for _ in range(-(-self.count // head_dim))]
        lengths = torch.randn(self.count, head_dim, generator=source).norm(dim=1, keepdim=True)
        return torch.cat(groups)[: self.count] * lengths

    def features(self, x: Tensor, step: Step) -> Tensor:
        w = step.memo(("favor", self, x.shape[-1], x.device), lambda: self.directions(x.shape[-1]).to(x.device))
        x = x * x.shape[-1] ** -0.25
        return torch.exp(x @ w.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2) * self.count**-0.5


def _rotation(size: int, source: torch.Generator) -> Tensor:
    """A uniformly random orthogonal matrix: without the signs of R's diagonal, Q would lean to one side (arXiv:math-ph/0609050)."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=source))
    return q * r.diagonal().sign()


class LinearAttention(Mixer):
    """phi(q)^T S / (phi(q)^T z), with S the sum of phi(k) v^T and z that of phi(k): causal, or over the whole document where
    the model is not. Decoding keeps S and z alone."""

    kind: Literal["linear_attention"] = "linear_attention"
    heads: int = Field(gt=0, description="heads")
    head_dim: int = Field(gt=0, description="width of one head")
    bias: tuple[Literal["q", "k", "v", "out"], ...] = Field((), description="which maps have a bias")
    features: SerializeAsAny[FeatureMap] = Field(EluFeatures(), description="phi, what is done to queries and keys")
    normalize: bool = Field(True, description="divide by the sum of the weights")
    eps: float = Field(1e-6, gt=0, description="added to that sum")

    @classmethod
    def tiny(cls) -> LinearAttention:
        return cls(heads=4, head_dim=6)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.normalize and not self.features.positive:
            raise ValueError(f"{self.features.kind} features may be negative, so their sum is no divisor: set normalize to false")
        return self

    def build(self, dim: int) -> MixerModule:
        return LinearAttentionMixer(self, dim)


class LinearAttentionMixer(MixerModule):
    def __init__(self, spec: LinearAttention, dim: int):
        super().__init__()
        self.spec = spec
        wide = spec.heads * spec.head_dim
        self.inp = Projections(**{name: Linear(dim, wide, bias=name in spec.bias) for name in "qkv"})
        self.out = Linear(wide, dim, bias="out" in spec.bias)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the state: heads, features, channels of v with the normalizer."""
        spec = self.spec
        return spec.heads, spec.features.width(spec.head_dim), spec.head_dim + spec.normalize

    def state(self) -> State:
        return {"kv": Fixed(self.shape, torch.float32)}

    def products(self, step: Step, flows: Mapping[str, bool]) -> list[Product]:
        spec, (heads, width, channels) = self.spec, self.shape
        q, k, v = (flows[name] for name in "qkv")
        made = []
        if isinstance(spec.features, SoftmaxFeatures):
            flops = 2 * step.inputs.shape.numel() * heads * spec.head_dim * width
            made = [Product(flops, q, False), Product(flops, k, False)]
        if step.causal:
            return made + chunk_products(step, heads, width, channels, flows=(q, k, v), size=CHUNK)
        flops = 2 * heads * width * channels * sum(rows * length for rows, length in extents(step))
        return [*made, Product(flops, k, v), Product(flops, q, k or v)]

    def forward(self, x: Tensor, step: Step, handle: Handle) -> Tensor:
        spec = self.spec
        q, k, v = (wide(y.unflatten(-1, (spec.heads, -1))) for y in self.inp(x, step))  # [B, T, H, D]
        q, k = (spec.features.features(y, step) for y in (q, k))
        if spec.normalize:
            v = F.pad(v, (0, 1), value=1.0)
        if step.causal:
            y = recur(_scan, (q, k, v), ("kv",), step, handle, mixer=spec.kind)
        else:
            refuse_cache(step, spec.kind)
            y = each_document(_together, (q, k, v), step)
        if spec.normalize:
            y = y[..., :-1] / (y[..., -1:] + spec.eps)
        return self.out(y.flatten(-2).to(x.dtype), step)


def _scan(inputs: tuple[Tensor, ...], states: States | None) -> tuple[Tensor, States]:
    q, k, v = inputs
    state = None if states is None else states[0].to(q.dtype)
    y, state = recurrent(q, k, v, state) if q.shape[1] == 1 else chunked(q, k, v, state, size=CHUNK)
    return y, (state,)


def _together(inputs: tuple[Tensor, ...], real: Tensor | None) -> Tensor:
    """Every query over all keys. inputs [N, L, H, *], `real` [N, L]: which places stand for a token."""
    q, k, v = (x.transpose(1, 2) for x in inputs)
    if real is not None:
        k = k * real[:, None, :, None]
    return (q @ (k.transpose(-1, -2) @ v)).transpose(1, 2)


def parallel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The naive statement, causal: q, k [N, T, H, D], v [N, T, H, E] -> [N, T, H, E]; all T x T pairs."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(-1, -2)).tril() @ v).transpose(1, 2)


def recurrent(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same token by token, from `state` [N, H, D, E] or zero; returns the outputs and the state after the last."""
    outputs = []
    for q_t, k_t, v_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True):
        added = k_t[..., :, None] * v_t[..., None, :]
        state = added if state is None else state + added
        outputs.append((q_t[..., None, :] @ state)[..., 0, :])
    assert state is not None
    return torch.stack(outputs, 1), state


def chunked(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, *, size: int) -> tuple[Tensor, Tensor]:
    """The same in chunks of `size` tokens: pairs within each, the state for all that came before."""
    count = q.shape[1]
    q, k, v = (into_chunks(x, size) for x in (q, k, v))  # [N, H, M, L, *]
    y = (q @ k.transpose(-1, -2)).tril() @ v
    added = k.transpose(-1, -2) @ v  # [N, H, M, D, E]
    if state is None and added.shape[2] == 1:
        return out_of_chunks(y, count), added[:, :, 0]
    before = F.pad(added, (0, 0, 0, 0, 1, 0)).cumsum(2)
    if state is not None:
        before = before + state[:, :, None]
    return out_of_chunks(y + q @ before[:, :, :-1], count), before[:, :, -1]


def into_chunks(x: Tensor, size: int) -> Tensor:
    """[N, T, H, D] -> [N, H, M, L, D], L the lesser of `size` and T; what the last chunk lacks is zero."""
    size = min(size, x.shape[1])
    return F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4)


def out_of_chunks(y: Tensor, count: int) -> Tensor:
    """[N, H, M, L, E] -> [N, T, H, E]."""
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :count]


def wide(x: Tensor) -> Tensor:
    """At least float32: states add up what every token brings."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def extents(step: Step) -> list[tuple[int, int]]:
    """Rows and length of each of the scans that a step without uneven rows takes."""
    if step.segments is None:
        return [(step.inputs.shape[0], step.count)]
    return [(group.slots.shape[0], group.slots.shape[1]) for group in step.documents.groups]


def chunk_products(
    step: Step, heads: int, width: int, channels: int, *, flows: tuple[bool, bool, bool], size: int, pairs: bool = True
) -> list[Product]:
    """The products of a chunked scan with a state of `width` x `channels` a head. `flows`: whether q, k, v have gradients.
    `pairs`: whether scores within a chunk are a product of two matrices."""
    q, k, v = flows
    made = []
    for rows, length in extents(step):
        if length == 1:
            made.append(Product(2 * rows * heads * width * channels, q, k or v))
            continue
        inside = min(size, length)
        chunks = -(-length // inside)
        tokens, follows = rows * heads * chunks * inside, chunks > 1 or step.slots.start > 0
        if pairs:
            made.append(Product(2 * tokens * inside * width, q, k))
        made.append(Product(2 * tokens * inside * channels, q or k, v))
        made.append(Product(2 * tokens * width * channels, k and chunks > 1, v and chunks > 1))
        if follows:
            made.append(Product(2 * tokens * width * channels, q, k or v))
    return made


def each_document(run: Callable[[tuple[Tensor, ...], Tensor | None], Tensor], inputs: Sequence[Tensor], step: Step) -> Tensor:
    """`run(inputs [N, L, ...], real [N, L] or None) -> [N, L, ...]` over each document apart, those of like length together.
    `real`: which places stand for a token; None: all. Without a cache; inputs and result are [B, T, ...]."""
    if step.segments is None:
        return run(tuple(inputs), None)
    documents = step.documents
    flat = [gather_documents(x.flatten(0, 1), documents) for x in inputs]
    outputs, base = [], 0
    for group in documents.groups:
        rows, length = group.slots.shape
        part = tuple(x[base : base + rows * length].unflatten(0, (rows, length)) for x in flat)
        real = torch.arange(length, device=flat[0].device) < group.lengths[:, None] if group.ragged else None
        outputs.append(run(part, real).flatten(0, 1))
        base += rows * length
    return scatter_documents(torch.cat(outputs), documents).unflatten(0, tuple(step.inputs.shape))


def refuse_cache(step: Step, kind: str) -> None:
    if step.inputs.cache is not None:
        raise ConfigError(
            f"a {kind!r} mixer that is not causal sees all tokens at once: give them in one forward without a cache", field="cache"
        )
