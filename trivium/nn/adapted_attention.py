"""LLaMA-Adapter (arXiv:2303.16199): learned tokens that a layer's queries attend to by a softmax of their own, whose result is
added times gates that start at zero: one for each head, as in the paper, or one for the layer, as in PEFT. Their keys
have no positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapted import Adapted, AdaptedLinear, Place, Update
from .linear import Linear
from .products import Product
from .step import Step


class GatedPrompt(Update):
    """`prompt` [length, C] and `gate` [gates] of one layer: 1, or one for each head."""

    def __init__(self, length: int, dim: int, *, gates: int, like: Tensor):
        super().__init__()
        self.prompt = nn.Parameter(like.new_empty(length, dim))
        self.gate = nn.Parameter(like.new_empty(gates))

    @torch.no_grad()
    def reset(self, generator: torch.Generator, host: Adapted, model: nn.Module) -> None:
        self.prompt.copy_(torch.randn(self.prompt.shape, generator=generator))
        self.gate.zero_()

    def forward(self, q: Tensor, keys: nn.Module, values: nn.Module, scale: float) -> Tensor:
        """Queries [B, H, T, D] -> [B, H, T, D]; `keys` and `values` are the layer's own maps."""
        k, v = (_plain(self.prompt, linear).unflatten(-1, (-1, q.shape[-1])).transpose(0, 1) for linear in (keys, values))
        k, v = (x.repeat_interleave(q.shape[1] // len(x), 0) for x in (k, v))  # [H, length, D]
        weights = F.softmax(scale * (q @ k.mT).float(), -1).to(q.dtype)
        return self.gate[:, None, None] * (weights @ v)


class AttentionPrompts(Place):
    """The place of learned tokens beside the keys of one attention layer."""

    def forward(self, q: Tensor, mixed: Tensor, maps: nn.Module, scale: float, step: Step) -> Tensor:
        """What the heads gave, `mixed` [B, H, T, D] for queries of that shape, with what the learned tokens add."""
        keys, values = maps.get_submodule("k"), maps.get_submodule("v")
        for name, rows in self.chosen(step):
            update = self.adapters[name]
            if rows is None:
                return mixed + update(q, keys, values, scale)
            mixed = mixed.index_add(0, rows, update(q[rows], keys, values, scale))
        return mixed

    def products(self, step: Step, maps: nn.Module, *, wide: int, q: bool) -> list[Product]:
        """The products of `forward`, each adapter's as if it were alone. `wide`: of all heads' queries; `q`: whether they have a
        gradient."""
        found = []
        weights = [_base(maps.get_submodule(name)).weight for name in ("k", "v")]
        for update in self.adapters.values():
            assert isinstance(update, GatedPrompt)
            length = len(update.prompt)
            found += [Product(2 * length * weight.numel(), True, weight.requires_grad) for weight in weights]
            found += [Product(2 * step.inputs.shape.numel() * length * wide, left, True) for left in (q, True)]
        return found


def _plain(x: Tensor, linear: nn.Module) -> Tensor:
    """A map's own product, without other adapters' updates: they are chosen by row, and this has none."""
    return _base(linear).times(x)


def _base(linear: nn.Module) -> Linear:
    base = linear.base if isinstance(linear, AdaptedLinear) else linear
    assert isinstance(base, Linear)
    return base
