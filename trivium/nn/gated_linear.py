"""Linear attention that forgets: gated linear attention (arXiv:2312.06635) and retention (arXiv:2307.08621).

The state decays before each token is added, S_t = a_t S_(t-1) + k_t v_t^T: by a gate for each key channel that reads the token,
or by a constant for each head. Decays are logarithms, at most 0, and are only ever summed over stretches of tokens, never
subtracted, so that no decay is too strong. Both read left to right, in a causal model or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, SerializeAsAny
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .attention import Mixer, MixerModule
from .keepers import Fixed, State
from .linear import Linear, Projections
from .linear_attention import chunk_products, into_chunks, out_of_chunks, wide
from .norms import RMS, Norm
from .positions import Rope
from .products import Product
from .recurrent import States, recur
from .step import Step
from .store import Handle


class Forgetting(Mixer):
    """What gated linear attention and retention share."""

    heads: int = Field(gt=0, description="heads")
    key_dim: int = Field(gt=0, description="width of a head's queries and keys")
    value_dim: int = Field(gt=0, description="width of a head's values")
    norm: SerializeAsAny[Norm] = Field(RMS(), description="the norm of what each head gives, one for all heads")


class GatedLinear(Forgetting):
    """Gated linear attention: each key channel's decay is sigmoid(gate) ** (1 / temperature), a low-rank map of the token."""

    kind: Literal["gated_linear"] = "gated_linear"
    gate_rank: int = Field(16, gt=0, description="rank of the map that gives the decays")
    temperature: float = Field(16.0, gt=0, description="what the decays' logarithms are divided by; higher forgets more slowly")

    @classmethod
    def tiny(cls) -> GatedLinear:
        return cls(heads=3, key_dim=4, value_dim=8, gate_rank=5, temperature=2.0)

    def build(self, dim: int) -> MixerModule:
        return GatedLinearMixer(self, dim)


class Retention(Forgetting):
    """Retention: head h keeps 1 - 2^(-5 - h) of its state at each token; queries and keys turn with their positions. The
    paper's row normalizers are left out: the norm of each head undoes them."""

    kind: Literal["retention"] = "retention"
    position: Rope | None = Field(Rope(), description="how queries and keys turn")

    @classmethod
    def tiny(cls) -> Retention:
        return cls(heads=3, key_dim=4, value_dim=8, position=Rope(base=50.0))

    def build(self, dim: int) -> MixerModule:
        return RetentionMixer(self, dim)


class ForgettingMixer(MixerModule):
    """Maps, scan, norm of each head, a swish gate. `size`: tokens of a chunk in the training form; it changes no result."""

    size = 64

    def __init__(self, spec: Forgetting, dim: int, further: Mapping[str, int]):
        super().__init__()
        keys, values = spec.heads * spec.key_dim, spec.heads * spec.value_dim
        widths = {"q": keys, "k": keys, "v": values, "gate": values, **further}
        self.kind, self.heads = spec.kind, spec.heads
        self.shape = (spec.heads, spec.key_dim, spec.value_dim)
        self.inp = Projections(**{name: Linear(dim, width) for name, width in widths.items()})
        self.norm = spec.norm.build(spec.value_dim)
        self.out = Linear(values, dim)

    def state(self) -> State:
        return {"kv": Fixed(self.shape, torch.float32)}

    def retain(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, step: Step, handle: Handle) -> Tensor:
        """q, k [B, T, H, D], v [B, T, H, E], decay [B, T, H, D or 1] -> [B, T, H, E]."""
        inputs = (wide(q) * q.shape[-1] ** -0.5, wide(k), wide(v), decay)
        return recur(partial(_scan, size=self.size), inputs, ("kv",), step, handle, mixer=self.kind)

    def finish(self, y: Tensor, gate: Tensor, step: Step) -> Tensor:
        y = self.norm(y.to(gate.dtype)).flatten(-2)
        return self.out(y * F.silu(gate), step)

    def split(self, x: Tensor) -> Tensor:
        """[B, T, H * D] -> [B, T, H, D]."""
        return x.unflatten(-1, (self.heads, -1))


class GatedLinearMixer(ForgettingMixer):
    size = 16  # pairs are computed channel by channel

    def __init__(self, spec: GatedLinear, dim: int):
        super().__init__(spec, dim, {"decay": spec.gate_rank})
        self.spec = spec
        self.decay = Linear(spec.gate_rank, spec.heads * spec.key_dim, bias=True)

    def products(self, step: Step, flows: Mapping[str, bool]) -> list[Product]:
        decay = flows["decay"] or any(p.requires_grad for p in self.decay.parameters())
        q, k = flows["q"] or decay, flows["k"] or decay
        return chunk_products(step, *self.shape, flows=(q, k, flows["v"]), size=self.size, pairs=False)

    def forward(self, x: Tensor, step: Step, handle: Handle) -> Tensor:
        q, k, v, gate, low = self.inp(x, step)
        decay = self.split(F.logsigmoid(wide(self.decay(low, step))) / self.spec.temperature)
        return self.finish(self.retain(self.split(q), self.split(k), self.split(v), decay, step, handle), gate, step)


