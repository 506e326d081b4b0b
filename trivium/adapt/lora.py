"""LoRA (arXiv:2106.09685): low-rank updates beside frozen linear maps; rank-stabilized scale (arXiv:2312.03732).

The pass changes structure; `initialize` draws the updates; `merge` adds them into the base and takes the pass away,
`unmerge` takes them out again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ..core.errors import ConfigError, TriviumError, unknown
from ..core.seed import generator
from ..models.model import BuiltModel
from ..nn.adapted import AdaptedLinear, LowRank, Sharing
from ..nn.linear import Linear
from .passes import Pass, linears, matches, replace_module, select

N = TypeVar("N", int, float)


class LoRA(Pass):
    """W + (alpha / rank) B A on chosen linear maps; only A and B are trained."""

    kind: Literal["lora"] = "lora"
    name: str = Field("default", pattern=r"^[A-Za-z_][\w-]*$", description="what the adapter is called; several can be loaded")
    rank: int = Field(16, gt=0, description="rank of each update")
    alpha: float = Field(32.0, description="updates are scaled by alpha / rank")
    rsqrt: bool = Field(False, description="scale by alpha / sqrt(rank) instead (rsLoRA)")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="module names or their endings, such as q or ffn.out"
    )
    ranks: Mapping[str, int] = Field({}, description="ranks of single maps, by name or ending")
    alphas: Mapping[str, float] = Field({}, description="alphas of single maps, by name or ending")
    shared: tuple[str, ...] = Field((), description="containers, such as mixer.inp, whose maps share one A: as one fused map would")
    dropout: float = Field(0.0, ge=0, lt=1, description="chance of an input channel to be dropped on its way into A, in training")

    @field_validator("targets", mode="before")
    @classmethod
    def _one_target(cls, value: object) -> object:
        return (value,) if isinstance(value, str) and value != "all-linear" else value

    @classmethod
    def tiny(cls) -> LoRA:
        return cls(rank=3, alpha=5.0, targets=("q", "ffn.out"), ranks={"q": 2})

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rsqrt else rank)

    def change(self, model: BuiltModel[Any]) -> None:
        chosen = select(model, self.targets, what=f"adapter {self.name!r}")
        for field, patterns in (("ranks", self.ranks), ("alphas", self.alphas)):
            for pattern in patterns:
                if not any(matches(name, pattern) for name in chosen):
                    raise ConfigError(
                        f"adapter {self.name!r}: {field}: {pattern!r} matches none of the adapted maps", field=field, value=pattern
                    )
        for parameter in model.parameters():
            parameter.requires_grad_(False)
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
        _number(model, (*adapters(model), self.name))

    def _adapt(self, model: BuiltModel[Any], maps: Mapping[str, Linear | AdaptedLinear]) -> None:
        """Put an update beside each of `maps`; all of them share the first one's A."""
        leader: LowRank | None = None
        for name, module in maps.items():
            if isinstance(module, AdaptedLinear):
                adapted = module
            else:
                adapted = AdaptedLinear(module)
                replace_module(model, name, adapted)
            if self.name in adapted.lora:
                raise ConfigError(f"an adapter called {self.name!r} is there already ({name}); give this one another name")
            outputs, inputs = adapted.weight.shape
            rank = _of(self.ranks, name, self.rank)
            if rank > min(inputs, outputs) * len(maps):  # one A shared by n maps may hold the n that they had apart
                raise ConfigError(
                    f"adapter {self.name!r}: rank {rank} is above the size of {name} ({outputs} x {inputs})", field="rank", value=rank
                )
            scale = self.scale(rank, _of(self.alphas, name, self.alpha))
            if leader is None:
                update = leader = LowRank(inputs, outputs, rank=rank, scale=scale, dropout=self.dropout, like=adapted.weight)
            elif rank != leader.A.shape[0]:
                raise ConfigError(f"adapter {self.name!r}: {', '.join(maps)} share one A, so their ranks must be equal", field="ranks")
            else:
                update = Sharing(leader, outputs, scale=scale)
            adapted.lora[self.name] = update


