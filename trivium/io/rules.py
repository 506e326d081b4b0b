"""Weight rules as data: one list per family carries tensors in and out, and adapter keys with them.

A rule pairs names on disk with names of ours; each knows how to go forward (disk to ours) and backward. Patterns name
modules: `{i}` stands for a number, and the leaf (`weight`, `bias`) is carried over. Tensors stay lazy all the way, so
one is in memory at a time. What no rule knows is an error, on either side.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..core.errors import FileError
from .tensors import Lazy

LEAVES = r"weight|bias"


class Pattern:
    """A module name with `{placeholders}` for numbers."""

    def __init__(self, text: str, leaves: str = LEAVES):
        self.text, self.leaves = text, leaves
        parts = re.split(r"\{(\w+)\}", text)
        body = "".join(re.escape(part) if k % 2 == 0 else rf"(?P<{part}>0|[1-9]\d*)" for k, part in enumerate(parts))
        self._regex = re.compile(rf"{body}(?:\.(?P<leaf>{leaves}))?")

    def match(self, name: str) -> dict[str, str | None] | None:
        """What the placeholders stand for in `name`, and `leaf` (None for a module's name); None if it does not match."""
        found = self._regex.fullmatch(name)
        return None if found is None else found.groupdict()

    def fill(self, values: Mapping[str, str | None]) -> str:
        """The name that these values make."""
        numbers = {key: value for key, value in values.items() if key != "leaf"}
        return self.text.format(**numbers) + (f".{values['leaf']}" if values["leaf"] else "")


class Rule:
    """Some tensors on disk are some tensors of ours. `forward` and `backward` undo each other, bit for bit."""

    def __init__(self, disk: Sequence[str], ours: Sequence[str], *, leaves: str = LEAVES):
        self.disk = tuple(Pattern(text, leaves) for text in disk)
        self.ours = tuple(Pattern(text, leaves) for text in ours)

    def forward(self, tensors: list[Lazy]) -> list[Lazy]:
        """Ours, in the order of `ours`, from those on disk, in the order of `disk`."""
        raise NotImplementedError

    def backward(self, tensors: list[Lazy]) -> list[Lazy]:
        """Those on disk, from ours."""
        raise NotImplementedError


class Rename(Rule):
    """The same tensor under another name."""

    def __init__(self, disk: str, ours: str):
        super().__init__([disk], [ours])

    def forward(self, tensors: list[Lazy]) -> list[Lazy]:
        return tensors

    def backward(self, tensors: list[Lazy]) -> list[Lazy]:
        return tensors


class Transpose(Rule):
    """A matrix stored the other way round; vectors (biases) stay as they are."""

    def __init__(self, disk: str, ours: str):
        super().__init__([disk], [ours])

    def forward(self, tensors: list[Lazy]) -> list[Lazy]:
        return [_transposed(tensor) for tensor in tensors]

    backward = forward


def _transposed(tensor: Lazy) -> Lazy:
    return tensor.derive(tensor.shape[::-1], lambda value: value.T.contiguous() if value.dim() == 2 else value)


class Split(Rule):
    """One tensor on disk holds several of ours, one after the other along their first dimension; `transposed`: a matrix
    is stored the other way round, so that they lie along its second."""

    def __init__(self, disk: str, ours: Sequence[str], *, sizes: Sequence[int], transposed: bool = False):
        super().__init__([disk], ours)
        self.sizes = tuple(sizes)
        self.transposed = transposed

    def forward(self, tensors: list[Lazy]) -> list[Lazy]:
        (whole,) = tensors
        shape = whole.shape[::-1] if self.transposed else whole.shape
        if shape[0] != sum(self.sizes):
            raise FileError(f"{self.disk[0].text}: {shape[0]} rows cannot be split into {self.sizes}")
        parts, begin = [], 0
        for size in self.sizes:
            parts.append(whole.derive((size, *shape[1:]), partial(self._part, begin=begin, size=size)))
            begin += size
        return parts

    def _part(self, whole: Tensor, *, begin: int, size: int) -> Tensor:
        if self.transposed and whole.dim() == 2:
            return whole[:, begin : begin + size].T.contiguous()
        return whole[begin : begin + size]

    def backward(self, tensors: list[Lazy]) -> list[Lazy]:
        first = tensors[0]
        whole = Lazy((sum(self.sizes), *first.shape[1:]), first.dtype, lambda: torch.cat([tensor.load() for tensor in tensors]))
        return [_transposed(whole) if self.transposed else whole]


class Interleave(Rule):
    """As Split, where each of `groups` (heads, say) holds its own stretch of every one of ours: those of the first group come
    first, then those of the second."""

    def __init__(self, disk: str, ours: Sequence[str], *, sizes: Sequence[int], groups: int):
        super().__init__([disk], ours)
        self.sizes = tuple(sizes)
        self.groups = groups

    def forward(self, tensors: list[Lazy]) -> list[Lazy]:
        (whole,) = tensors
        if whole.shape[0] != sum(self.sizes):
            raise FileError(f"{self.disk[0].text}: {whole.shape[0]} rows cannot be split into {self.sizes}")
        return [whole.derive((size, *whole.shape[1:]), partial(self._part, number=k)) for k, size in enumerate(self.sizes)]

    def _part(self, whole: Tensor, *, number: int) -> Tensor:
        stretches = whole.unflatten(0, (self.groups, -1)).split([size // self.groups for size in self.sizes], 1)
        return stretches[number].flatten(0, 1)

    def backward(self, tensors: list[Lazy]) -> list[Lazy]:
        first = tensors[0]
        return [Lazy((sum(self.sizes), *first.shape[1:]), first.dtype, lambda: self._join([tensor.load() for tensor in tensors]))]

    def _join(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], 1).flatten(0, 1)


class Stack(Rule):
    """Several tensors of one shape on disk are one of ours, with a new first dimension."""

    def __init__(self, disk: Sequence[str], ours: str):
        super().__init__(disk, [ours])

    def forward(self, tensors: list[Lazy]) -> list[Lazy]:
        first = tensors[0]
        return [Lazy((len(tensors), *first.shape), first.dtype, lambda: torch.stack([tensor.load() for tensor in tensors]))]

    def backward(self, tensors: list[Lazy]) -> list[Lazy]:
        (whole,) = tensors
        return [whole.derive(whole.shape[1:], lambda value, k=k: value[k]) for k in range(len(self.disk))]


class Drop(Rule):
    """Stored by some writers, computed or shared here: read over, never written.

    With `same_as`, the name of a module on disk, the tensor must equal that module's: what is dropped is then known to
    be a copy, such as the head of a model that ties it to its embedding.
    """

    def __init__(self, disk: str, *, same_as: str | None = None):
        super().__init__([disk], [], leaves=r"\w+")
        self.same_as = same_as

    def check(self, name: str, leaf: str, tensors: Mapping[str, Lazy]) -> None:
        """Raise `FileError` unless `name` is the copy that it is taken for."""
        if self.same_as is None:
            return
        twin = f"{self.same_as}.{leaf}"
        if twin not in tensors or tensors[twin].shape != tensors[name].shape or not torch.equal(tensors[twin].load(), tensors[name].load()):
            raise FileError(f"{name} is said to be tied to {twin}, but the two differ; one of config.json and the weights is wrong")

    def forward(self, tensors: list[Lazy]) -> list[Lazy]:
        return []


class Reshape(Rule):
    """The same numbers in another shape: `there` on disk, `here` of ours. Names are those of tensors, with their leaf."""

    def __init__(self, disk: str, ours: str, *, there: Sequence[int], here: Sequence[int]):
        super().__init__([disk], [ours])
        self.there, self.here = tuple(there), tuple(here)
        assert math.prod(self.there) == math.prod(self.here)

    def forward(self, tensors: list[Lazy]) -> list[Lazy]:
        if tuple(tensors[0].shape) != self.there:
            raise FileError(f"{self.disk[0].text} is {list(tensors[0].shape)}, expected {list(self.there)}")
        return [tensors[0].derive(self.here, lambda value: value.reshape(self.here))]

    def backward(self, tensors: list[Lazy]) -> list[Lazy]:
        return [tensors[0].derive(self.there, lambda value: value.reshape(self.there))]


def within(rules: Iterable[Rule], *, disk: str, ours: str) -> list[Rule]:
    """The rules of a model that is a part of another: names on disk stand behind `disk`, names of ours behind `ours`."""
    inner = []
    for rule in rules:
        moved = copy.copy(rule)
        moved.disk = tuple(Pattern(disk + pattern.text, pattern.leaves) for pattern in rule.disk)
        moved.ours = tuple(Pattern(ours + pattern.text, pattern.leaves) for pattern in rule.ours)
        if isinstance(moved, Drop) and moved.same_as is not None:
            moved.same_as = disk + moved.same_as
        inner.append(moved)
    return inner


@dataclass
class _Group:
    """The tensors of one use of a rule: one layer's q, k and v, say."""

    rule: Rule
    values: dict[str, str | None]
    members: dict[int, Lazy] = field(default_factory=dict)


def forward(rules: Sequence[Rule], tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Our tensors, lazily, from those on disk. Raises `FileError` if one is unknown or part of a group is missing."""
    groups, left = _match([(rule, rule.disk) for rule in rules], tensors)
    _refuse_leftovers(left, "stored there", "this model has no place for them")
    for group in groups:
        if isinstance(group.rule, Drop):
            name = group.rule.disk[0].fill(group.values)
            group.rule.check(name, str(group.values["leaf"]), tensors)
    return _emit((group, group.rule.disk, group.rule.ours, group.rule.forward) for group in groups)


def backward(rules: Sequence[Rule], tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """The tensors on disk, lazily, from ours. Raises `FileError` if one has no name there."""
    groups, left = _match([(rule, rule.ours) for rule in rules], tensors)
    _refuse_leftovers(left, "of this model", "the family's format has no place for them")
    return _emit((group, group.rule.ours, group.rule.disk, group.rule.backward) for group in groups)


@dataclass(frozen=True)
class Site:
    """A linear map on disk: the modules of ours that it holds, one after the other along its outputs. `transposed`: it
    is stored as [in, out]."""

    ours: tuple[str, ...]
    transposed: bool


def sites(rules: Sequence[Rule], modules: Iterable[str]) -> dict[str, Site]:
    """The linear maps on disk, by name, that hold these modules of ours; a module that none holds is left out."""
    out: dict[str, Site] = {}
    for module in modules:
        for rule in rules:
            values = next((values for pattern in rule.ours if (values := pattern.match(module)) is not None), None)
            if values is not None and isinstance(rule, Rename | Transpose | Split):
                turned = isinstance(rule, Transpose) or (isinstance(rule, Split) and rule.transposed)
                out[rule.disk[0].fill(values)] = Site(tuple(pattern.fill(values) for pattern in rule.ours), turned)
                break
    return out


def _match(sides: Sequence[tuple[Rule, tuple[Pattern, ...]]], tensors: Mapping[str, Lazy]) -> tuple[list[_Group], list[str]]:
    groups: dict[tuple[object, ...], _Group] = {}
    left = []
    for name, lazy in tensors.items():
        for number, (rule, patterns) in enumerate(sides):
            found = next(((k, values) for k, pattern in enumerate(patterns) if (values := pattern.match(name)) is not None), None)
            if found is not None:
                k, values = found
                key = (number, *sorted((str(a), str(b)) for a, b in values.items()))
                groups.setdefault(key, _Group(rule, values)).members[k] = lazy
                break
        else:
            left.append(name)
    return list(groups.values()), left


def _emit(work: Iterable[tuple]) -> dict[str, Lazy]:
    out: dict[str, Lazy] = {}
    for group, sources, targets, convert in work:
        missing = [source.fill(group.values) for k, source in enumerate(sources) if k not in group.members]
        if missing:
            present = sources[next(iter(group.members))].fill(group.values)
            raise FileError(f"{present} is there, but {missing[0]}, which belongs to it, is missing ({len(missing)} missing in all)")
        made = convert([group.members[k] for k in range(len(sources))])
        for target, lazy in zip(targets, made, strict=True):
            name = target.fill(group.values)
            if name in out:
                raise FileError(f"two tensors claim the name {name}")
            out[name] = lazy
    return out


def _refuse_leftovers(left: Sequence[str], where: str, why: str) -> None:
    if left:
        raise FileError(f"{len(left)} tensors {where} are left over, {why}: {some(left)}")


def some(names: Sequence[str], *, shown: int = 5) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