class RetentionMixer(ForgettingMixer):
    def __init__(self, spec: Retention, dim: int):
        super().__init__(spec, dim, {})
        self.spec = spec

    def products(self, step: Step, flows: Mapping[str, bool]) -> list[Product]:
        return chunk_products(step, *self.shape, flows=(flows["q"], flows["k"], flows["v"]), size=self.size)

    def forward(self, x: Tensor, step: Step, handle: Handle) -> Tensor:
        q, k, v, gate = self.inp(x, step)
        q, k, v = self.split(q), self.split(k), self.split(v)
        if self.spec.position is not None:
            q, k = (self.spec.position.turn(y.transpose(1, 2), step).transpose(1, 2) for y in (q, k))
        decay = retention_decays(self.heads, x.device).to(wide(x).dtype)[:, None].expand(*x.shape[:2], -1, -1)
        return self.finish(self.retain(q, k, v, decay, step, handle), gate, step)


def retention_decays(heads: int, device: torch.device) -> Tensor:
    """log(1 - 2^(-5 - h)) [H], float64."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, dtype=torch.float64, device=device)))


def _scan(inputs: tuple[Tensor, ...], states: States | None, *, size: int) -> tuple[Tensor, States]:
    q, k, v, decay = inputs
    state = None if states is None else states[0].to(q.dtype)
    y, state = recurrent(q, k, v, decay, state) if q.shape[1] == 1 else chunked(q, k, v, decay, state, size=size)
    return y, (state,)


def recurrent(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The naive statement, token by token: q, k [N, T, H, D], v [N, T, H, E], log decays [N, T, H, D or 1] at most 0, `state`
    [N, H, D, E] or None for zero -> outputs [N, T, H, E] and the state after the last."""
    outputs = []
    for t in range(q.shape[1]):
        added = k[:, t, :, :, None] * v[:, t, :, None, :]
        state = added if state is None else state * decay[:, t, :, :, None].exp() + added
        outputs.append((q[:, t, :, None, :] @ state)[..., 0, :])
    assert state is not None
    return torch.stack(outputs, 1), state


def chunked(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None, *, size: int) -> tuple[Tensor, Tensor]:
    """The same in chunks of `size` tokens: pairs within each, the state for all that came before."""
    count = q.shape[1]
    q, k, v, decay = (into_chunks(x, size) for x in (q, k, v, decay))  # [N, H, M, L, *]
    y = _scores(q, k, decay) @ v
    to_end = F.pad(decay[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)  # over the tokens after each
    added = (k * to_end.exp()).transpose(-1, -2) @ v  # [N, H, M, D, E]
    if state is None and added.shape[2] == 1:
        return out_of_chunks(y, count), added[:, :, 0]
    from_start = decay.cumsum(-2)
    held, before = torch.zeros_like(added[:, :, 0]) if state is None else state, []
    kept = from_start[..., -1, :, None].exp()
    for keep, add in zip(kept.unbind(2), added.unbind(2), strict=True):  # a slice's gradient would be as large as all of them
        before.append(held)
        held = held * keep + add
    return out_of_chunks(y + (q * from_start.exp()) @ torch.stack(before, 2), count), held


def between(decay: Tensor) -> Tensor:
    """[..., L, D] -> [..., L, L, D]: at [i, j] the sum of the decays after j up to i, -inf where j is later than i. Summed, since
    the difference of two long sums has lost what a short one is."""
    size = decay.shape[-2]
    later = torch.ones(size, size, dtype=torch.bool, device=decay.device).tril(-1)[..., None]
    sums = torch.where(later, decay[..., :, None, :], 0.0).cumsum(-3)
    return sums.masked_fill(~(later | torch.eye(size, dtype=torch.bool, device=decay.device)[..., None]), float("-inf"))


def _scores(q: Tensor, k: Tensor, decay: Tensor) -> Tensor:
    """q, k [..., L, D], decay [..., L, D or 1] -> [..., L, L], zero where a key is later."""
    if decay.shape[-1] == 1:
        return q @ k.transpose(-1, -2) * between(decay)[..., 0].exp()
    if torch.is_grad_enabled():  # L channels for each channel of a token are too many to keep
        return checkpoint(_channels, q, k, decay, use_reentrant=False, preserve_rng_state=False)
    return _channels(q, k, decay)


def _channels(q: Tensor, k: Tensor, decay: Tensor) -> Tensor:
    return (q[..., :, None, :] * k[..., None, :, :] * between(decay).exp()).sum(-1)
