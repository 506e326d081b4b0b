"""Adapters in PEFT's layout, both ways: `adapter_config.json` and `adapter_model.safetensors`.

One `Format` for each `peft_type` (io/peft_*.py); what PEFT has no format for is written with our own names under the type
TRIVIUM. `trivium_adapter.json` beside them records which base weights the adapter was trained on, which PEFT does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor

from .. import __version__
from ..adapt.adapter import Adapter, adapter_tensors, adapters, kept, updates
from ..adapt.passes import Pass
from ..core.errors import ConfigError, FileError, unknown
from ..core.spec import Spec, validate
from ..models.transformer import TransformerModel
from ..nn.nf4 import Nf4Linear
from .directory import weights_digest
from .files import atomic_directory, read_json, write_json
from .peft_format import CONFIG, PREFIX, WEIGHTS, Format, PeftConfig, say_rounding, take
from .peft_gated import GatedFormat
from .peft_ia3 import Ia3Format
from .peft_lora import LoraFormat
from .peft_virtual import EncoderFormat, PrefixFormat, PromptFormat
from .tensors import Lazy, read_file, write_file

__all__ = ["CONFIG", "KEPT", "PREFIX", "RECORD", "WEIGHTS", "AdapterRecord", "read", "read_config", "read_kept", "read_record", "write"]

RECORD = "trivium_adapter.json"
KEPT = "trivium_kept.safetensors"  # what undoing a merge needs to know of the base, by our names of places
# Keys that say nothing about what the adapter computes, and what keys that we do not read must hold: PEFT's defaults.
IGNORED = frozenset(
    {"peft_version", "inference_mode", "auto_mapping", "megatron_core", "qalora_group_size", "loftq_config", "runtime_config"}
)


class OwnConfig(PeftConfig):
    """adapter_config.json of what PEFT cannot say."""

    peft_type: Literal["TRIVIUM"]
    adapter: SerializeAsAny[Adapter]


class OwnFormat(Format):
    """Any adapter, with our names of its tensors."""

    peft_type = "TRIVIUM"
    config = OwnConfig

    def read(self, path: Path, config: Any, tensors: Mapping[str, Lazy], model: TransformerModel, family: str, name: str) -> Adapter:
        step = config.adapter.replace(name=name)
        step.apply(model)
        mine = adapter_tensors(model, name)
        shapes = {_generic(key, name): tuple(parameter.shape) for key, parameter in mine.items()}
        found = take(path, tensors, shapes)
        with torch.no_grad():
            for key, parameter in mine.items():
                parameter.copy_(found[_generic(key, name)])
        say_rounding(path, tensors, model)
        return step

    def write(self, step: Any, model: TransformerModel, family: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"adapter": step.replace(name="default").to_dict()}, {
            _generic(key, step.name): tensor for key, tensor in adapter_tensors(model, step.name).items()
        }


def _generic(key: str, name: str) -> str:
    """A tensor's name without the adapter's."""
    return key.replace(f".{name}.", ".default.", 1)


FORMATS: dict[str, Format] = {
    entry.peft_type: entry
    for entry in (LoraFormat(), PromptFormat(), EncoderFormat(), PrefixFormat(), GatedFormat(), Ia3Format(), OwnFormat())
}
WRITES = {
    "lora": "LORA",
    "dora": "LORA",
    "prompt": "PROMPT_TUNING",
    "prefix": "PREFIX_TUNING",
    "llama_adapter": "ADAPTION_PROMPT",
    "ia3": "IA3",
}


class AdapterRecord(Spec):
    """trivium_adapter.json."""

    format: Literal[1] = 1
    version: str
    base: str | None = Field(None, description="digest of the base's weight files")
    extend: str | None = Field(None, description="how the base's context was extended when the adapter was trained, as load takes it")
    passes: tuple[SerializeAsAny[Pass], ...] = Field((), description="what was done to the base before the adapter was put on it")
    dtype: str | None = Field(None, description="what the base was in when that was done")
    template: str | None = Field(None, description="the chat template that the adapter was trained with, where it is not the base's")


def read_config(path: Path | str) -> PeftConfig:
    """The adapter_config.json in directory `path`. Raises `FileError` or `ConfigError` for what it holds and we cannot do."""
    where = Path(path) / CONFIG
    config = read_json(where)
    if (kind := config.get("peft_type")) not in FORMATS:
        raise ConfigError(f"{where}: {unknown('peft_type', str(kind), FORMATS)}", field="peft_type", value=kind, choices=FORMATS)
    entry = FORMATS[kind]
    fields = entry.config.model_fields
    read = {key: value for key, value in config.items() if key in fields and value is not None}
    for key, value in config.items():
        if key in entry.values:
            fine = value in entry.values[key]
        else:
            fine = key in fields or key in IGNORED | entry.ignored or value in (None, False, {}, [])
        if not fine:
            raise ConfigError(f"{where}: {key} = {value!r:.80} is not supported", field=key, value=value)
    return validate(entry.config, read, where=str(where))


def read(
    path: Path | str, model: TransformerModel, *, family: str, base: Path | None = None, name: str = "default", accept: bool = False
) -> Adapter:
    """Put the adapter in directory `path` on `model` as `name`; returns its pass, which is then on the model's list.

    `family` is the base's model_type, whose names the adapter uses. With `base`, the base's directory, an adapter that
    records other base weights is refused unless `accept`. Raises before anything is changed.
    """
    path = Path(path)
    config, tensors = read_config(path), read_file(path / WEIGHTS)
    _check_base(path, base, accept=accept)
    return FORMATS[config.peft_type].read(path, config, tensors, model, family, name)


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
    dtype: torch.dtype | None = None,
    template: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write adapter `name` of `model` to directory `path`, whole or not at all, as PEFT would.

    `base` is the directory of the base model, whose weights are recorded; `base_name` what PEFT should load as the
    base, that directory if nothing is said. `family` is the base's model_type. `extend`: how the base's context was extended.
    `dtype`: what the tensors are stored in; None keeps the model's. `template`: the chat template, where it is not the base's.
    """
    updates(model, name)  # an unknown name is an error that lists the known
    step = adapters(model)[name]
    entry = FORMATS[WRITES.get(step.kind, OwnFormat.peft_type)]
    entry = entry if entry.holds(step) else FORMATS[OwnFormat.peft_type]
    own, tensors = entry.write(step, model, family)
    config = {
        "peft_type": entry.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name or (str(base) if base else None),
        "revision": revision,
        "inference_mode": True,
        **own,
    }
    with atomic_directory(Path(path), overwrite=overwrite) as partial:
        write_file(partial / WEIGHTS, {key: Lazy.of(tensor.detach().to(dtype or tensor.dtype)) for key, tensor in tensors.items()})
        write_json(partial / CONFIG, config)
        if known := kept(model, name):
            write_file(partial / KEPT, {path: Lazy.of(tensor) for path, tensor in known.items()})
        before = tuple(done for done in model.passes if not isinstance(done, Adapter))
        if base is not None or extend is not None or template is not None or before:
            record = AdapterRecord(
                version=__version__,
                base=None if base is None else weights_digest(base),
                extend=extend,
                template=template,
                passes=before,  # type: ignore[arg-type]
                dtype=str(_came_in(model)).removeprefix("torch.") if before else None,
            )
            write_json(partial / RECORD, {"format": 1, **record.to_dict()})


