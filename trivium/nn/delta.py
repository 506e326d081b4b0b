"""Gated DeltaNet: a matrix of memory that each token lets fade, corrects at its key, and reads at its query.

S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T: the delta rule (arXiv:2406.06484) with a decay
(arXiv:2412.06464). In training a chunk's corrections, each of which depends on those before it, are found at once by
solving a triangular system (the WY form); decoding takes one step at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, SerializeAsAny, model_validator
from torch import Tensor

from .attention import Mixer, MixerModule
from .chunks import Decay, chunk_size, decays, from_chunks, in_chunks
from .keepers import Fixed, State
from .linear import Linear, Projections
from .linear_attention import extents
from .norms import RMS, Norm
from .products import Product
from .recurrent import States, recur
from .short_conv import ShortConv
from .step import Step
from .store import Handle


class GatedDelta(Mixer):
    """Queries and keys of length one, values, all after a short convolution; beta = sigmoid; decay as Mamba-2's; the heads'
    outputs normed and gated by SiLU. Each key head serves `value_heads / key_heads` value heads. It reads left to right, in a
    causal model or not."""

    kind: Literal["gated_delta"] = "gated_delta"
    key_heads: int = Field(gt=0, description="query and key heads")
    value_heads: int = Field(gt=0, description="value heads, a multiple of key_heads: each has a memory of its own")
    key_dim: int = Field(gt=0, description="width of a query or key head")
    value_dim: int = Field(gt=0, description="width of a value head")
    kernel: int = Field(4, gt=0, description="inputs that the short convolution sees, the token's own included")
    norm: SerializeAsAny[Norm] = Field(RMS(eps=1e-6), description="the norm of each head's output, before its gate")

    @classmethod
    def tiny(cls) -> GatedDelta:
        return cls(key_heads=2, value_heads=4, key_dim=6, value_dim=5, kernel=3)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.value_heads % self.key_heads:
            raise ValueError(f"value_heads ({self.value_heads}) must be a multiple of key_heads ({self.key_heads})")
        return self

    def build(self, dim: int) -> MixerModule:
        return GatedDeltaMixer(self, dim)


class GatedDeltaMixer(MixerModule):
    def __init__(self, spec: GatedDelta, dim: int):
        super().__init__()
        self.spec = spec
        keys, values = spec.key_heads * spec.key_dim, spec.value_heads * spec.value_dim
        widths = {"q": keys, "k": keys, "v": values, "gate": values, "beta": spec.value_heads, "decay": spec.value_heads}
        self.inp = Projections(**{name: Linear(dim, width) for name, width in widths.items()})
        self.conv = ShortConv(2 * keys + values, spec.kernel, bias=False)
        self.decay = Decay(spec.value_heads)
        self.norm = spec.norm.build(spec.value_dim)
        self.out = Linear(values, dim)

    def state(self) -> State:
        spec = self.spec
        return {**self.conv.state(), "memory": Fixed((spec.value_heads, spec.key_dim, spec.value_dim), torch.float32)}

    def forward(self, x: Tensor, step: Step, handle: Handle) -> Tensor:
        spec = self.spec
        q, k, v, gate, beta, decay = self.inp(x, step)
        mixed = self.conv(torch.cat([q, k, v], -1), step, handle)
        q, k, v = mixed.split([q.shape[-1], k.shape[-1], v.shape[-1]], -1)
        _, log_decay = self.decay(decay)
        q, k = unit(q.unflatten(-1, (-1, spec.key_dim))) * spec.key_dim**-0.5, unit(k.unflatten(-1, (-1, spec.key_dim)))
        inputs = (q, k, v.unflatten(-1, (-1, spec.value_dim)), log_decay, beta.float().sigmoid())
        y = recur(_scan, inputs, ("memory",), step, handle, mixer=spec.kind).to(x.dtype)
        y = self.norm(y) * F.silu(gate.float()).view(y.shape)
        return self.out(y.to(x.dtype).flatten(-2), step)

    def products(self, step: Step, flows: Mapping[str, bool]) -> list[Product]:
        fades = self.decay.A_log.requires_grad or flows["decay"]
        # one convolution of q, k and v: autograd takes gradients of all where it takes any
        moved = self.conv.weight.requires_grad or any(flows[name] for name in "qkv")
        made: list[Product] = []
        for rows, length in extents(step):
            made += self._products(rows, length, moved=moved, fresh=moved or fades or flows["beta"], fades=fades)
        return made

    def _products(self, rows: int, length: int, *, moved: bool, fresh: bool, fades: bool) -> list[Product]:
        """Of one scan. `moved`: q, k and v have gradients; `fresh`: so has what tokens write."""
        spec, size = self.spec, chunk_size(length)
        count = -(-length // size)
        every = 2 * rows * spec.value_heads * spec.key_dim * spec.value_dim  # one read or write of all memories
        if length == 1:
            return [Product(every, moved, fades), Product(every, moved, fresh)]
        square, both = 2 * rows * count * size * size, spec.key_dim + spec.value_dim
        return [
            *[Product(square * spec.key_heads * spec.key_dim, moved, moved)] * 2,
            Solve(0, fresh, right=False, gradient=square * spec.value_heads * both),
            Product(square * spec.value_heads * spec.value_dim, moved or fades, fresh),
            *(Product(every * size * (count - 1), left, fresh) for left in (fresh, moved, moved)),  # what one chunk leaves to the next
            Product(every * size, left=False, right=False),  # and the last one, which nothing reads
        ]


@dataclass(frozen=True)
class Solve(Product):
    """A triangular system: solving it is not counted as a product, but the gradient of its matrix (`left`) is one."""

    gradient: int = 0

    @property
    def backward(self) -> int:
        return self.gradient * self.left


def unit(x: Tensor) -> Tensor:
    """x over its length, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _scan(inputs: tuple[Tensor, ...], states: States | None) -> tuple[Tensor, States]:
    q, k, v, log_decay, beta = inputs
    form = recurrent_gated_delta if v.shape[1] == 1 else chunked_gated_delta
    y, memory = form(q, k, v, log_decay, beta, None if states is None else states[0])
    return y, (memory,)


