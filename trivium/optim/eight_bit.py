"""AdamW whose two means are held in eight bits (arXiv:2110.02861): in blocks, each value the nearest of a table, made with more places
for small values. A quarter of AdamW's memory, and what bitsandbytes computes.

They are float32 while their parameter is updated, one parameter at a time. `offload` keeps them in the host's memory between updates,
where bitsandbytes would page them; left out are 8-bit states of other optimizers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..nn.blockwise import Table, decode, encode
from .optimizers import Decaying, update

MEANS: dict[str, Table] = {"exp_avg": "dynamic", "exp_avg_sq": "positive"}


class AdamW8bit(Decaying):
    """AdamW with states of 8 bits for large parameters, and of 32 for small ones."""

    kind: Literal["adamw8bit"] = "adamw8bit"
    block: int = Field(256, gt=0, description="values of a state that share a scale")
    smallest: int = Field(4096, ge=0, description="parameters of fewer values have states of 32 bits")
    offload: bool = Field(False, description="on a GPU: states wait in the host's memory, and are on the device for their update alone")

    @classmethod
    def tiny(cls) -> AdamW8bit:
        return cls(lr=0.05, smallest=8)

    def build(self, params: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        return BlockwiseAdamW(self.groups(params), self)


class BlockwiseAdamW(torch.optim.Optimizer):
    """The update of `spec`, one parameter at a time."""

    def __init__(self, groups: list[dict[str, Any]], spec: AdamW8bit):
        super().__init__(groups, {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps})
        self.spec = spec

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None, "the loop computes gradients itself"
        moved = False
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    moved = self._update(param, param.grad, group) or moved
        if moved:
            torch.cuda.synchronize()  # until then the host's memory is being written

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As it was given: torch would cast codes and scales to the parameters' dtype."""
        super().load_state_dict(state_dict)
        params = [param for group in self.param_groups for param in group["params"]]
        for index, entries in state_dict["state"].items():
            self.state[params[index]] = {name: value.to(params[index].device, copy=True) for name, value in entries.items()}

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> bool:
        """Returns whether states came from the host's memory and go back to it."""
        state, away = self.state[param], self.spec.offload and param.is_cuda
        if not state:
            state.update(self._start(param))
        if away and state["exp_avg"].is_cuda:  # at their start, and as a checkpoint was loaded
            state.update({name: tensor.cpu().pin_memory() for name, tensor in state.items() if name != "step"})
        state["step"] += 1
        here = {name: tensor.to(param.device, non_blocking=True) for name, tensor in state.items() if name != "step"}
        if len(here) == len(MEANS):
            update(param, grad, here["exp_avg"], here["exp_avg_sq"], group, step=state["step"].item())
        else:
            self._update_coded(param, grad, here, group, step=state["step"].item())
        if away:
            for name, tensor in here.items():
                state[name].copy_(tensor, non_blocking=True)
        return away

    def _update_coded(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], *, step: float) -> None:
        block = self.spec.block
        means = {name: decode(state[name], state[f"{name}_scale"], table, block=block).view_as(param) for name, table in MEANS.items()}
        update(param, grad, means["exp_avg"], means["exp_avg_sq"], group, step=step)
        for name, table in MEANS.items():
            codes, scales = encode(means.pop(name), table, block=block)
            state[name].copy_(codes.view_as(param))
            state[f"{name}_scale"].copy_(scales)

    def _start(self, param: Tensor) -> dict[str, Tensor]:
        """States of zero: under a scale of 0, every code is."""
        state = {"step": torch.tensor(0.0)}
        if param.numel() < self.spec.smallest:
            return state | {name: torch.zeros_like(param) for name in MEANS}
        blocks = -(-param.numel() // self.spec.block)
        for name in MEANS:
            state[name] = torch.zeros_like(param, dtype=torch.uint8)
            state[f"{name}_scale"] = param.new_zeros(blocks, dtype=torch.float32)
        return state
