"""LoRA and DoRA adapters in PEFT's layout, both ways, with modules trained whole beside them.

The family's weight rules carry the names. Where the family fuses maps on disk, an adapter of the fused map is read as one A that
ours share, and adapters of ours apart are written as one of the summed rank. One that starts as a part of the base's weights is
written as plain LoRA of twice the rank, which holds on the base as it was. What PEFT can say and we cannot (biases alone,
adapted embeddings) is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..adapt.adapter import initialize_adapter, of, updates
from ..adapt.dora import DoRA
from ..adapt.lora import LoRA
from ..adapt.passes import linears, matches
from ..core.errors import ConfigError, FileError
from ..models.transformer import TransformerModel
from ..nn.adapted import LowRank
from ..nn.adapted_dora import Dora, norms
from ..nn.adapted_maps import Whole
from .peft_format import CONFIG, LAYER, PREFIX, WEIGHTS, Format, PeftConfig, endings, listed, regex, say_rounding, sites_of
from .rules import Site, some
from .tensors import Lazy

FROM_BASE = ("pissa", "olora")


class LoraConfig(PeftConfig):
    """What is read from adapter_config.json; field names and defaults are PEFT's."""

    peft_type: Literal["LORA"]
    r: int = Field(8, gt=0)
    lora_alpha: float = 8
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str = True
    target_modules: str | tuple[str, ...]
    modules_to_save: tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}


@dataclass(frozen=True)
class _Stored:
    """One map's tensors on disk: A [R, in], B [out, R], and for DoRA the magnitudes [out]."""

    A: Lazy
    B: Lazy
    magnitude: Lazy | None


