"""Mamba-2: a state space model whose decay is one number a head, so that a chunk is a masked attention (its duality).

S_t = exp(g_t) S_{t-1} + B_t (dt_t x_t)^T, y_t = S_t^T C_t + D x_t, with g_t = -exp(A_log) dt_t. Chunks in training, one step at
a time in decoding; heads share B and C in groups. arXiv:2405.21060.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from .attention import Mixer, MixerModule
from .chunks import Decay, chunk_size, decays, from_chunks, in_chunks
from .keepers import Fixed, State
from .linear import Linear, OwnStart, Projections
from .linear_attention import extents
from .products import Product
from .recurrent import States, recur
from .short_conv import ShortConv
from .step import Step
from .store import Handle


class Mamba2(Mixer):
    """One map gives gate, x, B, C and dt; x, B and C go through a short convolution; what the heads read is multiplied by
    SiLU of the gate and normed, each group alone. It reads left to right, in a causal model or not."""

    kind: Literal["mamba2"] = "mamba2"
    heads: int = Field(gt=0, description="heads, each with a decay of its own")
    head_dim: int = Field(gt=0, description="width of one head")
    states: int = Field(128, gt=0, description="width of B and C: a head's state is states x head_dim")
    groups: int = Field(1, gt=0, description="how many B and C there are, each shared by heads / groups heads")
    kernel: int = Field(4, gt=0, description="inputs that the short convolution sees, the token's own included")
    conv_bias: bool = Field(True, description="whether the convolution has a bias")
    bias: bool = Field(False, description="whether the maps in and out have biases")
    eps: float = Field(1e-5, gt=0, description="added to the mean square in the norm before the map out")
    dt_min: float = Field(0.0, ge=0, description="the least dt")
    dt_max: float | None = Field(None, gt=0, description="the greatest dt")

    @classmethod
    def tiny(cls) -> Mamba2:
        return cls(heads=4, head_dim=5, states=6, groups=2, kernel=3)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.heads % self.groups:
            raise ValueError(f"heads ({self.heads}) must be a multiple of groups ({self.groups})")
        return self

    def build(self, dim: int) -> MixerModule:
        return Mamba2Mixer(self, dim)


class Mamba2Mixer(MixerModule):
    def __init__(self, spec: Mamba2, dim: int):
        super().__init__()
        self.spec = spec
        inner, shared = spec.heads * spec.head_dim, spec.groups * spec.states
        widths = {"gate": inner, "x": inner, "B": shared, "C": shared, "dt": spec.heads}
        self.inp = Projections(**{name: Linear(dim, width, bias=spec.bias) for name, width in widths.items()})
        self.conv = ShortConv(inner + 2 * shared, spec.kernel, bias=spec.conv_bias)
        self.decay = Decay(spec.heads, (spec.dt_min, spec.dt_max))
        self.skip = Skip(spec.heads)
        self.norm = GroupedNorm(inner, spec.groups, spec.eps)
        self.out = Linear(inner, dim, bias=spec.bias)

    def state(self) -> State:
        spec = self.spec
        return {**self.conv.state(), "memory": Fixed((spec.heads, spec.states, spec.head_dim), torch.float32)}

    def forward(self, x: Tensor, step: Step, handle: Handle) -> Tensor:
        spec = self.spec
        gate, given, b, c, dt = self.inp(x, step)
        mixed = self.conv(torch.cat([given, b, c], -1), step, handle)
        given, b, c = mixed.split([given.shape[-1], b.shape[-1], c.shape[-1]], -1)
        dt, log_decay = self.decay(dt)
        given = given.float().unflatten(-1, (-1, spec.head_dim))
        b, c = b.unflatten(-1, (-1, spec.states)), c.unflatten(-1, (-1, spec.states))
        y = recur(_scan, (c, b, given * dt[..., None], log_decay), ("memory",), step, handle, mixer=spec.kind)
        y = (y + self.skip(given)).flatten(-2)
        return self.out(self.norm(y * F.silu(gate.float()), x.dtype), step)

    def products(self, step: Step, flows: Mapping[str, bool]) -> list[Product]:
        spec, fades = self.spec, self.decay.A_log.requires_grad or flows["dt"]
        # one convolution of all three: autograd takes gradients of all where it takes any
        moved = any(flows[name] for name in ("x", "B", "C")) or any(parameter.requires_grad for parameter in self.conv.parameters())
        x = moved or flows["dt"] or self.decay.dt_bias.requires_grad
        made: list[Product] = []
        for rows, length in extents(step):
            size, every = chunk_size(length), 2 * rows * spec.heads * spec.states * spec.head_dim  # a read of all memories
            if length == 1:
                made.append(Product(every, moved, x or fades))
                continue
            count = -(-length // size)
            square, later = 2 * rows * count * size * size, count > 1
            made += [
                Product(square * spec.groups * spec.states, moved, moved),
                Product(square * spec.heads * spec.head_dim, moved or fades, x),
                Product(every * size * count, moved and later, (x or fades) and later),  # what each chunk leaves
                Product(every * size * count, moved, (x or fades) and later),  # what it reads of those before it
            ]
        return made


class Skip(OwnStart):
    """D * x, each head by its number: [..., H, D] -> [..., H, D] in float32. Starts at one."""

    def __init__(self, heads: int):
        super().__init__()
        self.D = nn.Parameter(torch.empty(heads))

    def forward(self, x: Tensor) -> Tensor:
        return self.D.float()[:, None] * x.float()

    def reset(self) -> None:
        nn.init.ones_(self.D)


class GroupedNorm(OwnStart):
    """RMS norm of each of several groups of channels, one weight a channel: [..., C] float32 -> [..., C] of `dtype`."""

    def __init__(self, channels: int, groups: int, eps: float):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.unflatten(-1, (self.groups, -1))
        normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normal.flatten(-2).to(dtype)

    def reset(self) -> None:
        nn.init.ones_(self.weight)


def _scan(inputs: tuple[Tensor, ...], states: States | None) -> tuple[Tensor, States]:
    q, k, v, log_decay = inputs
    form = recurrent_decay if v.shape[1] == 1 else chunked_decay
    y, memory = form(q, k, v, log_decay, None if states is None else states[0])
    return y, (memory,)


def recurrent_decay(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T and y_t = S_t^T q_t, one token after the other: q and k [N, L, K, D], v [N, L, H, E],
    log_decay [N, L, H], H a multiple of K; memory [N, H, D, E], None: zero. Returns y [N, L, H, E] and the memory after
    the last token, in float32."""
    shared = v.shape[2] // k.shape[2]
    q, k = (x.float().repeat_interleave(shared, 2) for x in (q, k))
    v, kept = v.float(), log_decay.float().exp()
    if memory is None:
        memory = v.new_zeros(*v.shape[:1], *k.shape[2:], v.shape[-1])
    outputs = []
    for t in range(v.shape[1]):
        memory = memory * kept[:, t, :, None, None] + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((q[:, t, :, None] @ memory).squeeze(-2))
    return torch.stack(outputs, 1), memory


