"""How matrices start: named formulas for the standard deviation of each one's normal draw.

A formula sees a matrix's place (its sizes, what it does) and nothing else, so a start is a pure function of the spec and
the seed. Norms, biases and parameters with a start of their own are not its business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..core.registry import Registry


@dataclass(frozen=True)
class Matrix:
    """Where a matrix stands. `table`: its rows are looked up (tokens, positions), so no sum runs over it. `activated`: an
    activation follows. `writes`: it ends a sublayer, so its output joins the residual stream of a model of `layers` layers."""

    inputs: int
    outputs: int
    layers: int
    table: bool
    activated: bool
    writes: bool


starts: Registry[Callable[[Matrix, float], float]] = Registry("initialization", "trivium.models")


@starts.register("gpt2")
def gpt2(place: Matrix, std: float) -> float:
    """`std` everywhere; over sqrt(2 layers) where a sublayer writes into the stream, whose variance then stays flat
    however many layers add to it (GPT-2, section 2.3)."""
    return std / (2 * place.layers) ** 0.5 if place.writes else std


@starts.register("xavier")
def xavier(place: Matrix, std: float) -> float:
    """sqrt(2 / (inputs + outputs)): variance kept halfway between forward and backward (Glorot and Bengio 2010)."""
    return std if place.table else (2 / (place.inputs + place.outputs)) ** 0.5


@starts.register("kaiming")
def kaiming(place: Matrix, std: float) -> float:
    """sqrt(2 / inputs) before an activation, sqrt(1 / inputs) elsewhere: variance kept through ReLUs (arXiv:1502.01852)."""
    return std if place.table else ((2 if place.activated else 1) / place.inputs) ** 0.5