class LoraFormat(Format):
    """Plain LoRA where every pair is drawn, DoRA where `use_dora`."""

    peft_type = "LORA"
    config = LoraConfig
    values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "bias": ("none",),
        "init_lora_weights": (True, False, "gaussian", "orthogonal", *FROM_BASE),  # ways to start that we know the base from
    }

    def read(self, path: Path, config: Any, tensors: Mapping[str, Lazy], model: TransformerModel, family: str, name: str) -> LoRA:
        places = sites_of(model, family)
        whole, rest = _whole(path, config, tensors, places)
        stored = _stored(path, _without_copies(path, rest, model, places), places, dora=config.use_dora)
        if odd := sorted({place for place in places if _is_target(config, place)} ^ set(stored)):
            raise FileError(f"{path}: target_modules and the stored tensors disagree about {some(odd)} ({len(odd)} modules)")
        if config.fan_in_fan_out and not any(places[place].transposed for place in stored):
            raise ConfigError(f"{path / CONFIG}: fan_in_fan_out = true, but this base stores none of the adapted maps transposed")
        step = _step(path, config, stored, whole, places, model, name)
        step.apply(model)
        if step.start in FROM_BASE:
            initialize_adapter(model, name, seed=0)  # what they started from is a function of the base
        chosen = updates(model, name)
        with torch.no_grad():
            for place, tensor in stored.items():
                _fill(tensor, [chosen[mine][1] for mine in places[place].ours])
            for place, found in whole.items():
                update = chosen[places[place].ours[0]][1]
                for leaf, lazy in found.items():
                    update.get_parameter(leaf).copy_(lazy.load())
        say_rounding(path, tensors, model)
        return step

    def write(self, step: LoRA, model: TransformerModel, family: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        found = {mine: update for mine, (_, update) in updates(model, step.name).items()}
        places, own = sites_of(model, family), linears(model)
        known = {mine for site in places.values() for mine in site.ours}
        if lost := [mine for mine in found if mine not in known]:
            raise ConfigError(f"adapter {step.name!r}: model_type {family!r} has no module of its own for {some(lost)}")
        low = {mine: _low(update) for mine, update in found.items() if not isinstance(update, Whole)}
        written, tensors = {}, {}
        for place, site in places.items():
            if any(mine in low for mine in site.ours):
                update = written[place] = _fused(step, {mine: (len(own[mine].weight), low.get(mine)) for mine in site.ours})
                tensors |= {f"{PREFIX}{place}.lora_A.weight": update.A, f"{PREFIX}{place}.lora_B.weight": update.B}
                if isinstance(step, DoRA):
                    magnitudes = [_magnitude(own[mine].weight, found.get(mine)) for mine in site.ours]
                    tensors[f"{PREFIX}{place}.lora_magnitude_vector"] = torch.cat(magnitudes)
        whole = {place: found[site.ours[0]] for place, site in places.items() if isinstance(found.get(site.ours[0]), Whole)}
        for place, update in whole.items():
            if places[place].transposed or len(places[place].ours) > 1:
                raise ConfigError(f"adapter {step.name!r}: {place} is stored transposed or fused, and cannot be written as trained whole")
            tensors |= {f"{PREFIX}{place}.{leaf}": parameter for leaf, parameter in update.named_parameters()}
        twice = 2 if step.start in FROM_BASE else 1
        rank, alpha = twice * step.rank, step.alpha if twice == 1 else step.scale(step.rank, step.alpha) / step.scale(2 * step.rank, 1.0)
        return {
            "r": rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": step.dropout,
            "use_rslora": step.rsqrt,
            "use_dora": isinstance(step, DoRA),
            "bias": "none",
            "fan_in_fan_out": any(places[place].transposed for place in written),
            "init_lora_weights": True,
            "modules_to_save": sorted(endings(whole, places)) or None,
            "target_modules": sorted(endings(written, places)),
            "rank_pattern": _patterns({place: len(update.A) for place, update in written.items()}, rank, places),
            "alpha_pattern": _patterns({place: update.alpha for place, update in written.items()}, alpha, places),
        }, tensors  # fmt: skip


def _step(
    path: Path, config: LoraConfig, stored: Mapping[str, _Stored], whole: Mapping[str, Any], places: Mapping[str, Site],
    model: TransformerModel, name: str,
) -> LoRA:  # fmt: skip
    """The pass that a config says, its ranks those of the tensors."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    shapes = {mine: tuple(module.weight.shape) for mine, module in linears(model).items()}
    for place, pair in stored.items():
        parts = places[place].ours
        rank = _pattern(config.rank_pattern, place, config.r)
        ranks |= dict.fromkeys(parts, rank)
        alphas |= dict.fromkeys(parts, _pattern(config.alpha_pattern, place, config.lora_alpha))
        outputs, inputs = sum(shapes[mine][0] for mine in parts), shapes[parts[0]][1]
        if pair.A.shape != (rank, inputs) or pair.B.shape != (outputs, rank) or (pair.magnitude and pair.magnitude.shape != (outputs,)):
            raise FileError(
                f"{path}: {place} holds A {list(pair.A.shape)} and B {list(pair.B.shape)}, "
                f"expected [{rank}, {inputs}] and [{outputs}, {rank}]: another rank, or another base"
            )
    containers = {places[place].ours[0].rpartition(".")[0] for place in stored if len(places[place].ours) > 1}
    start = config.init_lora_weights if config.init_lora_weights in FROM_BASE else "kaiming"
    if containers and start in FROM_BASE:
        raise ConfigError(f"{path / CONFIG}: init_lora_weights {start!r} of a fused map: convert it to plain LoRA in PEFT first")
    return (DoRA if config.use_dora else LoRA)(
        name=name,
        rank=config.r,
        alpha=config.lora_alpha,
        rsqrt=config.use_rslora,
        targets=tuple(endings(ranks, [mine for site in places.values() for mine in site.ours])),
        ranks={mine: rank for mine, rank in ranks.items() if rank != config.r},
        alphas={mine: alpha for mine, alpha in alphas.items() if alpha != config.lora_alpha},
        shared=tuple(endings(containers, containers)),
        dropout=config.lora_dropout,
        start=start,  # type: ignore[arg-type]
        full=tuple(places[place].ours[0] for place in whole),
    )


def _fill(stored: _Stored, parts: list[Any]) -> None:
    """Copy one stored map into our updates of its parts."""
    low = [_low(part) for part in parts]
    sizes = [len(part.B) for part in low]
    for update, rows in zip(low, stored.B.load().split(sizes), strict=True):
        update.A.copy_(stored.A.load())
        update.B.copy_(rows)
    if stored.magnitude is not None:
        for part, rows in zip(parts, stored.magnitude.load().split(sizes), strict=True):
            part.magnitude.copy_(rows)


def _low(update: Any) -> LowRank:
    return update.low if isinstance(update, Dora) else update


@torch.no_grad()
def _magnitude(weight: Tensor, update: Any) -> Tensor:
    """An update's magnitudes; of a map without one, those that leave it as it is."""
    return update.magnitude if isinstance(update, Dora) else norms(weight.float()).to(weight.dtype)


def _whole(
    path: Path, config: LoraConfig, tensors: Mapping[str, Lazy], places: Mapping[str, Site]
) -> tuple[dict[str, Any], dict[str, Lazy]]:
    """The modules that are saved whole, by name on disk, as leaf to tensor; and the tensors that are left."""
    rest, found = dict(tensors), {}
    for pattern in config.modules_to_save:
        hits = [place for place, site in places.items() if matches(place, pattern) and len(site.ours) == 1 and not site.transposed]
        if not hits:
            raise ConfigError(
                f"{path / CONFIG}: modules_to_save {pattern!r}: this base has no linear map of its own there; embeddings, tied heads and "
                "fused maps cannot be replaced whole",
                field="modules_to_save",
                value=pattern,
            )
        for place in hits:
            found[place] = {leaf: rest.pop(key) for leaf in ("weight", "bias") if (key := f"{PREFIX}{place}.{leaf}") in rest}
            if "weight" not in found[place]:
                raise FileError(f"{path / WEIGHTS}: modules_to_save {pattern!r}: {PREFIX}{place}.weight is missing")
    return found, rest


@dataclass(frozen=True)
class _Update:
    """The update of one map on disk: A [R, in], B [out, R], and the alpha that scales it."""

    A: Tensor
    B: Tensor
    alpha: float


@torch.no_grad()
def _fused(step: LoRA, parts: Mapping[str, tuple[int, LowRank | None]]) -> _Update:
    """Adapter `step`'s updates of the maps that stand as one on disk (by name: outputs, and the update if it has one), as
    one: a block of columns of B for each A that they have, so that its rank is the sum of theirs. Maps that share an A
    share its block; a map without an update gets rows of zeros."""
    mine = {name: update for name, (_, update) in parts.items() if update is not None}
    blocks = list({id(A): A for update in mine.values() for A, _ in update.blocks()}.values())
    rank, alpha = sum(map(len, blocks)), of(step.alphas, next(iter(mine)), step.alpha)
    scale = max((update.scale for update in mine.values()), key=abs)
    stripes = []
    for outputs, update in parts.values():
        columns = [blocks[0].new_zeros(outputs, len(block)) for block in blocks]
        for A, B in () if update is None else update.blocks():
            place = next(k for k, block in enumerate(blocks) if block is A)
            columns[place] = B if update is None or update.scale == scale else (B.float() * (update.scale / scale)).to(B.dtype)
        stripes.append(torch.cat(columns, 1))
    if scale != step.scale(rank, alpha):
        alpha = scale / step.scale(rank, 1.0)
    return _Update(torch.cat([block.detach() for block in blocks]), torch.cat(stripes), alpha)


def _without_copies(path: Path, tensors: Mapping[str, Lazy], model: TransformerModel, places: Mapping[str, Site]) -> dict[str, Lazy]:
    """`tensors` without the copies of base weights that PEFT adds where the head is adapted; they must equal the base's."""
    own = linears(model)
    modules = {f"{PREFIX}{place}": own[site.ours[0]] for place, site in places.items() if len(site.ours) == 1 and not site.transposed}
    out = {}
    for key, lazy in tensors.items():
        module = modules.get(key.removesuffix(".weight").removesuffix(".base_layer"))
        if module is None or not key.endswith(".weight"):
            out[key] = lazy
        elif module.weight.shape != lazy.shape or not torch.equal(module.weight.to(lazy.dtype).cpu(), lazy.load()):
            raise FileError(f"{path / WEIGHTS}: {key} replaces weights of the base, which is not said: name it in modules_to_save")
    return out


def _stored(path: Path, tensors: Mapping[str, Lazy], places: Mapping[str, Site], *, dora: bool) -> dict[str, _Stored]:
    """By the map's name on disk. Raises `FileError` on any tensor that is no part of one."""
    pairs: dict[str, dict[str, Lazy]] = {}
    left = []
    for key, lazy in tensors.items():
        found = re.fullmatch(re.escape(PREFIX) + r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?", key)
        if found is None or found[1] not in places:
            left.append(key)
        else:
            pairs.setdefault(found[1], {})[found[2]] = lazy
    if left:
        raise FileError(f"{path / WEIGHTS}: {len(left)} tensors are left over, this base has no place for them: {some(left)}")
    parts = {"lora_A", "lora_B", "lora_magnitude_vector"} if dora else {"lora_A", "lora_B"}
    if half := [name for name, pair in pairs.items() if set(pair) != parts]:
        what = "one of A, B and magnitude is missing (use_dora = true)" if dora else "one of A and B is missing, or there is more,"
        raise FileError(f"{path / WEIGHTS}: {what} for {some(half)}")
    if not pairs:
        raise FileError(f"{path / WEIGHTS}: holds no tensors, so the adapter changes nothing")
    return {name: _Stored(pair["lora_A"], pair["lora_B"], pair.get("lora_magnitude_vector")) for name, pair in pairs.items()}


def _is_target(config: LoraConfig, module: str) -> bool:
    """Whether PEFT would adapt the module of this name on disk."""
    if listed(config.exclude_modules, module):
        return False
    targets = config.target_modules
    if targets == "all-linear":
        return module != "lm_head"
    if isinstance(targets, str) or module in targets or not listed(targets, module):
        return listed(targets, module)
    layers, containers = config.layers_to_transform, config.layers_pattern or ()
    if layers is None or layers == ():
        return True
    if (found := LAYER.match(module)) is None or int(found[1]) not in ((layers,) if isinstance(layers, int) else layers):
        return False
    containers = (containers,) if isinstance(containers, str) else containers
    return not containers or any(f".{container}.{found[1]}." in f".{module}" for container in containers)


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the name, or its end at a dot, as a regular expression."""
    tails = [module, *(module[place + 1 :] for place, char in enumerate(module) if char == ".")]
    return next((value for pattern, value in patterns.items() if any(map(regex(pattern), tails))), default)


def _patterns(values: Mapping[str, Any], default: Any, every: Collection[str]) -> dict[str, Any]:
    """`values` by name as a short mapping from endings, without those that are the default."""
    out = {}
    for value in dict.fromkeys(values.values()):
        if value != default:
            out |= dict.fromkeys(endings([name for name, found in values.items() if found == value], every), value)
    return out
