"""A linear map with low-rank updates beside it (arXiv:2106.09685): y = base(x) + scale * B (A x)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import TriviumError
from .linear import Linear
from .step import Step


class LowRank(nn.Module):
    """One update: A [R, in], B [out, R], scale; `dropout` is the chance of an input channel to be dropped in training."""

    def __init__(self, inputs: int, outputs: int, *, rank: int, scale: float, dropout: float, like: Tensor):
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.A = nn.Parameter(torch.empty(rank, inputs, dtype=like.dtype, device=like.device))
        self.B = nn.Parameter(torch.empty(outputs, rank, dtype=like.dtype, device=like.device))

    def reset(self, generator: torch.Generator) -> None:
        """A as PEFT draws it (Kaiming uniform with a = sqrt 5), B zero: the model starts unchanged."""
        bound = 1 / math.sqrt(self.A.shape[1])
        drawn = torch.rand(self.A.shape, generator=generator) * 2 * bound - bound
        with torch.no_grad():
            self.A.copy_(drawn)
            self.B.zero_()

    def delta(self) -> Tensor:
        """The update as a full matrix [out, in], float32."""
        return self.scale * (self.B.float() @ self.A.float())


class AdaptedLinear(nn.Module):
    """`base` and its updates by name. A row of the batch uses the adapter that the step's `adapters` numbers; without
    `adapters`, the model's one adapter. `numbered` is told the model's adapters in order, this map's own or not."""

    def __init__(self, base: Linear):
        super().__init__()
        self.base = base
        self.lora = nn.ModuleDict()
        self.order: tuple[str, ...] = ()

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def numbered(self, order: tuple[str, ...]) -> None:
        self.order = order

    def forward(self, x: Tensor, step: Step) -> Tensor:
        if step.adapters is None:
            if len(self.order) > 1:
                raise TriviumError(f"several adapters are loaded ({', '.join(self.order)}): say which each row uses with Inputs.adapters")
            return self._adapted(x, step, self.order[0])
        y = self.base(x, step)
        for number, rows in step.adapter_rows:
            if number >= len(self.order):
                raise TriviumError(f"adapter {number} was asked for, but {len(self.order)} are loaded: {', '.join(self.order)}")
            if self.order[number] in self.lora:
                y = y.index_copy(0, rows, self._adapted(x[rows], step, self.order[number]))
        return y

    def _adapted(self, x: Tensor, step: Step, name: str) -> Tensor:
        update, y = self.lora[name], self.base(x, step)
        assert isinstance(update, LowRank)
        if update.dropout and self.training:
            x = F.dropout(x, update.dropout)
        return low_rank(y, x, update.A, update.B, update.scale)


def low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + scale * (x A^T) B^T, with y overwritten. y [..., out], x [..., in], A [R, in], B [out, R]."""
    return _LowRank.apply(y, x, A, B, scale)


class _LowRank(torch.autograd.Function):
    """Fused additions: one pass over y instead of three. `naive` in the tests is the oracle."""

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ A.t()
        y.view(-1, y.shape[-1]).addmm_(inner, B.t(), alpha=scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(flat, inner, A, B)
        ctx.scale, ctx.shape = scale, x.shape
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, None]:
        flat, inner, A, B = ctx.saved_tensors
        _, need_x, need_A, need_B, _ = ctx.needs_input_grad
        out = grad.reshape(-1, grad.shape[-1])
        down = out @ B
        grad_x = ctx.scale * (down @ A) if need_x else None
        grad_A = ctx.scale * (down.t() @ flat) if need_A else None
        grad_B = ctx.scale * (out.t() @ inner) if need_B else None
        return grad, None if grad_x is None else grad_x.view(ctx.shape), grad_A, grad_B, None
