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


class Sharing(LowRank):
    """An update that reads its input through another's A, which stays the other's parameter: B alone is its own."""

    def __init__(self, leader: LowRank, outputs: int, *, scale: float):
        nn.Module.__init__(self)
        self.scale, self.dropout = scale, leader.dropout
        self._leader = (leader,)  # in a tuple, so that it is no child of this module
        self.B = nn.Parameter(leader.A.new_empty(outputs, leader.A.shape[0]))

    @property
    def A(self) -> Tensor:  # type: ignore[override]
        return self._leader[0].A

    def reset(self, generator: torch.Generator) -> None:
        nn.init.zeros_(self.B)


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
        update = self.lora[name]
        assert isinstance(update, LowRank)
        dropped = F.dropout(x, update.dropout) if update.dropout and self.training else x
        if dropped is x and isinstance(self.base, Linear) and not self.base.weight.requires_grad:
            return adapted_linear(x, self.base.weight, self.base.bias, update.A, update.B, update.scale)
        return self.base(x, step) + update.scale * F.linear(F.linear(dropped, update.A), update.B)


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """x W^T + bias + scale * (x A^T) B^T for a frozen W and bias. x [..., in], W [out, in], A [R, in], B [out, R]."""
    return _AdaptedLinear.apply(x, weight, bias, A, B, scale)


class _AdaptedLinear(torch.autograd.Function):
    """The sums are made inside the products, so that no pass over the activations is spent on adding."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ A.t()
        y = F.linear(flat, weight, bias).addmm_(inner, B.t(), alpha=scale)
        ctx.save_for_backward(flat, inner, weight, A, B)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        flat, inner, weight, A, B = ctx.saved_tensors
        need_x, _, _, need_A, need_B, _ = ctx.needs_input_grad
        out = grad.reshape(-1, grad.shape[-1])
        down = (out @ B).mul_(ctx.scale)
        grad_x = (out @ weight).addmm_(down, A).view(ctx.shape) if need_x else None
        return grad_x, None, None, down.t() @ flat if need_A else None, (out.t() @ inner).mul_(ctx.scale) if need_B else None, None
