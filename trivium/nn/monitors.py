"""What can be watched inside a model while it runs. Nothing here changes what is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .feedforward import FeedForward


class DeadUnits:
    """Which hidden units have given something other than zero so far, by feed-forward part."""

    def __init__(self) -> None:
        self.alive: dict[str, Tensor] = {}  # [hidden] bool

    def see(self, name: str, values: Tensor) -> None:
        """Count in one batch of activations [..., hidden]."""
        alive = (values.detach() != 0).flatten(0, -2).any(0)
        self.alive[name] = self.alive[name] | alive if name in self.alive else alive

    def fractions(self) -> dict[str, float]:
        """The share of units that were zero for every token seen, by the part's name in the model."""
        return {name: 1.0 - alive.float().mean().item() for name, alive in self.alive.items()}


@contextmanager
def dead_units(model: nn.Module) -> Iterator[DeadUnits]:
    """Watch the hidden units of `model` through every forward inside the block; padding counts as tokens do.

    A unit whose activation is exactly zero for every token passes no gradient: with ReLU it is dead and stays so. Parts
    gated with SiLU, which is never exactly zero, are not watched.
    """
    seen = DeadUnits()

    def watch(name: str):
        return lambda _module, _args, values: seen.see(name, values)

    hooks = [
        module.activation.register_forward_hook(watch(name)) for name, module in model.named_modules() if isinstance(module, FeedForward)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
