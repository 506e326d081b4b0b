"""What all adapters have in common: a pass that freezes the model and puts named updates beside it.

A method is one class: its settings, and `put`, which hangs its updates into `Adapted` modules. Names, numbers for the rows of
a batch, drawing, listing tensors, taking away, merging and its undoing are here, for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ..core.errors import ConfigError, TriviumError, unknown
from ..core.registry import Registry
from ..core.seed import generator
from ..models.model import BuiltModel
from ..nn.adapted import Adapted, AdaptedLinear, LinearUpdate, Update
from ..nn.linear import Linear
from .passes import Pass, matches, replace_module

N = TypeVar("N")
NAME = r"^[A-Za-z_][\w-]*$"


class Adapter(Pass, registry=Registry("adapter", "trivium.adapt")):
    """Root of the passes that train something beside a frozen model. Its members are passes as well."""

    name: str = Field("default", pattern=NAME, description="what the adapter is called; several can be loaded")

    @classmethod
    def __pydantic_init_subclass__(cls, registry: Registry | None = None, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(registry, **kwargs)
        if registry is None:
            Pass.registry.add(cls.model_fields["kind"].default, cls)

    def put(self, model: BuiltModel[Any]) -> None:
        """Hang this adapter's updates into the model."""
        raise AssertionError

    def change(self, model: BuiltModel[Any]) -> None:
        if self.name in adapters(model):
            raise ConfigError(
                f"an adapter called {self.name!r} is there already; give this one another name", field="name", value=self.name
            )
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.put(model)
        _number(model, (*adapters(model), self.name))


def with_kind(adapter: object) -> object:
    """An adapter as a config has it, its kind said: where none is, it is LoRA."""
    return {"kind": "lora", **adapter} if isinstance(adapter, Mapping) else adapter


def adapters(model: BuiltModel[Any]) -> dict[str, Adapter]:
    """The adapters on the model, by name, in order: their places are the numbers in `Inputs.adapters`."""
    return {step.name: step for step in model.passes if isinstance(step, Adapter)}


def updates(model: BuiltModel[Any], name: str) -> dict[str, tuple[Any, Any]]:
    """The places that adapter `name` changes, by path: each place's `Adapted` and the `Update` in it."""
    known = adapters(model)
    if name not in known:
        raise TriviumError(unknown("adapter", name, known), value=name, choices=known)
    return {path: (host, host.updates[name]) for path, host in _hosts(model).items() if name in host.updates}


def adapter_tensors(model: BuiltModel[Any], name: str = "default") -> dict[str, Tensor]:
    """Adapter `name`'s parameters by their names in the model."""
    return {
        f"{path}.{host.key}.{name}.{part}": parameter
        for path, (host, update) in updates(model, name).items()
        for part, parameter in update.named_parameters()
    }


def initialize_adapter(model: BuiltModel[Any], name: str = "default", *, seed: int) -> None:
    """Draw adapter `name`. Each update depends on the seed, its place and the base's weights alone."""
    for path, (host, update) in updates(model, name).items():
        assert isinstance(update, Update)
        update.reset(generator(seed, name, path), host, model)


def remove_adapter(model: BuiltModel[Any], name: str = "default") -> None:
    """Take adapter `name` and its pass away: the model is what it was before."""
    for path, (host, _) in updates(model, name).items():
        del host.updates[name]
        if not len(host.updates):
            replace_module(model, path, host.without())
    model.passes = tuple(step for step in model.passes if not (isinstance(step, Adapter) and step.name == name))
    _number(model, tuple(adapters(model)))


@dataclass(frozen=True)
class Repacked:
    """What merging into packed weights gives up: the `form` they were held in, all weights' bytes then and now, and, were the merged
    maps packed so again, the mean KL divergence in nats from the adapter beside them (None: it cannot be told)."""

    form: str
    bytes_before: int
    bytes_after: int
    mean_kl: float | None


@dataclass(frozen=True)
class MergeReport:
    """What merging changed, measured on given tokens, adapter beside the base against merged: the largest absolute
    difference of logits, their standard deviation, the mean KL divergence in nats, and how often the likeliest token differs."""

    adapter: str
    maps: int
    max_logit_difference: float
    logit_deviation: float
    mean_kl: float
    argmax_changed: float
    tokens: int
    repacked: Repacked | None = None

    @property
    def relative(self) -> float:
        return self.max_logit_difference / max(self.logit_deviation, 1e-12)


