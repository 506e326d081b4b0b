"""The token mixer of the MatMul-free language model (arXiv:2406.02528): a gated linear recurrence, elementwise in time.

h_t = f_t h_(t-1) + (1 - f_t) c_t, with f and c maps of the token alone, so that no state is multiplied by a matrix and all
times are computed together by doubling. Free of matrix products at inference once the pass `low_bit` has made the maps
ternary and they are packed; the channel mixer is the gated `mlp` under the same pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from .attention import Mixer, MixerModule
from .keepers import Fixed, State
from .linear import Linear, Projections
from .linear_attention import wide
from .products import Product
from .recurrent import States, recur
from .step import Step
from .store import Handle


class MLGRU(Mixer):
    """out(sigmoid(g) * h), h the recurrence with forget gates sigmoid(f) and candidates silu(c). It reads left to right, in a
    causal model or not."""

    kind: Literal["mlgru"] = "mlgru"
    hidden: int = Field(gt=0, description="width of the state")
    bias: tuple[Literal["f", "c", "g", "out"], ...] = Field((), description="which maps have a bias")

    @classmethod
    def tiny(cls) -> MLGRU:
        return cls(hidden=20, bias=("f",))

    def build(self, dim: int) -> MixerModule:
        return MLGRUMixer(self, dim)


class MLGRUMixer(MixerModule):
    def __init__(self, spec: MLGRU, dim: int):
        super().__init__()
        self.spec = spec
        self.inp = Projections(**{name: Linear(dim, spec.hidden, bias=name in spec.bias) for name in "fcg"})
        self.out = Linear(spec.hidden, dim, bias="out" in spec.bias)

    def state(self) -> State:
        return {"h": Fixed((self.spec.hidden,), torch.float32)}

    def products(self, step: Step, flows: Mapping[str, bool]) -> list[Product]:
        return []

    def forward(self, x: Tensor, step: Step, handle: Handle) -> Tensor:
        f, c, g = self.inp(x, step)
        keep = torch.sigmoid(wide(f))
        h = recur(_scan, (keep, (1 - keep) * F.silu(wide(c))), ("h",), step, handle, mixer=self.spec.kind)
        return self.out(torch.sigmoid(g) * h.to(g.dtype), step)


def _scan(inputs: tuple[Tensor, ...], states: States | None) -> tuple[Tensor, States]:
    keep, add = inputs
    h = linear_scan(keep, add, None if states is None else states[0].to(add.dtype))
    return h, (h[:, -1],)


def recurrent(keep: Tensor, add: Tensor, start: Tensor | None) -> Tensor:
    """The naive statement: h_t = keep_t * h_(t-1) + add_t for keep, add [N, T, ...], from `start` [N, ...] or zero."""
    outputs, h = [], torch.zeros_like(add[:, 0]) if start is None else start
    for t in range(add.shape[1]):
        h = keep[:, t] * h + add[:, t]
        outputs.append(h)
    return torch.stack(outputs, 1)


def linear_scan(keep: Tensor, add: Tensor, start: Tensor | None) -> Tensor:
    """The same for all times together, in log2(T) passes; only its inputs and its result are kept for the backward."""
    if start is not None:
        add = torch.cat([add[:, :1] + keep[:, :1] * start[:, None], add[:, 1:]], 1)
    return _LinearScan.apply(keep, add)


def _doubled(keep: Tensor, add: Tensor) -> Tensor:
    """After a pass, (keep, add) at t stand for the last 1, 2, 4, ... tokens up to t, as one step over them all."""
    span = 1
    while span < add.shape[1]:
        add = torch.cat([add[:, :span], add[:, span:] + keep[:, span:] * add[:, :-span]], 1)
        keep = torch.cat([keep[:, :span], keep[:, span:] * keep[:, :-span]], 1)
        span *= 2
    return add


class _LinearScan(torch.autograd.Function):
    """The gradient of a linear recurrence is one that runs the other way."""

    @staticmethod
    def forward(ctx, keep: Tensor, add: Tensor) -> Tensor:
        h = _doubled(keep, add)
        ctx.save_for_backward(keep, h)
        return h

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        keep, h = ctx.saved_tensors
        later = torch.cat([torch.zeros_like(keep[:, :1]), keep.flip(1)[:, :-1]], 1)
        grad_add = _doubled(later, grad.flip(1)).flip(1)
        grad_keep = torch.cat([torch.zeros_like(h[:, :1]), grad_add[:, 1:] * h[:, :-1]], 1)
        return grad_keep, grad_add
