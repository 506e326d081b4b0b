"""LoRA adapters in PEFT's layout, both ways: `adapter_config.json` and `adapter_model.safetensors`.

The family's weight rules carry the names. Where the family fuses maps on disk, an adapter of the fused map is read as
one A that ours share, and adapters of ours apart are written as one of the summed rank. `trivium_adapter.json` beside
them records which base weights the adapter was trained on, which PEFT does not. What PEFT can say and we cannot (DoRA,
saved modules, biases) is refused by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from .. import __version__
from ..adapt.lora import LoRA, adapters, updates
from ..adapt.passes import linears, matches
from ..core.errors import ConfigError, FileError
from ..core.log import log
from ..core.spec import Spec, validate
from ..models.transformer import TransformerModel
from ..nn.adapted import LowRank
from .directory import NATIVE, weights_digest
from .files import atomic_directory, read_json, write_json
from .hf import families
from .rules import Site, sites, some
from .tensors import Lazy, read_file, write_file

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "trivium_adapter.json"
PREFIX = "base_model.model."
# Keys that say nothing about what the adapter computes, and what keys that we do not read must hold: PEFT's defaults.
IGNORED = frozenset(
    {"peft_version", "inference_mode", "auto_mapping", "megatron_core", "qalora_group_size", "loftq_config", "runtime_config"}
)
STARTS = (True, False, "gaussian", "orthogonal")  # ways to draw A and B that leave the base as it is
LAYER = re.compile(r"(?:.*?\.)?[^.]*\.(\d+)\.(.*)")  # the layer's number, and what stands after it


class AdapterConfig(Spec):
    """What is read from adapter_config.json; field names and defaults are PEFT's."""

    peft_type: Literal["LORA"]
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int = Field(8, gt=0)
    lora_alpha: float = 8
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}


class AdapterRecord(Spec):
    """trivium_adapter.json."""

    format: Literal[1] = 1
    version: str
    base: str | None = Field(None, description="digest of the base's weight files")
    extend: str | None = Field(None, description="how the base's context was extended when the adapter was trained, as load takes it")


def read_config(path: Path | str) -> AdapterConfig:
    """The adapter_config.json in directory `path`. Raises `FileError` or `ConfigError` for what it holds and we cannot do."""
    where = Path(path) / CONFIG
    config = read_json(where)
    read = {key: value for key, value in config.items() if key in AdapterConfig.model_fields and value is not None}
    if (start := config.get("init_lora_weights", True)) not in STARTS:
        raise ConfigError(f"{where}: init_lora_weights {start!r:.40} changes the base as well; convert it to plain LoRA in PEFT first")
    for key, value in config.items():
        plain = value in (None, False, {}, []) or (key == "bias" and value == "none")
        if key not in AdapterConfig.model_fields and key not in IGNORED and key != "init_lora_weights" and not plain:
            raise ConfigError(f"{where}: {key} = {value!r:.80} is not supported; plain LoRA on linear maps is", field=key, value=value)
    return validate(AdapterConfig, read, where=str(where))


def read(
    path: Path | str, model: TransformerModel, *, family: str, base: Path | None = None, name: str = "default", accept: bool = False
) -> LoRA:
    """Put the adapter in directory `path` on `model` as `name`; returns its pass, which is then on the model's list.

    `family` is the base's model_type, whose names the adapter uses. With `base`, the base's directory, an adapter that
    records other base weights is refused unless `accept`. Raises before anything is changed.
    """
    path = Path(path)
    config, tensors = read_config(path), read_file(path / WEIGHTS)
    _check_base(path, base, accept=accept)
    places = _sites(model, family)
    stored = _stored(path, _without_copies(path, tensors, model, places), places)
    if odd := sorted({place for place in places if _is_target(config, place)} ^ set(stored)):
        raise FileError(f"{path}: target_modules and the stored tensors disagree about {some(odd)} ({len(odd)} modules)")
    if config.fan_in_fan_out and not any(places[place].transposed for place in stored):
        raise ConfigError(f"{path / CONFIG}: fan_in_fan_out = true, but this base stores none of the adapted maps transposed")
    ranks, alphas = {}, {}
    shapes = {mine: tuple(module.weight.shape) for mine, module in linears(model).items()}
    for place, (a, b) in stored.items():
        parts = places[place].ours
        rank = _pattern(config.rank_pattern, place, config.r)
        ranks |= dict.fromkeys(parts, rank)
        alphas |= dict.fromkeys(parts, _pattern(config.alpha_pattern, place, config.lora_alpha))
        outputs, inputs = sum(shapes[mine][0] for mine in parts), shapes[parts[0]][1]
        if a.shape != (rank, inputs) or b.shape != (outputs, rank):
            raise FileError(
                f"{path}: {place} holds A {list(a.shape)} and B {list(b.shape)}, "
                f"expected [{rank}, {inputs}] and [{outputs}, {rank}]: another rank, or another base"
            )
    containers = {places[place].ours[0].rpartition(".")[0] for place in stored if len(places[place].ours) > 1}
    step = LoRA(
        name=name,
        rank=config.r,
        alpha=config.lora_alpha,
        rsqrt=config.use_rslora,
        targets=tuple(_endings(ranks, [mine for site in places.values() for mine in site.ours])),
        ranks={mine: rank for mine, rank in ranks.items() if rank != config.r},
        alphas={mine: alpha for mine, alpha in alphas.items() if alpha != config.lora_alpha},
        shared=tuple(_endings(containers, containers)),
        dropout=config.lora_dropout,
    )
    step.apply(model)
    chosen = updates(model, name)
    with torch.no_grad():
        for place, (a, b) in stored.items():
            parts = [chosen[mine][1] for mine in places[place].ours]
            for update, rows in zip(parts, b.load().split([len(part.B) for part in parts]), strict=True):
                update.A.copy_(a.load())
                update.B.copy_(rows)
    dtypes = {lazy.dtype for pair in stored.values() for lazy in pair}
    if rounded := [dtype for dtype in dtypes if torch.finfo(dtype).eps < torch.finfo(model.dtype).eps]:
        log.warn(f"{path}: stored as {str(rounded[0])[6:]}, rounded to the model's {str(model.dtype)[6:]}")
    return step


