"""Any adapter that weights of the base can express, as LoRA or DoRA of the rank that is asked for.

The nearest matrix of a rank is the singular value decomposition cut there (Eckart and Young 1936). An update that is of low rank
already is decomposed through its factors' QR, so that no full matrix is formed. Without a rank, factors stay as they are: what
started from the base's own weights (PiSSA, OLoRA) becomes plain LoRA of twice the rank, on the base as it was.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.errors import ConfigError, TriviumError
from ..models.model import BuiltModel
from ..nn.adapted import AdaptedLinear, LinearUpdate, LowRank
from ..nn.adapted_dora import Dora, norms
from ..nn.adapted_maps import Whole
from .adapter import Adapter, adapters, linear_updates, remove_adapter, updates
from .dora import DoRA
from .lora import LoRA

Kind = Literal["lora", "dora"]


@dataclass(frozen=True)
class _Factors:
    """An update of one map: scale * B A, with A [R, in], B [out, R]. `lost`: what cutting the rank took away of it, as a share of
    its Frobenius norm; `magnitude` [out]: DoRA's."""

    A: Tensor
    B: Tensor
    scale: float
    lost: float
    magnitude: Tensor | None


@torch.no_grad()
def refit(model: BuiltModel[Any], name: str = "default", *, rank: int | None = None, kind: Kind = "lora") -> dict[str, float]:
    """Put LoRA (or DoRA) of at most `rank` in the place of adapter `name`; maps that were trained whole stay so.

    Returns what each map's update lost, as a share of its Frobenius norm. Raises `ConfigError` for a method that no weights of
    the base can express, or that has no rank of its own where none is given.
    """
    maps, old = linear_updates(model, name), adapters(model)[name]
    whole = {path: update for path, (_, update) in maps.items() if isinstance(update, Whole)}
    found = {path: _factors(old, host, update, rank, kind) for path, (host, update) in maps.items() if path not in whole}
    if not found:
        raise ConfigError(f"adapter {name!r} trains maps whole, and nothing beside them: it has no rank", field="rank")
    remove_adapter(model, name)
    _step(old, found, tuple(whole), kind).apply(model)
    for path, (_, update) in updates(model, name).items():
        if isinstance(update, Whole):
            update.load_state_dict(whole[path].state_dict())
            continue
        low = update.low if isinstance(update, Dora) else update
        low.A.copy_(found[path].A)
        low.B.copy_(found[path].B)
        if isinstance(update, Dora) and (magnitude := found[path].magnitude) is not None:
            update.magnitude.copy_(magnitude)
    return {path: factors.lost for path, factors in found.items()}


def _factors(old: Adapter, host: AdaptedLinear, update: LinearUpdate, rank: int | None, kind: Kind) -> _Factors:
    low = update.low if isinstance(update, Dora) and kind == "dora" else update
    weight, bias = host.base.weight, host.base.bias
    if isinstance(low, LowRank):
        A, B = (torch.cat([block[side].float() for block in low.blocks()], side) for side in (0, 1))
        A, B, lost = (A, B, 0.0) if rank is None or rank >= len(A) else _cut(A, B, rank)
        scale = low.scale
    else:
        merged, shifted = update.merged(weight, bias)
        if bias is not None and shifted is not None and not torch.equal(shifted, bias.float()):
            raise TriviumError(f"adapter {old.name!r} of kind {old.kind!r} changes biases, which LoRA cannot")
        rank = len(update.low.A) if rank is None and isinstance(update, Dora) else rank
        if rank is None:
            raise ConfigError(f"adapter {old.name!r} of kind {old.kind!r} has no rank of its own: say which (--rank)", field="rank")
        left, values, right = torch.linalg.svd(merged - weight.float(), full_matrices=False)
        A, B, lost = _pair(left, values, right, rank)
        scale = 1.0
    magnitude = None
    if kind == "dora":
        magnitude = update.magnitude if isinstance(update, Dora) else norms(weight.float() + scale * B @ A)
    return _Factors(A, B, scale, lost, magnitude)


def _cut(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The nearest pair of `rank` to B A."""
    outer, r_outer = torch.linalg.qr(B)
    inner, r_inner = torch.linalg.qr(A.T)
    left, values, right = torch.linalg.svd(r_outer @ r_inner.T, full_matrices=False)
    return _pair(outer @ left, values, right @ inner.T, rank)


def _pair(left: Tensor, values: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Factors of the largest `rank` of a singular value decomposition, each with the root of a value, and the share that is lost."""
    root = values[:rank].sqrt()
    whole, cut = values.norm().item(), values[rank:].norm().item()
    return root[:, None] * right[:rank], left[:, :rank] * root, cut / whole if whole else 0.0


def _step(old: Adapter, found: dict[str, _Factors], whole: tuple[str, ...], kind: Kind) -> LoRA:
    """The pass that says these factors, each map by its name."""
    ranks = {path: len(factors.A) for path, factors in found.items()}
    alphas = {path: factors.scale * len(factors.A) for path, factors in found.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return (DoRA if kind == "dora" else LoRA)(
        name=old.name,
        rank=rank,
        alpha=alpha,
        targets=tuple(found),
        ranks={path: own for path, own in ranks.items() if own != rank},
        alphas={path: own for path, own in alphas.items() if own != alpha},
        dropout=old.dropout if isinstance(old, LoRA) else 0.0,
        full=whole,
    )