def chunked_decay(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, memory: Tensor | None = None, *, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The same in chunks of `size` tokens (None: `chunk_size`): within one, scores masked by the decay between places; between
    them, the states at their starts (arXiv:2405.21060, section 6)."""
    (length, heads), size, groups = v.shape[1:3], size or chunk_size(v.shape[1]), k.shape[2]
    q, k = (in_chunks(x, size, groups) for x in (q, k))  # [N, n, K, 1, C, D]
    v, log_decay = (in_chunks(x, size, groups) for x in (v, log_decay))  # [N, n, K, H / K, C, (E)]
    between, since, until = decays(log_decay)
    inside = ((q @ k.mT) * between) @ v
    left = torch.einsum("zngtd,zngrte->zngrde", k.squeeze(3), v * until)
    state = torch.zeros_like(left[:, 0]) if memory is None else memory.float().unflatten(1, (groups, heads // groups))
    starts = []
    for keep, add in zip(since[..., -1:, :].unbind(1), left.unbind(1), strict=True):  # a slice's gradient would be as large as all of them
        starts.append(state)
        state = state * keep + add
    read = torch.einsum("zngtd,zngrde->zngrte", q.squeeze(3), torch.stack(starts, 1)) * since
    return from_chunks(inside + read, length), state.flatten(1, 2)
