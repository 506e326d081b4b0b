"""What a computation would hold in memory, found by running it on tensors that hold nothing.

`ghost` gives a model's parameters shapes, dtypes and a device but no bytes; the real code then runs on them, and a `Ledger`
follows every storage from its birth to its end. No formula per part is needed, and none can go stale. Integer and boolean
tensors stay real, so documents and targets are those of the batch. What a kernel takes inside for a moment is not seen.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
LARGE = 32 << 20  # glibc maps blocks above this one by one, and gives them back whole
DEVICE = torch.ops.prim.device.default


def ghost(model: nn.Module, *, device: str = "cpu") -> None:
    """Give every parameter of a model on the meta device the semblance of being on `device`. In place."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = FakeTensor(mode, parameter.detach(), torch.device(device))
            setattr(module, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))


@contextmanager
def followed(ledger: Ledger) -> Iterator[None]:
    """Inside, `ledger` follows what is computed."""
    with ledger, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


class Ledger(TorchDispatchMode):
    """Within it, storages are followed. `live` is what is held now and `peak` what was held at the worst moment, bytes by
    kind; `kind` names a tensor's kind where it is born."""

    def __init__(self, kind: Callable[[Tensor], str] = lambda tensor: "tensors"):
        super().__init__()
        self.kind = kind
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.moved = 0  # bytes that operations read and wrote
        self.churned = 0  # bytes that were born in blocks below `LARGE`
        self._held: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def note(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Tensors that are there already."""
        for tensor in tensors:
            self._born(tensor, kind)

    def mark(self) -> None:
        """Forget the worst moment so far, and what was moved and born."""
        self.peak = self.live.copy()
        self.moved = self.churned = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked thousands of times
        if func in INDEXING:  # how many places a selector chooses is read off the real one
            args = (args[0], _places(args[1]), *args[2:])
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._born(tensor, None)
        if not _views(func):
            self.moved += sum(leaf.nbytes for leaf in (*tree_leaves((args, kwargs)), *made) if isinstance(leaf, Tensor))
        return out

    def _born(self, tensor: Tensor, kind: str | None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        size, kind = storage.nbytes(), kind or self.kind(tensor)

        def gone(_: object) -> None:
            del self._held[key]
            self.live[kind] -= size

        self._held[key] = weakref.ref(storage, gone)
        self.live[kind] += size
        self.churned += size if size < LARGE else 0
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()


@cache
def _views(func: Any) -> bool:
    """Whether an operation gives another look at its input and moves nothing."""
    return func is aten._unsafe_view.default or any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)


def _places(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for index in indices:
        found += index.nonzero(as_tuple=True) if index is not None and index.dtype == torch.bool else [index]
    return found
