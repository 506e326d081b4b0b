"""What the formats of adapters have in common: PEFT's file names, its rules for naming modules, and the frame of one format.

A `Format` reads one `peft_type` into a pass on a model and writes it back. Names on disk are those of the base's family, as its
weight rules have them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..adapt.adapter import Adapter
from ..adapt.passes import linears, matches
from ..core.errors import FileError
from ..core.log import log
from ..core.spec import Spec
from ..models.transformer import TransformerModel
from .directory import NATIVE
from .hf import families
from .rules import Site, sites, some
from .tensors import Lazy

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LAYER = re.compile(r"(?:.*?\.)?[^.]*\.(\d+)\.(.*)")  # the layer's number, and what stands after it


class PeftConfig(Spec):
    """What every adapter_config.json says."""

    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None


class Format:
    """One `peft_type`. `config`: what is read of its adapter_config.json. `values`: the keys that say what we do anyway, and what
    they must hold for that. `ignored`: further keys that say nothing about what the adapter computes."""

    peft_type: ClassVar[str]
    config: ClassVar[type[PeftConfig]]
    values: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    def holds(self, step: Any) -> bool:
        """Whether it can say all that this adapter of its kind is."""
        return True

    def read(self, path: Path, config: Any, tensors: Mapping[str, Lazy], model: TransformerModel, family: str, name: str) -> Adapter:
        """Put the adapter on `model`, filled in. Raises before anything is changed."""
        raise AssertionError

    def write(self, step: Any, model: TransformerModel, family: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The keys of adapter_config.json that are this format's own, and the tensors."""
        raise AssertionError


def sites_of(model: TransformerModel, family: str) -> dict[str, Site]:
    """The linear maps that the family stores, by its names, and which of ours each one holds."""
    mine = list(linears(model))
    if family == NATIVE:
        return {name: Site((name,), transposed=False) for name in mine}
    return sites(families.get(family).weight_rules(model.spec), mine)


def take(path: Path, tensors: Mapping[str, Lazy], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Those tensors, which must be all there are and have these shapes; `FileError` otherwise."""
    if left := [key for key in tensors if key not in shapes]:
        raise FileError(f"{path / WEIGHTS}: {len(left)} tensors are left over, this base has no place for them: {some(left)}")
    if lost := [key for key in shapes if key not in tensors]:
        raise FileError(f"{path / WEIGHTS}: {some(lost)} missing: another base?")
    for key, shape in shapes.items():
        if tuple(tensors[key].shape) != shape:
            raise FileError(f"{path / WEIGHTS}: {key} is {list(tensors[key].shape)}, expected {list(shape)}: another base?")
    return {key: tensors[key].load() for key in shapes}


def say_rounding(path: Path, tensors: Mapping[str, Lazy], model: TransformerModel) -> None:
    """A warning where the model's dtype holds less than what is stored."""
    dtypes = {lazy.dtype for lazy in tensors.values()}
    if rounded := [dtype for dtype in dtypes if torch.finfo(dtype).eps < torch.finfo(model.dtype).eps]:
        log.warn(f"{path}: stored as {str(rounded[0])[6:]}, rounded to the model's {str(model.dtype)[6:]}")


def listed(patterns: str | tuple[str, ...] | None, module: str) -> bool:
    """A string is a regular expression of the whole name; a list holds names or their endings."""
    if isinstance(patterns, str):
        return regex(patterns)(module)
    return any(matches(module, pattern) for pattern in patterns or ())


def regex(pattern: str) -> Callable[[str], bool]:
    """A full match of `pattern`, which comes from a file: one that could take forever is refused."""
    if len(pattern) > 300 or re.search(r"\)[*+{]", pattern) or len(re.findall(r"(?<!\\)[*+{]", pattern)) > 4:
        raise FileError(f"the pattern {pattern!r:.60} in an adapter's config is too involved to be run; list the modules by name")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise FileError(f"the pattern {pattern!r:.60} in an adapter's config is no regular expression: {error}") from None
    return lambda text: compiled.fullmatch(text) is not None


def endings(chosen: Collection[str], every: Collection[str]) -> list[str]:
    """The shortest list of names and endings that picks out `chosen` among `every`: what all layers share is said once."""

    def ending(name: str) -> str:
        found = LAYER.match(name)
        return found[2] if found else name

    have, could = Counter(map(ending, chosen)), Counter(map(ending, every))
    return list(dict.fromkeys(ending(name) if have[ending(name)] == could[ending(name)] else name for name in chosen))
