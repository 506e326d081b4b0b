"""LoRA (arXiv:2106.09685): low-rank updates beside frozen linear maps; rank-stabilized scale (arXiv:2312.03732); starts that
are drawn, or taken from the base's own weights (PiSSA arXiv:2404.02948, OLoRA arXiv:2406.01775); further maps trained whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ..core.errors import ConfigError
from ..models.model import BuiltModel
from ..nn.adapted import AdaptedLinear, LinearUpdate, LowRank, Principal, Sharing, Start
from ..nn.adapted_maps import Whole
from ..nn.linear import Linear
from .adapter import (
    Adapter,
    MergeReport,
    adapt_linear,
    adapter_tensors,
    adapters,
    initialize_adapter,
    merge,
    of,
    unmerge,
    updates,
)
from .passes import Targets, matches, select

__all__ = ["LoRA", "MergeReport", "adapter_tensors", "adapters", "initialize_adapter", "merge", "unmerge", "updates"]


class LoRA(Adapter):
    """W + (alpha / rank) B A on chosen linear maps; only A and B are trained."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(16, gt=0, description="rank of each update")
    alpha: float = Field(32.0, description="updates are scaled by alpha / rank")
    rsqrt: bool = Field(False, description="scale by alpha / sqrt(rank) instead (rsLoRA)")
    targets: Targets = Field("all-linear", description="module names or their endings, such as q or ffn.out")
    ranks: Mapping[str, int] = Field({}, description="ranks of single maps, by name or ending")
    alphas: Mapping[str, float] = Field({}, description="alphas of single maps, by name or ending")
    shared: tuple[str, ...] = Field((), description="containers, such as mixer.inp, whose maps share one A: as one fused map would")
    dropout: float = Field(0.0, ge=0, lt=1, description="chance of an input channel to be dropped on its way into A, in training")
    start: Start = Field("kaiming", description="A is drawn uniform or normal and B is 0; or both start as a part of the base's weights")
    full: tuple[str, ...] = Field((), description="further maps that are trained whole, such as head.out")

    @classmethod
    def tiny(cls) -> LoRA:
        return cls(rank=3, alpha=5.0, targets=("q", "ffn.out"), ranks={"q": 2})

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rsqrt else rank)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shared and self.start in ("pissa", "olora"):
            raise ValueError(f"maps that share one A cannot start as parts of their own weights: leave out shared, or start ({self.start})")
        return self

    def put(self, model: BuiltModel[Any]) -> None:
        chosen = select(model, self.targets, what=f"adapter {self.name!r}")
        whole = select(model, self.full, what=f"adapter {self.name!r}: full")
        if both := sorted(set(chosen) & set(whole)):
            raise ConfigError(f"adapter {self.name!r}: {both[0]} is trained whole, and in targets as well", field="full", value=both[0])
        for field, patterns in (("ranks", self.ranks), ("alphas", self.alphas)):
            for pattern in patterns:
                if not any(matches(name, pattern) for name in chosen):
                    raise ConfigError(
                        f"adapter {self.name!r}: {field}: {pattern!r} matches none of the adapted maps", field=field, value=pattern
                    )
        containers = {name: name.rpartition(".")[0] for name in chosen}
        for pattern in self.shared:
            if not any(matches(container, pattern) for container in containers.values()):
                raise ConfigError(
                    f"adapter {self.name!r}: shared: {pattern!r} contains none of the adapted maps", field="shared", value=pattern
                )
        groups: dict[str, dict[str, Linear | AdaptedLinear]] = {}
        for name, module in chosen.items():
            shares = any(matches(containers[name], pattern) for pattern in self.shared)
            groups.setdefault(containers[name] if shares else name, {})[name] = module
        for maps in groups.values():
            self._adapt(model, maps)
        for name, module in whole.items():
            adapted = adapt_linear(model, name, module)
            adapted.lora[self.name] = Whole(adapted)

    def update(self, low: LowRank, adapted: AdaptedLinear) -> LinearUpdate:
        """What is put beside a map, around the low-rank part."""
        return low

    def _adapt(self, model: BuiltModel[Any], maps: Mapping[str, Linear | AdaptedLinear]) -> None:
        """Put an update beside each of `maps`; all of them share the first one's A."""
        leader: LowRank | None = None
        for name, module in maps.items():
            outputs, inputs = module.weight.shape
            rank = of(self.ranks, name, self.rank)
            if rank > min(inputs, outputs) * len(maps):  # one A shared by n maps may hold the n that they had apart
                raise ConfigError(
                    f"adapter {self.name!r}: rank {rank} is above the size of {name} ({outputs} x {inputs})", field="rank", value=rank
                )
            scale = self.scale(rank, of(self.alphas, name, self.alpha))
            if leader is not None and rank != leader.A.shape[0]:
                raise ConfigError(f"adapter {self.name!r}: {', '.join(maps)} share one A, so their ranks must be equal", field="ranks")
            if leader is None:
                made = Principal if self.start in ("pissa", "olora") else LowRank
                low = leader = made(inputs, outputs, rank=rank, scale=scale, dropout=self.dropout, like=module.weight, start=self.start)
            else:
                low = Sharing(leader, outputs, scale=scale)
            adapted = adapt_linear(model, name, module)
            adapted.lora[self.name] = self.update(low, adapted)