def recurrent_gated_delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token after the other: q and k [N, L, K, D], v [N, L, H, E], log_decay and beta [N, L, H], H a multiple of K;
    memory [N, H, D, E], None: zero. Returns y [N, L, H, E] and the memory after the last token, in float32."""
    shared = v.shape[2] // k.shape[2]
    q, k = (x.float().repeat_interleave(shared, 2) for x in (q, k))
    v, kept, beta = v.float(), log_decay.float().exp(), beta.float()
    if memory is None:
        memory = v.new_zeros(*v.shape[:1], *k.shape[2:], v.shape[-1])
    outputs = []
    for t in range(v.shape[1]):
        memory = memory * kept[:, t, :, None, None]
        known = (k[:, t, :, None] @ memory).squeeze(-2)
        memory = memory + k[:, t, :, :, None] * ((v[:, t] - known) * beta[:, t, :, None])[:, :, None]
        outputs.append((q[:, t, :, None] @ memory).squeeze(-2))
    return torch.stack(outputs, 1), memory


def chunked_gated_delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, memory: Tensor | None = None, *, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The same in chunks of `size` tokens (None: `chunk_size`). With G the log decay since a chunk's start and S the memory
    there, the values that the chunk's tokens write are U - W S, where (I + L) [U W] = beta [v, exp(G) k] and L is the strictly
    lower part of beta_i (k_i . k_j) exp(G_i - G_j) (arXiv:2412.06464, section 3.3)."""
    (length, heads), size, groups = v.shape[1:3], size or chunk_size(v.shape[1]), k.shape[2]
    q, k = (in_chunks(x, size, groups) for x in (q, k))  # [N, n, K, 1, C, D]
    v, log_decay, beta = (in_chunks(x, size, groups) for x in (v, log_decay, beta))  # [N, n, K, H / K, C, (E)]
    beta, (between, since, until) = beta[..., None], decays(log_decay)
    right = torch.cat([v, k * since], -1) * beta
    solved = torch.linalg.solve_triangular((k @ k.mT) * between * beta, right, upper=False, unitriangular=True)
    own, read = solved.split([v.shape[-1], k.shape[-1]], -1)
    scores, q, k = (q @ k.mT) * between, q.squeeze(3), k.squeeze(3)
    state = None if memory is None else memory.float().unflatten(1, (groups, heads // groups))
    outputs = []
    chunks = (x.unbind(1) for x in (q, k, own, read, scores, since, until))  # a slice's gradient would be as large as all of them
    for q_i, k_i, own_i, read_i, scores_i, since_i, until_i in zip(*chunks, strict=True):
        written = own_i if state is None else own_i - read_i @ state
        y = scores_i @ written
        left = torch.einsum("zgtd,zgrte->zgrde", k_i, written * until_i)
        if state is not None:
            y = y + torch.einsum("zgtd,zgrde->zgrte", q_i, state) * since_i
            left = left + state * since_i[..., -1:, :]
        state = left
        outputs.append(y)
    assert state is not None
    return from_chunks(torch.stack(outputs, 1), length), state.flatten(1, 2)