def _came_in(model: TransformerModel) -> torch.dtype:
    """The dtype of the weights that passes were applied to: rounded to another one first, they would be quantized otherwise."""
    origins = [module.origin for module in model.modules() if isinstance(module, Nf4Linear)]
    return next((origin for origin in origins if origin is not None), model.dtype)


def read_record(path: Path | str) -> AdapterRecord | None:
    """The trivium_adapter.json of the adapter in directory `path`, or None if it has none."""
    where = Path(path) / RECORD
    if not where.exists():
        return None
    try:
        return validate(AdapterRecord, read_json(where), where=RECORD)
    except ConfigError as error:
        raise FileError(f"{where}: {error}") from None


def read_kept(path: Path | str) -> dict[str, Tensor]:
    """What the adapter in directory `path` keeps of its base for undoing a merge; empty where it keeps nothing."""
    where = Path(path) / KEPT
    return {key: lazy.load() for key, lazy in read_file(where).items()} if where.is_file() else {}


def _check_base(path: Path, base: Path | None, *, accept: bool) -> None:
    record = None if base is None or accept else read_record(path)
    if base is None or record is None or record.base is None:
        return
    if (found := weights_digest(base)) != record.base:
        raise FileError(
            f"{path}: was trained on other base weights ({record.base[:12]}) than those in {base} ({found[:12]}); "
            "load it on its own base, or accept the difference"
        )