def compared(before: Tensor, after: Tensor, *, adapter: str, maps: int) -> MergeReport:
    """By how much logits [B, T, V] moved."""
    before, after = before.float(), after.float()
    before_log, after_log = before.log_softmax(-1), after.log_softmax(-1)
    return MergeReport(
        adapter=adapter,
        maps=maps,
        max_logit_difference=(before - after).abs().max().item(),
        logit_deviation=before.std().item(),
        mean_kl=(before_log.exp() * (before_log - after_log)).sum(-1).mean().item(),
        argmax_changed=(before.argmax(-1) != after.argmax(-1)).float().mean().item(),
        tokens=before[..., 0].numel(),
    )


@torch.no_grad()
def merge(model: BuiltModel[Any], name: str = "default", *, probe: Tensor) -> MergeReport:
    """Put what adapter `name` does into the base weights and take its pass away. `probe` [B, T]: tokens on which the difference
    is measured. Sums are made in float32 and rounded once. `ConfigError` for a method that no weights of the base can express."""
    model.eval()
    chosen = updates(model, name)
    maps = linear_updates(model, name)
    if len({id(next(module.base.parameters())) for module, _ in maps.values()}) < len(maps):
        message = f"adapter {name!r} has an update for each of several layers that share their weights, and cannot be merged into them"
        raise ConfigError(message)
    before = model(probe).logits
    for module, update in maps.values():
        module.base.put(*update.merged(module.base.weight, module.base.bias))
    remove_adapter(model, name)
    return compared(before, model(probe).logits, adapter=name, maps=len(chosen))


@torch.no_grad()
def kept(model: BuiltModel[Any], name: str = "default") -> dict[str, Tensor]:
    """What undoing a merge of adapter `name` will need to know of the base beside the adapter's parameters, by place: DoRA's norms.
    Empty for methods that need nothing."""
    found = {path: update.kept(host.weight) for path, (host, update) in updates(model, name).items() if isinstance(update, LinearUpdate)}
    return {path: tensor for path, tensor in found.items() if tensor is not None}


@torch.no_grad()
def unmerge(model: BuiltModel[Any], step: Adapter, tensors: Mapping[str, Tensor], *, known: Mapping[str, Tensor] | None = None) -> None:
    """Undo a merge: take the updates out again and put the adapter back beside the base. `tensors`: the adapter's
    parameters by their names in the model; `known`: what `kept` gave before the merge. Exact up to the rounding of the base's
    dtype; `TriviumError` for a method whose base cannot be told from what was merged."""
    step.apply(model)
    for key, parameter in adapter_tensors(model, step.name).items():
        if key not in tensors:
            raise TriviumError(f"the adapter has no tensor {key}")
        parameter.copy_(tensors[key])
    take_out(model, step.name, known=known)


@torch.no_grad()
def take_out(model: BuiltModel[Any], name: str = "default", *, known: Mapping[str, Tensor] | None = None) -> None:
    """Take what adapter `name` does out of the base weights, into which it was merged; it stays beside them."""
    maps, known = linear_updates(model, name), known or {}
    found = {path: update.unmerged(module.base.weight, module.base.bias, known.get(path)) for path, (module, update) in maps.items()}
    for path, made in found.items():
        maps[path][0].base.put(*made)


def of(patterns: Mapping[str, N], name: str, default: N) -> N:
    """The entry whose pattern matches `name` (the longest wins), else the default."""
    hits = sorted((pattern for pattern in patterns if matches(name, pattern)), key=len)
    return patterns[hits[-1]] if hits else default


def adapt_linear(model: BuiltModel[Any], name: str, module: Linear | AdaptedLinear) -> AdaptedLinear:
    """The place for updates of the linear map `name`, put there if none is."""
    if isinstance(module, AdaptedLinear):
        return module
    adapted = AdaptedLinear(module)
    replace_module(model, name, adapted)
    return adapted


def linear_updates(model: BuiltModel[Any], name: str) -> dict[str, tuple[AdaptedLinear, LinearUpdate]]:
    """The updates of adapter `name`, if all of them are of linear maps."""
    found = {}
    for path, (host, update) in updates(model, name).items():
        if not isinstance(host, AdaptedLinear) or not isinstance(update, LinearUpdate) or not update.merges:
            kind = adapters(model)[name].kind
            raise ConfigError(f"adapter {name!r} is of kind {kind!r}, which no weights of the base can express: it cannot be merged")
        found[path] = (host, update)
    return found


def _hosts(model: nn.Module) -> dict[str, Adapted]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Adapted)}


def _number(model: nn.Module, order: tuple[str, ...]) -> None:
    for module in model.modules():
        if isinstance(module, Adapted):
            module.numbered(order)
