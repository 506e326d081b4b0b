"""Optimizers as specs: `build` turns named parameters into a torch optimizer with groups that decay and groups that do not.

AdamW (1711.05101) runs on torch's fused kernel; `fused=False` runs the update written out below, which is what the fused one
is held equal to. Both keep the same state, so a state dict of either, or of `torch.optim.AdamW`, loads into the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..core.registry import Registry
from ..core.spec import Part


class Optimizer(Part, registry=Registry("optimizer", "trivium.optim")):
    """Root of the optimizers. `lr` is the rate that the schedule's factor multiplies."""

    lr: float = Field(gt=0.0, description="learning rate at the schedule's factor 1")

    def build(self, params: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """A torch optimizer over `params` (leaves, by name); every group carries `lr`."""
        raise NotImplementedError


class Decaying(Optimizer):
    """What the members of Adam's family share: means of the gradient and of its square, and decay apart from them."""

    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of the mean and of the mean square of the gradient")
    eps: float = Field(1e-8, gt=0.0, description="added to the root of the mean square")
    weight_decay: float = Field(0.01, ge=0.0, description="share of a weight taken away per update at rate 1")
    no_decay: tuple[str, ...] | None = Field(
        None, description="patterns of the parameters that do not decay; none given: those of fewer than two dimensions (norms, biases)"
    )

    def groups(self, params: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """The parameters that decay and those that do not."""
        return [
            {"params": group, "weight_decay": decay}
            for decay, group in (
                (self.weight_decay, [p for name, p in params.items() if self.decays(name, p)]),
                (0.0, [p for name, p in params.items() if not self.decays(name, p)]),
            )
            if group
        ]

    def decays(self, name: str, param: Tensor) -> bool:
        """Whether the parameter `name` is decayed."""
        if self.no_decay is None:
            return param.dim() >= 2
        return not any(fnmatchcase(name, pattern) for pattern in self.no_decay)


class AdamW(Decaying):
    """Adam with bias correction and weight decay that is decoupled from the gradient."""

    kind: Literal["adamw"] = "adamw"
    amsgrad: bool = Field(False, description="divide by the largest mean square so far")
    fused: bool = Field(True, description="torch's fused kernel; false: the same update written out")

    @classmethod
    def tiny(cls) -> AdamW:
        return cls(lr=0.05)

    def build(self, params: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        groups = self.groups(params)
        if self.fused:
            return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, amsgrad=self.amsgrad, fused=True)
        return WrittenAdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, amsgrad=self.amsgrad)


class WrittenAdamW(torch.optim.Optimizer):
    """AdamW's update written out, one parameter at a time: the naive side of the fused kernel."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, amsgrad: bool):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "amsgrad": amsgrad})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None, "the loop computes gradients itself"
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
            if group["amsgrad"]:
                state["max_exp_avg_sq"] = torch.zeros_like(param)
        state["step"] += 1
        largest = state["max_exp_avg_sq"] if group["amsgrad"] else None
        update(param, grad, state["exp_avg"], state["exp_avg_sq"], group, step=state["step"].item(), largest=largest)


def update(
    param: Tensor, grad: Tensor, mean: Tensor, square: Tensor, group: Mapping[str, Any], *, step: float, largest: Tensor | None = None
) -> None:
    """One update of AdamW, number `step` from 1, of `param` and of both means in place; `largest`: the largest mean square so far."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    param.mul_(1 - lr * group["weight_decay"])
    mean.mul_(beta1).add_(grad, alpha=1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if largest is not None:
        torch.maximum(largest, square, out=largest)
        square = largest
    root = (square / (1 - beta2**step)).sqrt_()
    param.addcdiv_(mean / (1 - beta1**step), root.add_(group["eps"]), value=-lr)
