"""LoRA adapters in PEFT's layout, both ways: `adapter_config.json` and `adapter_model.safetensors`.

The family's weight rules carry the names. `trivium_adapter.json` beside them records which base weights the adapter
was trained on, which PEFT does not. What PEFT can say and we cannot (DoRA, saved modules, biases) is refused by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from .. import __version__
from ..adapt.lora import LoRA, adapters, updates
from ..adapt.passes import linears, matches
from ..core.errors import ConfigError, FileError
from ..core.log import log
from ..core.spec import Spec, validate
from ..models.transformer import TransformerModel
from .directory import NATIVE, weights_digest
from .files import atomic_directory, read_json, write_json
from .hf import families
from .rules import some, to_disk
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
    base: str = Field(description="digest of the base's weight files")


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
    theirs = _names(model, family)
    stored = _stored(path, _without_copies(path, tensors, model, theirs), theirs)
    matched = {mine for mine, name_there in theirs.items() if _is_target(config, name_there)}
    if matched != set(stored):
        odd = sorted(matched ^ set(stored))
        raise FileError(
            f"{path}: target_modules and the stored tensors disagree about {some([theirs[mine] for mine in odd])} ({len(odd)} modules)"
        )
    ranks, alphas = {}, {}
    shapes = {mine: tuple(module.weight.shape) for mine, module in linears(model).items()}
    for mine, (a, b) in stored.items():
        ranks[mine] = _pattern(config.rank_pattern, theirs[mine], config.r)
        alphas[mine] = _pattern(config.alpha_pattern, theirs[mine], config.lora_alpha)
        outputs, inputs = shapes[mine]
        if a.shape != (ranks[mine], inputs) or b.shape != (outputs, ranks[mine]):
            raise FileError(
                f"{path}: {theirs[mine]} holds A {list(a.shape)} and B {list(b.shape)}, "
                f"expected [{ranks[mine]}, {inputs}] and [{outputs}, {ranks[mine]}]: another rank, or another base"
            )
    step = LoRA(
        name=name,
        rank=config.r,
        alpha=config.lora_alpha,
        rsqrt=config.use_rslora,
        targets=tuple(_endings(stored, theirs)),
        ranks={mine: rank for mine, rank in ranks.items() if rank != config.r},
        alphas={mine: alpha for mine, alpha in alphas.items() if alpha != config.lora_alpha},
        dropout=config.lora_dropout,
    )
    step.apply(model)
    model.train(model.training)  # what the pass added follows the mode of the rest
    with torch.no_grad():
        for mine, (_, update) in updates(model, name).items():
            for parameter, lazy in zip((update.A, update.B), stored[mine], strict=True):
                parameter.copy_(lazy.load())
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
    overwrite: bool = False,
) -> None:
    """Write adapter `name` of `model` to directory `path`, whole or not at all, as PEFT would.

    `base` is the directory of the base model, whose weights are recorded; `base_name` what PEFT should load as the
    base, that directory if nothing is said. `family` is the base's model_type.
    """
    chosen = updates(model, name)
    step = adapters(model)[name]
    theirs = _names(model, family)
    if lost := [mine for mine in chosen if mine not in theirs]:
        raise ConfigError(f"adapter {name!r}: model_type {family!r} has no module of its own for {some(lost)}")
    targets = [theirs[mine] for mine in chosen]
    alphas = {mine: _longest(step.alphas, mine, step.alpha) for mine in chosen}
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
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted(_endings(targets, theirs.values())),
        "rank_pattern": _patterns({theirs[mine]: update.A.shape[0] for mine, (_, update) in chosen.items()}, step.rank, theirs.values()),
        "alpha_pattern": _patterns({theirs[mine]: alpha for mine, alpha in alphas.items()}, step.alpha, theirs.values()),
    }
    tensors = {}
    for mine, (_, update) in chosen.items():
        for part, parameter in (("lora_A", update.A), ("lora_B", update.B)):
            tensors[f"{PREFIX}{theirs[mine]}.{part}.weight"] = Lazy.of(parameter.detach())
    with atomic_directory(Path(path), overwrite=overwrite) as partial:
        write_file(partial / WEIGHTS, tensors)
        write_json(partial / CONFIG, config)
        if base is not None:
            write_json(partial / RECORD, {"format": 1, **AdapterRecord(version=__version__, base=weights_digest(base)).to_dict()})


def _names(model: TransformerModel, family: str) -> dict[str, str]:
    """Our linear maps by the family's names for them; those that it stores in another form are left out."""
    mine = list(linears(model))
    if family == NATIVE:
        return {name: name for name in mine}
    rules = families.get(family).rules(model.spec)
    return {name: found for name in mine if (found := to_disk(rules, name)) is not None}


def _without_copies(path: Path, tensors: Mapping[str, Lazy], model: TransformerModel, theirs: Mapping[str, str]) -> dict[str, Lazy]:
    """`tensors` without the copies of base weights that PEFT adds where the head is adapted; they must equal the base's."""
    modules = {f"{PREFIX}{theirs[mine]}": module for mine, module in linears(model).items() if mine in theirs}
    out = {}
    for key, lazy in tensors.items():
        module = modules.get(key.removesuffix(".weight").removesuffix(".base_layer"))
        if module is None or not key.endswith(".weight"):
            out[key] = lazy
        elif module.weight.shape != lazy.shape or not torch.equal(module.weight.to(lazy.dtype).cpu(), lazy.load()):
            raise FileError(f"{path / WEIGHTS}: {key} replaces weights of the base, which is not supported; plain LoRA on linear maps is")
    return out


def _stored(path: Path, tensors: Mapping[str, Lazy], theirs: Mapping[str, str]) -> dict[str, tuple[Lazy, Lazy]]:
    """Our module -> (A, B). Raises `FileError` on any tensor that is not half of such a pair."""
    mine = {found: name for name, found in theirs.items()}
    pairs: dict[str, dict[str, Lazy]] = {}
    left = []
    for key, lazy in tensors.items():
        found = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_(A|B)\.weight", key)
        if found is None or found[1] not in mine:
            left.append(key)
        else:
            pairs.setdefault(mine[found[1]], {})[found[2]] = lazy
    if left:
        raise FileError(f"{path / WEIGHTS}: {len(left)} tensors are left over, this base has no place for them: {some(left)}")
    if half := [theirs[name] for name, pair in pairs.items() if len(pair) != 2]:
        raise FileError(f"{path / WEIGHTS}: one of A and B is missing for {some(half)}")
    if not pairs:
        raise FileError(f"{path / WEIGHTS}: holds no tensors, so the adapter changes nothing")
    return {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}


def _check_base(path: Path, base: Path | None, *, accept: bool) -> None:
    if base is None or accept or not (path / RECORD).exists():
        return
    try:
        record = validate(AdapterRecord, read_json(path / RECORD), where=RECORD)
    except ConfigError as error:
        raise FileError(f"{path / RECORD}: {error}") from None
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