def write(
    path: Path | str,
    model: TransformerModel,
    *,
    family: str,
    name: str = "default",
    base: Path | None = None,
    base_name: str | None = None,
    revision: str | None = None,
    extend: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write adapter `name` of `model` to directory `path`, whole or not at all, as PEFT would.

    `base` is the directory of the base model, whose weights are recorded; `base_name` what PEFT should load as the
    base, that directory if nothing is said. `family` is the base's model_type. `extend`: how the base's context was extended.
    """
    chosen = updates(model, name)
    step = adapters(model)[name]
    places = _sites(model, family)
    known = {mine for site in places.values() for mine in site.ours}
    if lost := [mine for mine in chosen if mine not in known]:
        raise ConfigError(f"adapter {name!r}: model_type {family!r} has no module of its own for {some(lost)}")
    outputs = {mine: len(module.weight) for mine, module in linears(model).items()}
    written = {
        place: _fused(step, {mine: (outputs[mine], chosen[mine][1] if mine in chosen else None) for mine in site.ours})
        for place, site in places.items()
        if any(mine in chosen for mine in site.ours)
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name or (str(base) if base else None),
        "revision": revision,
        "inference_mode": True,
        "r": step.rank,
        "lora_alpha": int(step.alpha) if step.alpha == int(step.alpha) else step.alpha,
        "lora_dropout": step.dropout,
        "use_rslora": step.rsqrt,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": any(places[place].transposed for place in written),
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted(_endings(written, places)),
        "rank_pattern": _patterns({place: len(update.A) for place, update in written.items()}, step.rank, places),
        "alpha_pattern": _patterns({place: update.alpha for place, update in written.items()}, step.alpha, places),
    }
    tensors = {}
    for place, update in written.items():
        for part, tensor in (("lora_A", update.A), ("lora_B", update.B)):
            tensors[f"{PREFIX}{place}.{part}.weight"] = Lazy.of(tensor)
    with atomic_directory(Path(path), overwrite=overwrite) as partial:
        write_file(partial / WEIGHTS, tensors)
        write_json(partial / CONFIG, config)
        if base is not None or extend is not None:
            record = AdapterRecord(version=__version__, base=None if base is None else weights_digest(base), extend=extend)
            write_json(partial / RECORD, {"format": 1, **record.to_dict()})


def _sites(model: TransformerModel, family: str) -> dict[str, Site]:
    """The linear maps that the family stores, by its names, and which of ours each one holds."""
    mine = list(linears(model))
    if family == NATIVE:
        return {name: Site((name,), transposed=False) for name in mine}
    return sites(families.get(family).weight_rules(model.spec), mine)


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
    blocks = list({id(update.A): update.A for update in mine.values()}.values())
    rank, alpha = sum(map(len, blocks)), _longest(step.alphas, next(iter(mine)), step.alpha)
    scale = max((update.scale for update in mine.values()), key=abs)
    stripes = []
    for outputs, update in parts.values():
        columns = [blocks[0].new_zeros(outputs, len(block)) for block in blocks]
        if update is not None:
            place = next(k for k, block in enumerate(blocks) if block is update.A)
            columns[place] = update.B if update.scale == scale else (update.B.float() * (update.scale / scale)).to(update.B.dtype)
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
            raise FileError(f"{path / WEIGHTS}: {key} replaces weights of the base, which is not supported; plain LoRA on linear maps is")
    return out


def _stored(path: Path, tensors: Mapping[str, Lazy], places: Mapping[str, Site]) -> dict[str, tuple[Lazy, Lazy]]:
    """The map's name on disk -> (A, B). Raises `FileError` on any tensor that is not half of such a pair."""
    pairs: dict[str, dict[str, Lazy]] = {}
    left = []
    for key, lazy in tensors.items():
        found = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_(A|B)\.weight", key)
        if found is None or found[1] not in places:
            left.append(key)
        else:
            pairs.setdefault(found[1], {})[found[2]] = lazy
    if left:
        raise FileError(f"{path / WEIGHTS}: {len(left)} tensors are left over, this base has no place for them: {some(left)}")
    if half := [name for name, pair in pairs.items() if len(pair) != 2]:
        raise FileError(f"{path / WEIGHTS}: one of A and B is missing for {some(half)}")
    if not pairs:
        raise FileError(f"{path / WEIGHTS}: holds no tensors, so the adapter changes nothing")
    return {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}


def read_record(path: Path | str) -> AdapterRecord | None:
    """The trivium_adapter.json of the adapter in directory `path`, or None if it has none."""
    where = Path(path) / RECORD
    if not where.exists():
        return None
    try:
        return validate(AdapterRecord, read_json(where), where=RECORD)
    except ConfigError as error:
        raise FileError(f"{where}: {error}") from None


def _check_base(path: Path, base: Path | None, *, accept: bool) -> None:
    record = None if base is None or accept else read_record(path)
    if base is None or record is None or record.base is None:
        return
    if (found := weights_digest(base)) != record.base:
        raise FileError(
            f"{path}: was trained on other base weights ({record.base[:12]}) than those in {base} ({found[:12]}); "
            "load it on its own base, or accept the difference"
        )


def _is_target(config: AdapterConfig, module: str) -> bool:
    """Whether PEFT would adapt the module of this name on disk."""
    if _listed(config.exclude_modules, module):
        return False
    targets = config.target_modules
    if targets == "all-linear":
        return module != "lm_head"
    if isinstance(targets, str) or module in targets or not _listed(targets, module):
        return _listed(targets, module)
    layers, containers = config.layers_to_transform, config.layers_pattern or ()
    if layers is None or layers == ():
        return True
    if (found := LAYER.match(module)) is None or int(found[1]) not in ((layers,) if isinstance(layers, int) else layers):
        return False
    containers = (containers,) if isinstance(containers, str) else containers
    return not containers or any(f".{container}.{found[1]}." in f".{module}" for container in containers)


def _listed(patterns: str | tuple[str, ...] | None, module: str) -> bool:
    """A string is a regular expression of the whole name; a list holds names or their endings."""
    if isinstance(patterns, str):
        return _regex(patterns)(module)
    return any(matches(module, pattern) for pattern in patterns or ())


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the name, or its end at a dot, as a regular expression."""
    endings = [module, *(module[place + 1 :] for place, char in enumerate(module) if char == ".")]
    return next((value for pattern, value in patterns.items() if any(map(_regex(pattern), endings))), default)


def _regex(pattern: str) -> Callable[[str], bool]:
    """A full match of `pattern`, which comes from a file: one that could take forever is refused."""
    if len(pattern) > 300 or re.search(r"\)[*+{]", pattern) or len(re.findall(r"(?<!\\)[*+{]", pattern)) > 4:
        raise FileError(f"the pattern {pattern!r:.60} in an adapter's config is too involved to be run; list the modules by name")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise FileError(f"the pattern {pattern!r:.60} in an adapter's config is no regular expression: {error}") from None
    return lambda text: compiled.fullmatch(text) is not None


def _longest(patterns: Mapping[str, float], name: str, default: float) -> float:
    """Our rule: the longest pattern that the name ends in."""
    hits = [pattern for pattern in patterns if matches(name, pattern)]
    return patterns[max(hits, key=len)] if hits else default


def _endings(chosen: Collection[str], every: Collection[str]) -> list[str]:
    """The shortest list of names and endings that picks out `chosen` among `every`: what all layers share is said once."""

    def ending(name: str) -> str:
        found = LAYER.match(name)
        return found[2] if found else name

    have, could = Counter(map(ending, chosen)), Counter(map(ending, every))
    return list(dict.fromkeys(ending(name) if have[ending(name)] == could[ending(name)] else name for name in chosen))


def _patterns(values: Mapping[str, Any], default: Any, every: Collection[str]) -> dict[str, Any]:
    """`values` by name as a short mapping from endings, without those that are the default."""
    out = {}
    for value in dict.fromkeys(values.values()):
        if value != default:
            out |= dict.fromkeys(_endings([name for name, found in values.items() if found == value], every), value)
    return out
