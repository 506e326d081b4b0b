"""Activations of feed-forward parts, elementwise."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..core.registry import Registry
from ..core.spec import Part
from ..kernels import functions, native
from .linear import OwnStart


class Activation(Part, registry=Registry("activation", "trivium.nn")):
    """Root of the activations: `build()` gives a module `[...] -> [...]`. A bare name is a spec: `activation: silu`."""

    def build(self) -> nn.Module:
        raise AssertionError


class SiLU(Activation):
    """x * sigmoid(x) (arXiv:1710.05941 with beta = 1; Elfwing et al. 2017)."""

    kind: Literal["silu"] = "silu"

    @classmethod
    def tiny(cls) -> SiLU:
        return cls()

    def build(self) -> nn.Module:
        return nn.SiLU()


class Swish(Activation):
    """x * sigmoid(beta * x) with one beta for the layer (arXiv:1710.05941): 0 gives x / 2, a large one ReLU."""

    kind: Literal["swish"] = "swish"
    beta: float = Field(1.0, description="where beta starts")
    trained: bool = Field(True, description="whether beta is a parameter")

    @classmethod
    def tiny(cls) -> Swish:
        return cls(beta=1.5)

    def build(self) -> nn.Module:
        return SwishActivation(self) if self.trained else FixedSwish(self.beta)


class GELU(Activation):
    """x * Phi(x), the mean of x kept with probability Phi(x) (arXiv:1606.08415). `approximate`: `tanh`, as in GPT-2
    (at most 5e-4 off); `sigmoid`, x * sigmoid(1.702 x) (at most 2.1e-2 off)."""

    kind: Literal["gelu"] = "gelu"
    approximate: Literal["none", "tanh", "sigmoid"] = Field("none", description="what stands for Phi")

    @classmethod
    def tiny(cls) -> GELU:
        return cls(approximate="tanh")

    def build(self) -> nn.Module:
        return SigmoidGELU() if self.approximate == "sigmoid" else nn.GELU(self.approximate)


class SigmoidGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ReLU(Activation):
    """max(0, x); the gradient at 0 is 0. Units can die: see `monitors.dead_units`."""

    kind: Literal["relu"] = "relu"

    @classmethod
    def tiny(cls) -> ReLU:
        return cls()

    def build(self) -> nn.Module:
        return nn.ReLU()


class SquaredReLU(Activation):
    """max(0, x)^2 (Primer, arXiv:2109.08668)."""

    kind: Literal["relu2"] = "relu2"

    @classmethod
    def tiny(cls) -> SquaredReLU:
        return cls()

    def build(self) -> nn.Module:
        return ReLUSquare()


class ReLUSquare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class SwishActivation(OwnStart):
    def __init__(self, spec: Swish):
        super().__init__()
        self.spec = spec
        self.beta = nn.Parameter(torch.empty(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)

    def reset(self) -> None:
        nn.init.constant_(self.beta, self.spec.beta)


class FixedSwish(nn.Module):
    def __init__(self, beta: float):
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, keeping only its two inputs for the backward."""
    return functions.silu_times(gate, up) if native.takes(gate, up) else _SiLUTimes.apply(gate, up)


class _SiLUTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, grad_up