def _of(patterns: Mapping[str, N], name: str, default: N) -> N:
    """The entry whose pattern matches `name` (the longest wins), else the default."""
    hits = sorted((pattern for pattern in patterns if matches(name, pattern)), key=len)
    return patterns[hits[-1]] if hits else default


def adapters(model: BuiltModel[Any]) -> dict[str, LoRA]:
    """The LoRA passes on the model, by name, in order: their places are the numbers in `Inputs.adapters`."""
    return {step.name: step for step in model.passes if isinstance(step, LoRA)}


def _number(model: BuiltModel[Any], order: tuple[str, ...]) -> None:
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.numbered(order)


def updates(model: BuiltModel[Any], name: str) -> dict[str, tuple[AdaptedLinear, LowRank]]:
    """The linear maps that adapter `name` changes, with its update of each."""
    known = adapters(model)
    if name not in known:
        raise TriviumError(unknown("adapter", name, known), value=name, choices=known)
    found = {}
    for path, module in linears(model).items():
        if isinstance(module, AdaptedLinear) and name in module.lora:
            update = module.lora[name]
            assert isinstance(update, LowRank)
            found[path] = (module, update)
    return found


def initialize_adapter(model: BuiltModel[Any], name: str = "default", *, seed: int) -> None:
    """Draw adapter `name`: A uniform, B zero. Each matrix depends on the seed and its place alone."""
    for path, (_, update) in updates(model, name).items():
        update.reset(generator(seed, name, path))


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

    @property
    def relative(self) -> float:
        return self.max_logit_difference / max(self.logit_deviation, 1e-12)


@torch.no_grad()
def merge(model: BuiltModel[Any], name: str = "default", *, probe: Tensor) -> MergeReport:
    """Add adapter `name` into the base weights and take its pass away. `probe` [B, T]: tokens on which the difference
    is measured. Sums are made in float32 and rounded once."""
    model.eval()
    chosen = updates(model, name)
    before = model(probe).logits.float()
    for path, (module, update) in chosen.items():
        weight = module.base.weight
        weight.copy_((weight.float() + update.delta()).to(weight.dtype))
        del module.lora[name]
        if not len(module.lora):
            replace_module(model, path, module.base)
    model.passes = tuple(step for step in model.passes if not (isinstance(step, LoRA) and step.name == name))
    _number(model, tuple(adapters(model)))
    after = model(probe).logits.float()
    before_log, after_log = before.log_softmax(-1), after.log_softmax(-1)
    return MergeReport(
        adapter=name,
        maps=len(chosen),
        max_logit_difference=(before - after).abs().max().item(),
        logit_deviation=before.std().item(),
        mean_kl=(before_log.exp() * (before_log - after_log)).sum(-1).mean().item(),
        argmax_changed=(before.argmax(-1) != after.argmax(-1)).float().mean().item(),
        tokens=probe.numel(),
    )


@torch.no_grad()
def unmerge(model: BuiltModel[Any], step: LoRA, tensors: Mapping[str, Tensor]) -> None:
    """Undo a merge: subtract the updates again and put the adapter back beside the base. `tensors`: the adapter's
    parameters by their names in the model. Exact up to the rounding of the base's dtype."""
    step.apply(model)
    for path, (module, update) in updates(model, step.name).items():
        for part, parameter in update.named_parameters():
            key = f"{path}.lora.{step.name}.{part}"
            if key not in tensors:
                raise TriviumError(f"the adapter has no tensor {key}")
            parameter.copy_(tensors[key])
        weight = module.base.weight
        weight.copy_((weight.float() - update.delta()).to(weight.dtype))


def adapter_tensors(model: BuiltModel[Any], name: str = "default") -> dict[str, Tensor]:
    """Adapter `name`'s parameters by their names in the model."""
    return {
        f"{path}.lora.{name}.{part}": parameter
        for path, (_, update) in updates(model, name).items()
        for part, parameter in update.named_parameters()
    }
