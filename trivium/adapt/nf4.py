"""QLoRA's base as a pass: linear maps hold their weights in four bits, and everything is frozen (arXiv:2305.14314).

Any adapter goes on top. The pass is saved with the adapter, which loading then puts on a base that was quantized alike. Products are made
in the model's dtype, which is bfloat16 where `train.precision` does not say otherwise. Left out: 4-bit floats, and quantization that
looks at data.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import nn

from ..core.device import let_go
from ..core.errors import ConfigError, TriviumError
from ..models.model import BuiltModel
from ..models.transformer import TransformerModel, share
from ..nn.heads import LanguageHead
from ..nn.linear import Linear
from ..nn.nf4 import Nf4Linear
from .low_bit import Memory
from .passes import Pass, Targets, matches, replace_module, select

M = TypeVar("M", bound=BuiltModel[Any])


class Nf4(Pass):
    """Four bits a weight on chosen linear maps, and a scale for each block of them; every parameter is frozen."""

    kind: Literal["nf4"] = "nf4"
    block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(64, description="weights that share a scale")
    double: bool = Field(True, description="quantize the scales too, to 8 bits (double quantization)")
    targets: Targets = Field(
        "all-linear", description="module names or their endings, such as q or ffn.out; all-linear leaves out the head"
    )
    keep: tuple[str, ...] = Field((), description="those of them that stay as they are")

    @classmethod
    def tiny(cls) -> Nf4:
        return cls(block=32)

    def change(self, model: BuiltModel[Any]) -> None:
        chosen = self._chosen(model)
        owners: dict[int, str] = {}
        for name, module in chosen.items():
            owners.setdefault(id(module.weight), name)
        of = {name: owners[id(module.weight)] for name, module in chosen.items()}
        for name in list(chosen):  # each full weight is let go of before the next one is looked at
            made = self._quantized(name, chosen.pop(name), drawn=of[name] == name)
            if of[name] != name:
                share(model.get_submodule(of[name]), made)
            replace_module(model, name, made)
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def _chosen(self, model: BuiltModel[Any]) -> dict[str, Linear]:
        if (
            isinstance(model, TransformerModel)
            and isinstance(model.head, LanguageHead)
            and model.head.spec.tied
            and "head.out" in self.targets
        ):
            raise ConfigError("nf4: the head is tied to the embedding, whose table stays as it is", field="targets", value="head.out")
        found = select(model, self.targets, what="nf4")
        for pattern in self.keep:
            if not any(matches(name, pattern) for name in found):
                raise ConfigError(f"nf4: keep: {pattern!r} matches none of the targets", field="keep", value=pattern)
        chosen: dict[str, Linear] = {}
        for name, module in found.items():
            if any(matches(name, pattern) for pattern in self.keep):
                continue
            if not isinstance(module, Linear):
                raise ConfigError(
                    f"nf4: {name} is adapted already: quantize the base first, and put the adapter on it", field="targets", value=name
                )
            if isinstance(module, Nf4Linear):
                raise ConfigError(f"nf4: {name} is quantized already", field="targets", value=name)
            chosen[name] = module
        if not chosen:
            raise ConfigError("nf4: keep leaves nothing to quantize", field="keep")
        return chosen

    def _quantized(self, name: str, linear: Linear, *, drawn: bool) -> Nf4Linear:
        """The map in four bits, where the full one is; not filled in if its weights are another's."""
        outputs, inputs = linear.weight.shape
        with linear.weight.device if drawn else torch.device("meta"):
            made = Nf4Linear(inputs, outputs, block=self.block, double=self.double).to(linear.weight.dtype)
        made.bias = linear.bias
        if drawn and not linear.weight.is_meta:
            try:
                made.take(linear.weight)
            except ConfigError as error:
                raise ConfigError(f"nf4: {name} {error}", value=name) from None
            let_go(linear.weight)
        return made


@torch.no_grad()
def memory(model: nn.Module) -> Memory:
    """What quantizing saves, by the bytes that are held. Raises `TriviumError` where nothing is quantized."""
    maps = _maps(model)
    full = sum(map.inputs * map.outputs * map.like.element_size() for map in maps.values())
    return Memory(len(maps), sum(map.inputs * map.outputs for map in maps.values()), sum(map.bytes for map in maps.values()), full)


@torch.no_grad()
def dequantize(model: M) -> M:
    """Full weights, as the codes have them, in place of every 4-bit map; the pass is taken off the list. The model computes what it did,
    and can hold what four bits could not, such as a merged adapter."""
    made: dict[int, nn.Parameter] = {}
    for name, module in _maps(model).items():
        if id(module.codes) not in made:
            made[id(module.codes)] = nn.Parameter(module.weight, requires_grad=False)
        with torch.device("meta"):
            plain = Linear(module.inputs, module.outputs)
        plain.weight, plain.bias = made[id(module.codes)], module.bias
        replace_module(model, name, plain)
    model.passes = tuple(step for step in model.passes if not isinstance(step, Nf4))
    return model


def _maps(model: nn.Module) -> dict[str, Nf4Linear]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, Nf4Linear)}
    if not found:
        raise TriviumError("the model has no 4-bit weights: apply the pass 'nf4' first")
    return found
