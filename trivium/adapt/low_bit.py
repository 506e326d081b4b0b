"""Low-bit training as a pass: linear maps become `LowBitLinear`s (BitNet, arXiv:2310.11453; b1.58, arXiv:2402.17764).

The pass keeps every parameter under its name, so that a model is trained from its start, or goes on from full weights.
`pack_weights` then lowers a trained model for inference; the packed form is not saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field, SerializeAsAny, field_validator
from torch import nn

from ..core.device import let_go
from ..core.errors import ConfigError, TriviumError
from ..models.count import bytes_of
from ..models.model import BuiltModel
from ..nn.linear import Linear, OwnStart
from ..nn.low_bit import LowBitLinear, schemes
from ..nn.norms import Norm
from .passes import Pass, Targets, replace_module, select

M = TypeVar("M", bound=nn.Module)


class LowBit(Pass):
    """Weights of two or three values, activations of 8 bits, on chosen linear maps; the full weights stay what is trained."""

    kind: Literal["low_bit"] = "low_bit"
    weights: str = Field("ternary", description="ternary: -1, 0, 1 (b1.58); sign: -1, 1 (BitNet)")
    activation_bits: int | None = Field(8, ge=2, le=8, description="of the rounded input; none: it is not rounded")
    norm: SerializeAsAny[Norm] | None = Field(None, description="a norm of its own before each map (arXiv:2210.06423)")
    targets: Targets = Field(
        "all-linear", description="module names or their endings, such as q or ffn.out; all-linear leaves out the head"
    )

    @field_validator("weights")
    @classmethod
    def _known(cls, value: str) -> str:
        schemes.get(value)
        return value

    @classmethod
    def tiny(cls) -> LowBit:
        return cls()

    def change(self, model: BuiltModel[Any]) -> None:
        chosen = select(model, self.targets, what="low-bit weights")
        for name, module in chosen.items():
            if type(module) is not Linear:
                what = "quantized: nothing of it can be trained" if isinstance(module, Linear) else "adapted: merge the adapter first"
                raise ConfigError(f"low-bit weights: {name} is {what}", field="targets", value=name)
            norm = None if self.norm is None else _build(self.norm, module)
            replace_module(model, name, LowBitLinear(module, scheme=self.weights, activation_bits=self.activation_bits, norm=norm))


def _build(norm: Norm, before: Linear) -> nn.Module:
    """A norm for the input of a map, on its device and in its dtype, at its start."""
    with before.weight.device:
        built = norm.build(before.weight.shape[1]).to(before.weight.dtype)
    for module in built.modules():
        if isinstance(module, OwnStart):
            module.reset()
    return built


@dataclass(frozen=True)
class Memory:
    """What the low-bit maps' weights take, in bytes: packed, scales included, and in the model's dtype. `weights`: how many."""

    maps: int
    weights: int
    packed: int
    full: int

    @property
    def ratio(self) -> float:
        return self.full / self.packed

    @property
    def bits(self) -> float:
        """Of one packed weight."""
        return 8 * self.packed / self.weights


@torch.no_grad()
def memory(model: nn.Module) -> Memory:
    """What packing saves. Raises `TriviumError` where nothing can be packed."""
    maps = _low_bit(model)
    packed = [map.packed() for map in maps.values()]
    weights = sum(map.weight.numel() for map in maps.values())
    full = bytes_of(map.weight for map in maps.values())
    return Memory(len(maps), weights, bytes_of(t for p in packed for t in (p.codes, p.scale)), full)


def pack_weights(model: M) -> M:
    """Replace every low-bit map of `model` in place by its packed form, for inference alone: it has no gradient, and what is
    to be saved is saved before."""
    for name, module in _low_bit(model).items():
        replace_module(model, name, module.packed())
        let_go(module.weight)
    return model.eval()


def _low_bit(model: nn.Module) -> dict[str, LowBitLinear]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, LowBitLinear)}
    if not found:
        raise TriviumError("the model has no low-bit weights: apply the pass 'low_bit' first")
    return found
