"""What a whole model is, whatever its shape: the root of the specs that a directory can hold, and of the modules they build.

A `Transformer` is one stack; an `EncoderDecoder` is two. Each further assembly is a member of `Model` in its own file:
reading, writing and passes then know it by its `kind`. A spec without a kind is a `Transformer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from ..core.registry import Registry
from ..core.spec import Part
from ..nn.inputs import Inputs, Keep, Output
from ..nn.store import Store

S = TypeVar("S", bound="Model")
DEFAULT = "transformer"  # the kind that a spec without one has


class Model(Part, registry=Registry("model", "trivium.models")):
    """Root of the specs of whole models: `build()` gives a `BuiltModel` on torch's default device."""

    def build(self) -> BuiltModel[Any]:
        raise AssertionError

    def with_plain_names(self) -> Self:
        """The same model with its blocks named as families name them: block names are free, and say nothing about it."""
        raise AssertionError


class BuiltModel(nn.Module, Generic[S]):
    """A model with its spec and what was done to it since it was built, in order."""

    spec: S
    passes: tuple[Part, ...]

    def __init__(self, spec: S):
        super().__init__()
        self.spec = spec
        self.passes = ()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, inputs: Inputs | Tensor, *, keep: Keep = "all", weights: bool = False) -> Output:
        raise AssertionError

    def cache(self, rows: int, capacity: int, *, rollback: int = 0) -> Store:
        """An empty store for `rows` rows of up to `capacity` tokens."""
        raise AssertionError


def with_kind(spec: Any) -> Any:
    """A spec as a file has it, its kind said."""
    return {"kind": DEFAULT, **spec} if isinstance(spec, Mapping) else spec
