"""What adapters put into a model: an `Update` at each place, held by name in an `Adapted` module that picks each row's own.

`AdaptedLinear` stands where a linear map stood; its plainest update is of low rank (arXiv:2106.09685):
y = base(x) + scale * B (A x). Updates that start from the base's own weights (PiSSA arXiv:2404.02948, OLoRA
arXiv:2406.01775) subtract what they started from, so that the base never changes. Others: nn/adapted_*.py.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import TriviumError
from .linear import Linear, Source
from .products import Multiplies, Product
from .step import Step

Start = Literal["kaiming", "gaussian", "pissa", "olora"]


class Update(nn.Module):
    """What one adapter puts at one place."""

    def reset(self, generator: torch.Generator, host: Adapted, model: nn.Module) -> None:
        """Draw the start; the model then computes what it did, where the method can start so."""
        raise AssertionError


class Adapted(nn.Module):
    """A place that adapters change: their updates by name. A row of the batch uses the adapter that its `adapters` number;
    without numbers, the model's one adapter. `numbered` is told the model's adapters in order, here or elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.order: tuple[str, ...] = ()

    @property
    def updates(self) -> nn.ModuleDict:
        raise AssertionError

    @property
    def key(self) -> str:
        """What the updates stand under in parameters' names."""
        return "adapters"

    def without(self) -> nn.Module | None:
        """What stands here once the last update is taken away."""
        return None

    def numbered(self, order: tuple[str, ...]) -> None:
        self.order = order

    def only(self) -> str:
        """The model's one adapter."""
        if len(self.order) > 1:
            raise TriviumError(f"several adapters are loaded ({', '.join(self.order)}): say which each row uses with Inputs.adapters")
        return self.order[0]

    def named(self, number: int) -> str:
        """The name of adapter `number`."""
        if number >= len(self.order):
            raise TriviumError(f"adapter {number} was asked for, but {len(self.order)} are loaded: {', '.join(self.order)}")
        return self.order[number]

    def chosen(self, step: Step) -> list[tuple[str, Tensor | None]]:
        """The adapters with an update here that this forward uses, and the rows that use each; None: all of them."""
        if step.adapters is None:
            return [(name, None) for name in (self.only(),) if name in self.updates]
        rows = [(self.named(number), rows) for number, rows in step.adapter_rows]
        return [(name, numbers) for name, numbers in rows if name in self.updates]


class Place(Adapted):
    """A place with no module of the model below it: updates stand in it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()

    @property
    def updates(self) -> nn.ModuleDict:
        return self.adapters


class LinearUpdate(Multiplies, Update):
    """An update of a linear map. `merges`: whether some weights of the map compute the same; `replaces`: whether the map itself
    is not run; `inward`: whether what the map reads is changed, and so has a gradient."""

    merges = True
    replaces = False
    inward = False

    def multiplied(self, tokens: int, *, flowing: bool) -> list[Product]:
        """Its products beside the map's own, in their order."""
        return []

    def forward(self, x: Tensor, host: AdaptedLinear, step: Step) -> Tensor:
        """[..., in] -> [..., out]: what the map gives with this update."""
        raise AssertionError

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The float32 weight and bias of the one map that computes the same."""
        raise AssertionError

    def kept(self, weight: Tensor) -> Tensor | None:
        """What undoing a merge needs to know of the base's weight beside this update's parameters; None: nothing."""
        return None

    def unmerged(self, weight: Tensor, bias: Tensor | None, kept: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The float32 weight and bias that `merged` would make these of; `TriviumError` where that cannot be told."""
        raise TriviumError(f"an update of kind {type(self).__name__} cannot be taken out of the weights that it was merged into")


