"""A pass: a frozen spec of something done to a finished model. A model carries the ordered list of its passes.

`apply` changes structure alone (it works on the meta device), so that loading can replay the list before tensors are
filled in. A pass that matches nothing is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator
from torch import nn

from ..core.errors import ConfigError
from ..core.registry import Registry
from ..core.spec import Part
from ..models.model import BuiltModel
from ..nn.adapted import Adapted, AdaptedLinear
from ..nn.linear import Linear

M = TypeVar("M", bound=BuiltModel[Any])


def _one_target(value: object) -> object:
    return (value,) if isinstance(value, str) and value != "all-linear" else value


Targets = Annotated[Literal["all-linear"] | tuple[str, ...], BeforeValidator(_one_target)]


class Pass(Part, registry=Registry("pass", "trivium.adapt")):
    """Root of the passes. `lasting`: whether the model needs it once it is trained; others are not saved."""

    lasting: ClassVar[bool] = True

    def change(self, model: BuiltModel[Any]) -> None:
        """Change the model's structure in place. Nothing matched is an error."""
        raise AssertionError

    def apply(self, model: M) -> M:
        """Change `model` in place and put this pass on its list."""
        self.change(model)
        model.train(model.training)  # what was put in follows the mode of the rest
        model.passes = (*model.passes, self)
        return model


def apply_passes(model: M, passes: Iterable[Pass]) -> M:
    """Replay `passes` in order."""
    for step in passes:
        step.apply(model)
    return model


def linears(model: nn.Module) -> dict[str, Linear | AdaptedLinear]:
    """Every linear map that a pass may replace, by its name in the model; what stands inside an adapted place is not listed."""
    found: dict[str, Linear | AdaptedLinear] = {}
    inside = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, Adapted):
            inside = f"{name}."
        if isinstance(module, AdaptedLinear | Linear):
            found[name] = module
    return found


def matches(name: str, target: str) -> bool:
    """Whether module `name` is `target` or ends in it at a dot: `layers.0.mixer.inp.q` matches `q` and `inp.q`."""
    return name == target or name.endswith("." + target)


def select(model: nn.Module, targets: Iterable[str] | str, *, what: str) -> dict[str, Linear | AdaptedLinear]:
    """The linear maps that `targets` name. `all-linear`: every one except the head. A target that matches nothing is
    an error that lists what could have been named."""
    available = linears(model)
    if targets == "all-linear":
        chosen = {name: module for name, module in available.items() if "head" not in name.split(".")[:2]}
        if not chosen:
            raise ConfigError(f"{what}: the model has no linear map to adapt")
        return chosen
    chosen = {}
    for target in (targets,) if isinstance(targets, str) else targets:
        hits = {name: module for name, module in available.items() if matches(name, target)}
        if not hits:
            endings = sorted({name.split(".", 2)[-1] if name.startswith("layers.") else name for name in available})
            raise ConfigError(
                f"{what}: target {target!r} matches no linear map of the model (there are: {', '.join(endings)})",
                value=target,
                choices=endings,
            )
        chosen.update(hits)
    return chosen


def replace_module(model: nn.Module, name: str, module: nn.Module | None) -> None:
    """Put `module` where `name` stands; None: nothing stands there any more."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
