"""Trainable parameters, their fp32 masters and their optimizer as one thing that can be stepped, saved and restored.

A parameter held in bf16 loses most updates (2^-9 of its size is the least that it can move by), so it gets an fp32 master: gradients are
added up in the master's precision, the optimizer moves the master, and the parameter is the master rounded. A parameter
held in fp32 is its own master. Mixed precision with masters: 1710.03740.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, FileError
from .average import Average
from .optimizers import Optimizer


class Masters:
    """Casts `model` to `dtype` in place and takes its trainable parameters over.

    `params` holds the parameters by name, `tensors` their masters (the same objects where `dtype` is not a half one), `average` a
    running mean of these, if there is to be one: `ema` is its decay.
    """

    def __init__(self, model: nn.Module, optim: Optimizer, *, dtype: torch.dtype, ema: float | None = None):
        # The masters are taken before the cast, so that what the model holds beyond bf16 is not lost.
        trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
        if not trained:
            raise ConfigError("nothing to train: no parameter of the model requires a gradient")
        half = dtype in (torch.bfloat16, torch.float16)
        copies = {name: param.detach().float().clone() for name, param in trained.items()} if half else {}
        model.to(dtype)
        self.params = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self.tensors: dict[str, Tensor] = copies or dict(self.params)
        self.halved = half
        self.base_lr = optim.lr
        self.optimizer = optim.build(self.tensors)
        self.average = None if ema is None else Average(self.tensors, ema)

    def accumulate(self) -> None:
        """Adds the gradients of one backward to the masters' and frees them; call it after each backward."""
        if not self.halved:
            return  # autograd has added them already, in the master's own precision
        for name, param in self.params.items():
            if param.grad is None:
                continue
            master = self.tensors[name]
            if master.grad is None:
                master.grad = param.grad.to(master.dtype)
            else:
                master.grad += param.grad
            param.grad = None

    def clip(self, largest: float | None) -> Tensor:
        """The norm [] of all gradients together, before they are scaled down to the norm `largest`."""
        tensors = list(self.tensors.values())
        norm = nn.utils.get_total_norm([tensor.grad for tensor in tensors if tensor.grad is not None])
        if largest is not None:
            nn.utils.clip_grads_with_norm_(tensors, largest, norm)
        return norm

    def step(self, factor: float) -> None:
        """One update at `factor` times the optimizer's rate; gradients are cleared and parameters rounded from their masters."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_lr * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.tensors)
        self._round()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model holds the mean of what was trained, if there is one."""
        if self.average is None:
            yield
            return
        kept = {} if self.halved else {name: param.detach().clone() for name, param in self.params.items()}
        self.settle()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, held in kept.items():
                    self.params[name].copy_(held)
            self._round()

    @torch.no_grad()
    def settle(self) -> None:
        """Leave the mean in the model, if there is one; no update may follow."""
        if self.average is not None:
            for name, param in self.params.items():
                param.copy_(self.average.tensors[name])

    def state(self) -> dict[str, dict[str, Tensor]]:
        """All that a resumed run needs, as sets of tensors: `parameters` by name, `optimizer` by name and entry; `average` by name."""
        kept = {name: self.optimizer.state[tensor] for name, tensor in self.tensors.items()}
        entries = {f"{name}.{entry}": value for name, state in kept.items() for entry, value in sorted(state.items())}
        found = {"parameters": {name: tensor.detach() for name, tensor in self.tensors.items()}, "optimizer": entries}
        return found if self.average is None else {**found, "average": dict(self.average.tensors)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores what `state` gave; raises `FileError` where names or shapes differ from this model's."""
        given = state["parameters"]
        wrong = sorted(given.keys() ^ self.tensors.keys()) or [n for n, t in self.tensors.items() if given[n].shape != t.shape]
        if wrong:
            raise FileError(f"the checkpoint's parameters are not this model's: {', '.join(wrong[:3])} and {len(wrong)} in all differ")
        for name, tensor in self.tensors.items():
            tensor.copy_(given[name])  # copied, not adopted: a mapped file's tensors are not aligned as torch's own are
        self._round()
        if self.average is not None:
            self.average.load(state["average"])
        entries: dict[str, dict[str, Tensor]] = {name: {} for name in self.tensors}
        for key, value in state["optimizer"].items():
            name, _, entry = key.rpartition(".")
            entries[name][entry] = value.to(self.tensors[name].device, copy=True)
        for name, tensor in self.tensors.items():
            if entries[name]:
                self.optimizer.state[tensor] = entries[name]

    @torch.no_grad()
    def _round(self) -> None:
        if self.halved:
            for name, param in self.params.items():
                param.copy_(self.tensors[name])