class LowRank(LinearUpdate):
    """One update: A [R, in], B [out, R], scale; `dropout` is the chance of an input channel to be dropped in training."""

    start: Start = "kaiming"

    def __init__(self, inputs: int, outputs: int, *, rank: int, scale: float, dropout: float, like: Tensor, start: Start = "kaiming"):
        super().__init__()
        self.scale, self.dropout, self.start = scale, dropout, start
        self.A = nn.Parameter(torch.empty(rank, inputs, dtype=like.dtype, device=like.device))
        self.B = nn.Parameter(torch.empty(outputs, rank, dtype=like.dtype, device=like.device))

    def reset(self, generator: torch.Generator, host: Adapted, model: nn.Module) -> None:
        """A as PEFT draws it (Kaiming uniform with a = sqrt 5; or normal, with deviation 1 / R), B zero."""
        rank, inputs = self.A.shape
        if self.start == "gaussian":
            drawn = torch.randn(self.A.shape, generator=generator) / rank
        else:
            bound = 1 / math.sqrt(inputs)
            drawn = torch.rand(self.A.shape, generator=generator) * 2 * bound - bound
        with torch.no_grad():
            self.A.copy_(drawn)
            self.B.zero_()

    def blocks(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs (A, B); the sum of their products, scaled, is the update."""
        return [(self.A, self.B)]

    def delta(self) -> Tensor:
        """The update as a full matrix [out, in], float32."""
        return self.scale * torch.stack([B.float() @ A.float() for A, B in self.blocks()]).sum(0)

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout and self.training else x

    def beside(self, x: Tensor) -> Tensor:
        """The update's own product, [..., in] -> [..., out]."""
        return self.scale * F.linear(F.linear(x, self.A), self.B)

    def forward(self, x: Tensor, host: AdaptedLinear, step: Step) -> Tensor:
        dropped, base = self.dropped(x), host.base
        if dropped is x and isinstance(base, Linear) and base.frozen and len(self.blocks()) == 1:
            return adapted_linear(x, base.source, base.bias, self.A, self.B, self.scale)
        return base(x, step) + self.beside(dropped)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.float() + self.delta(), bias

    def unmerged(self, weight: Tensor, bias: Tensor | None, kept: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return weight.float() - self.delta(), bias

    def multiplied(self, tokens: int, *, flowing: bool) -> list[Product]:
        found = []
        for A, B in self.blocks():
            found.append(Product(2 * tokens * A.numel(), flowing, A.requires_grad))
            found.append(Product(2 * tokens * B.numel(), flowing or A.requires_grad, B.requires_grad))
        return found


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

    def reset(self, generator: torch.Generator, host: Adapted, model: nn.Module) -> None:
        nn.init.zeros_(self.B)


class Principal(LowRank):
    """An update that starts as a part of the base's own weights: its largest singular values (PiSSA) or the first columns of
    its QR decomposition (OLoRA). What it started as, `A0` and `B0`, is subtracted, so that the base stays as it is:
    W + scale (B A - B0 A0)."""

    def __init__(self, inputs: int, outputs: int, *, rank: int, scale: float, dropout: float, like: Tensor, start: Start):
        super().__init__(inputs, outputs, rank=rank, scale=scale, dropout=dropout, like=like, start=start)
        self.A0 = nn.Parameter(torch.empty_like(self.A), requires_grad=False)
        self.B0 = nn.Parameter(torch.empty_like(self.B), requires_grad=False)

    @torch.no_grad()
    def reset(self, generator: torch.Generator, host: Adapted, model: nn.Module) -> None:
        assert isinstance(host, AdaptedLinear)
        weight, rank = host.base.weight.float(), len(self.A)
        if self.start == "pissa":
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            root = (values[:rank] / self.scale).sqrt()
            found = root[:, None] * right[:rank], left[:, :rank] * root
        else:
            q, r = torch.linalg.qr(weight)
            found = r[:rank], q[:, :rank]
        for ours, first, tensor in zip((self.A, self.B), (self.A0, self.B0), found, strict=True):
            ours.copy_(tensor)
            first.copy_(ours)

    def blocks(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.A, self.B), (self.A0, -self.B0)]

    def beside(self, x: Tensor) -> Tensor:
        return super().beside(x) - self.scale * F.linear(F.linear(x, self.A0), self.B0)


class AdaptedLinear(Adapted):
    """`base` and its updates by name."""

    def __init__(self, base: Linear):
        super().__init__()
        self.base = base
        self.lora = nn.ModuleDict()

    @property
    def updates(self) -> nn.ModuleDict:
        return self.lora

    @property
    def key(self) -> str:
        return "lora"

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def without(self) -> nn.Module:
        return self.base

    def forward(self, x: Tensor, step: Step) -> Tensor:
        chosen = self.chosen(step)
        if len(chosen) == 1 and chosen[0][1] is None:
            return self.lora[chosen[0][0]](x, self, step)
        y = self.base(x, step)
        for name, rows in chosen:
            y = y.index_copy(0, rows, self.lora[name](x[rows], self, step))
        return y


def adapted_linear(x: Tensor, weight: Source, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """x W^T + bias + scale * (x A^T) B^T for a frozen W and bias. x [..., in], W [out, in], A [R, in], B [out, R]. A W that is
    made for the product is made again in the backward, and not held between."""
    return _AdaptedLinear.apply(x, weight, bias, A, B, scale)


class _AdaptedLinear(torch.autograd.Function):
    """The sums are made inside the products, so that no pass over the activations is spent on adding."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Source, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ A.t()
        dense = weight if isinstance(weight, Tensor) else weight(x.dtype)
        y = F.linear(flat, dense, bias).addmm_(inner, B.t(), alpha=scale)
        ctx.save_for_backward(flat, inner, A, B, *([weight] if isinstance(weight, Tensor) else []))
        ctx.scale, ctx.shape, ctx.weight = scale, x.shape, None if isinstance(weight, Tensor) else weight
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        flat, inner, A, B, *held = ctx.saved_tensors
        need_x, _, _, need_A, need_B, _ = ctx.needs_input_grad
        out = grad.reshape(-1, grad.shape[-1])
        down = (out @ B).mul_(ctx.scale)
        grad_x = None
        if need_x:
            grad_x = (out @ (held[0] if held else ctx.weight(out.dtype))).addmm_(down, A).view(ctx.shape)
        return grad_x, None, None, down.t() @ flat if need_A else None, (out.t() @ inner).mul_(ctx.scale) if need_B else None, None
