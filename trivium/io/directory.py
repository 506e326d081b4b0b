"""Model directories in Hugging Face's layout, with `trivium.json` beside it for what that layout cannot say.

Reading builds the spec on the meta device, replays passes and fills tensors in from the mapped files: nothing is
drawn, nothing is held twice. Writing fills a sibling directory and renames it into place. Hugging Face's files are the
truth; `trivium.json` adds the spec, passes, prompt settings and lineage, and says if a file was edited since.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, SerializeAsAny, field_validator
from torch import Tensor, nn

from .. import __version__
from ..adapt.passes import Pass, apply_passes
from ..core import device as devices
from ..core.config import diff
from ..core.errors import ConfigError, FileError, TriviumError
from ..core.spec import Spec, parts, validate
from ..models.model import BuiltModel, Model, with_kind
from ..models.transformer import build
from ..nn.low_bit import PackedLinear
from ..nn.nf4 import Nf4Linear
from .files import atomic_directory, read_json, sha256, write_json
from .hf import families
from .rules import backward, forward, some
from .tensors import INDEX, SHARD_BYTES, SINGLE, Lazy, read_weights, weight_files, write_weights

if TYPE_CHECKING:
    from ..text.prompt import Prompt
    from ..text.tokenizer import Tokenizer

FORMAT = 1
NATIVE = "trivium"  # the model_type of what no family can say
RECORD, CONFIG, GENERATION = "trivium.json", "config.json", "generation_config.json"
# Files that change what a model is or says, even when they were added later.
KNOWN = (
    *(CONFIG, GENERATION, SINGLE, INDEX, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
)
TRUSTED_ABOVE = 32_000_000  # bytes; larger files with unchanged size and time are not hashed again on each load


class Mark(Spec):
    """What a file was when the record was written."""

    size: int = Field(ge=0)
    mtime_ns: int
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Record(Spec):
    """trivium.json."""

    format: Literal[1] = FORMAT
    version: str = Field(description="the version of trivium that wrote it")
    spec: SerializeAsAny[Model]
    passes: tuple[SerializeAsAny[Pass], ...] = ()
    parts: dict[str, str] = Field({}, description="by kind, the modules that parts not of this package came from")
    prompt: dict[str, Any] = Field({}, description="the prompt contract's settings")
    allowed: tuple[str, ...] = Field((), description="keys of config.json that the family does not know and the user allowed")
    lineage: tuple[dict[str, Any], ...] = Field((), description="what this was made from, step by step")
    files: dict[str, Mark]

    @field_validator("spec", mode="before")
    @classmethod
    def _kind(cls, spec: Any) -> Any:
        return with_kind(spec)

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, Mark]) -> dict[str, Mark]:
        for name in files:
            if Path(name).name != name:
                raise ValueError(f"{name!r:.100} is no file of this directory")
        return files


@dataclass(frozen=True)
class Loaded:
    """A model with what its directory says of it. `family` is the model_type; `rest` the keys of `config` carried along."""

    model: BuiltModel[Any]
    path: Path
    family: str
    config: Mapping[str, Any]
    rest: Mapping[str, Any]
    prompt: Mapping[str, Any]
    lineage: tuple[Mapping[str, Any], ...]

    @property
    def spec(self) -> Any:
        return self.model.spec

    @property
    def passes(self) -> tuple[Any, ...]:
        return self.model.passes


def read(
    path: Path | str,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    accept: bool = False,
    allow_unknown: Collection[str] = (),
) -> Loaded:
    """The model in directory `path`, with or without a trivium.json; in eval mode.

    `dtype` None keeps what is stored. `accept` adopts edits made since trivium.json was written, and records them.
    `allow_unknown` names keys of config.json that are carried although the family does not know them.
    Raises `FileError` for what is damaged, missing or edited, `ConfigError` for what cannot be expressed.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileError(f"{path}: is no directory")
    config, record = read_json(path / CONFIG), read_record(path)
    edits = [] if record is None else edited(path, record)
    if edits and not accept:
        raise FileError(
            f"{path}: changed since {RECORD} was written: {'; '.join(_explain(edit, config, record) for edit in edits)}. "
            "Put the old file back, or accept the change (trivium inspect --accept)"
        )
    allowed = {*allow_unknown, *(record.allowed if record else ())}
    spec, rest = _read_spec(config, record, allowed, trust_record=not edits)
    model = apply_passes(_frame(spec), record.passes if record else ())
    tensors = _inward(config["model_type"], spec, read_weights(path))
    fill(model, tensors, dtype=None if dtype is None else devices.dtype(dtype), device=devices.device(device))
    if record is not None and edits:
        kept = tuple(sorted(allowed & set(rest)))
        prompt = {name: value for name, value in record.prompt.items() if name != "template"}  # that hash went with the edit
        record = record.replace(version=__version__, spec=spec, allowed=kept, prompt=prompt, files=_marks(path, {}))
        _write_record(path, record)
    prompt, lineage = (record.prompt, record.lineage) if record else ({}, ())
    return Loaded(model.eval(), path, str(config["model_type"]), config, rest, prompt, lineage)


def write(
    path: Path | str,
    model: BuiltModel[Any],
    *,
    family: str = NATIVE,
    rest: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    prompt: Prompt | None = None,
    generation_config: Mapping[str, Any] | None = None,
    lineage: Sequence[Mapping[str, Any]] = (),
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> dict[str, str]:
    """Write `model` to directory `path`, whole or not at all; returns the SHA-256 of each file.

    `family` is the model_type to write; one that cannot express the spec refuses with the reason. `trivium` can always.
    A family's files hold no passes: merge adapters first, or save them as adapters. `rest` is what reading gave.
    """
    path, rest = Path(path), dict(rest or {})
    dtype = str(model.dtype).removeprefix("torch.")
    if family == NATIVE:
        config = {**rest, "model_type": NATIVE, "architectures": [type(model).__name__], "dtype": dtype}
        allowed = []
    else:
        if model.passes:
            kinds = ", ".join(step.kind for step in model.passes)
            raise TriviumError(f"{path}: model_type {family!r} cannot hold passes ({kinds}): merge them first, or save the adapter alone")
        speaker = families.get(family)
        config = {**speaker.to_hf(model.spec, rest), "dtype": dtype}
        allowed = speaker.unknown_keys(config)
    with atomic_directory(path, overwrite=overwrite) as partial:
        hashes = write_weights(partial, _outward(model, family), shard_bytes=shard_bytes)
        write_json(partial / CONFIG, config)
        if generation_config is not None:
            write_json(partial / GENERATION, dict(generation_config))
        if tokenizer is not None:
            tokenizer.save(partial)
        if prompt is not None:
            prompt.save(partial)
        record = Record(
            version=__version__,
            spec=model.spec,
            passes=model.passes,
            parts=_foreign(model.spec, *model.passes),
            prompt=prompt.settings() if prompt is not None else {},
            allowed=tuple(allowed),
            lineage=tuple(dict(step) for step in lineage),
            files=_marks(partial, hashes),
        )
        _write_record(partial, record)
    return {name: mark.sha256 for name, mark in record.files.items()}


def assemble(
    config: Mapping[str, Any],
    tensors: Mapping[str, Lazy],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    allow_unknown: Collection[str] = (),
) -> tuple[BuiltModel[Any], dict[str, Any]]:
    """The model that a config in Hugging Face's form and tensors by Hugging Face's names make, and the config's rest."""
    spec, rest = _read_spec(config, None, allow_unknown, trust_record=False)
    model = _frame(spec)
    fill(model, _inward(config["model_type"], spec, tensors), dtype=dtype, device=devices.device(device))
    return model.eval(), rest


def fill(
    model: BuiltModel[Any], tensors: Mapping[str, Lazy], *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> None:
    """Give every parameter of `model` (built on the meta device) the tensor of its name. `dtype` None keeps each as stored.

    Raises `FileError` if names or shapes differ, or if dtypes are mixed and none was chosen.
    """
    wanted = dict(model.named_parameters())
    if missing := [name for name in wanted if name not in tensors]:
        raise FileError(f"{len(missing)} tensors of this model are not stored there: {some(missing)}")
    if extra := [name for name in tensors if name not in wanted]:
        raise FileError(f"{len(extra)} tensors stored there are left over, this model has no place for them: {some(extra)}")
    shapes = {name: (list(tensors[name].shape), list(parameter.shape)) for name, parameter in wanted.items()}
    if odd := [f"{name} {there}, expected {here}" for name, (there, here) in shapes.items() if there != here]:
        raise FileError(f"{len(odd)} tensors have another shape than the config says: {some(odd)}")
    kinds = Counter(str(tensors[name].dtype).removeprefix("torch.") for name in wanted if tensors[name].dtype.is_floating_point)
    if dtype is None and len(kinds) > 1:
        raise FileError(f"tensors are stored as {', '.join(sorted(kinds))}: choose one with dtype")
    filled = {}
    for name, parameter in wanted.items():
        lazy = tensors[name] if dtype is None else tensors[name].to(dtype)
        filled[parameter] = nn.Parameter(lazy.load().to(device), requires_grad=parameter.requires_grad)
    for module in model.modules():  # one that several modules share stays one
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, filled[parameter])
    left = [name for name, tensor in chain(model.named_parameters(), model.named_buffers()) if tensor.is_meta]
    assert not left, f"still on the meta device: {some(left)}"


def exported(model: BuiltModel[Any], *, family: str) -> dict[str, Tensor]:
    """`model`'s tensors by the names, and in the form, that `family` writes them."""
    return {name: lazy.load() for name, lazy in _outward(model, family).items()}


def weights_digest(path: Path) -> str:
    """One hash for the weights in directory `path`: of the names and hashes of its files."""
    record = read_record(path)
    hashes = {file.name: _hash(file, None if record is None else record.files.get(file.name)) for file in weight_files(path)}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def read_record(path: Path) -> Record | None:
    """The directory's trivium.json, or None if it has none."""
    if not (path / RECORD).exists():
        return None
    data = read_json(path / RECORD)
    if data.get("format", FORMAT) != FORMAT:
        raise FileError(f"{path / RECORD}: is of format {data['format']!r:.20}; this version reads format {FORMAT}. Use a newer trivium")
    try:
        return validate(Record, data, where=RECORD)
    except ConfigError as error:
        raise FileError(f"{path / RECORD}: {error}{_unmet(data)}") from None


def _foreign(*specs: Spec) -> dict[str, str]:
    """Where those parts of `specs` came from that are not this package's own, by kind."""
    found = {part.kind: type(part).__module__ for spec in specs for part in parts(spec)}
    return {kind: module for kind, module in sorted(found.items()) if module.partition(".")[0] != __name__.partition(".")[0]}


def _unmet(data: Mapping[str, Any]) -> str:
    """What to do where a record names modules that are not there; nothing is imported because a file says so."""
    named = data.get("parts")
    missing = sorted({str(module) for module in named.values()} - set(sys.modules)) if isinstance(named, Mapping) else []
    return f"; its parts came from {some(missing)}: give that file with --import, or install the package" if missing else ""


@dataclass(frozen=True)
class Edit:
    """A file that is not what its record says: `before` and `after` are hashes, None where there is no such file."""

    file: str
    before: str | None
    after: str | None


def edited(path: Path, record: Record, *, full: bool = False) -> list[Edit]:
    """What was changed, removed or added since `record` was written.

    Every file is compared by its hash, except that a large one whose size and time are as recorded is taken to be
    unchanged unless `full`: hashing takes longer than loading does.
    """
    edits = []
    for name, mark in record.files.items():
        file = path / name
        if not file.is_file():
            edits.append(Edit(name, mark.sha256, None))
            continue
        if (found := sha256(file) if full else _hash(file, mark)) != mark.sha256:
            edits.append(Edit(name, mark.sha256, found))
    return edits + [Edit(name, None, sha256(path / name)) for name in KNOWN if name not in record.files and (path / name).is_file()]


def _hash(file: Path, mark: Mark | None) -> str:
    """The file's SHA-256; of a large file that looks unchanged, the recorded one."""
    stat = file.stat()
    if mark is not None and stat.st_size > TRUSTED_ABOVE and (stat.st_size, stat.st_mtime_ns) == (mark.size, mark.mtime_ns):
        return mark.sha256
    return sha256(file)


def _explain(edit: Edit, config: Mapping[str, Any], record: Record | None) -> str:
    if edit.after is None:
        return f"{edit.file} was removed"
    if edit.before is None:
        return f"{edit.file} was added"
    text = f"{edit.file} was edited (sha256 {edit.before[:12]}, now {edit.after[:12]})"
    if edit.file != CONFIG or record is None or config.get("model_type") == NATIVE:
        return text
    try:
        now, _ = _read_spec(config, None, record.allowed, trust_record=False)
    except ConfigError as error:
        return f"{text}: {error}"
    changes = [f"{field}: {before!r}, now {after!r}" for field, before, after in diff(record.spec.with_plain_names(), now)]
    return f"{text}: {some(changes)}" if changes else f"{text}: nothing that shapes the model"


def _read_spec(
    config: Mapping[str, Any], record: Record | None, allow_unknown: Collection[str], *, trust_record: bool
) -> tuple[Model, dict[str, Any]]:
    kind = config.get("model_type")
    if kind == NATIVE:
        if record is None:
            raise FileError(f"{CONFIG} says model_type {NATIVE!r}, whose spec stands in {RECORD}; that file is missing")
        rest = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "dtype")}
        return record.spec, rest
    if not isinstance(kind, str):
        raise FileError(f"{CONFIG}: names no model_type, so there is no telling what this model is")
    family = families.get(kind, field=f"{CONFIG}.model_type")
    spec, rest = family.to_spec(config, allow_unknown=allow_unknown)
    if record is not None and trust_record:
        if record.spec.with_plain_names() != spec:
            rows = [f"{field}: {here!r} there, {there!r} here" for field, here, there in diff(record.spec.with_plain_names(), spec)]
            raise FileError(f"{RECORD} and {CONFIG} disagree: {some(rows)}")
        spec = record.spec
    return spec, rest


def _frame(spec: Model) -> BuiltModel[Any]:
    """The model on the meta device. Sizes come from a file, and torch refuses those that no memory could hold."""
    try:
        return build(spec)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ConfigError(f"no model of these sizes can be built: {str(error).splitlines()[0]}") from None


def _inward(family: str, spec: Model, tensors: Mapping[str, Lazy]) -> Mapping[str, Lazy]:
    """Stored tensors by our names; our own form has them already."""
    return tensors if family == NATIVE else forward(families.get(family).weight_rules(spec), tensors)


def _outward(model: BuiltModel[Any], family: str) -> Mapping[str, Lazy]:
    """The model's tensors by the names of `family`. Refused where weights are not there as such."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            raise TriviumError(f"{name} was packed for inference, and its weights are gone: save the model before pack_weights")
        if isinstance(module, Nf4Linear) and family != NATIVE:
            raise TriviumError(
                f"{name} holds its weights in four bits, for which model_type {family!r} has no place: save the adapter alone, or take "
                "full weights first (trivium.adapt.nf4.dequantize)"
            )
    ours = {name: Lazy.of(parameter.detach()) for name, parameter in model.named_parameters()}
    return ours if family == NATIVE else backward(families.get(family).weight_rules(model.spec), ours)


def _marks(path: Path, known: Mapping[str, str]) -> dict[str, Mark]:
    marks = {}
    for file in sorted(path.iterdir()):
        if file.is_file() and file.name != RECORD:
            stat = file.stat()
            marks[file.name] = Mark(size=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=known.get(file.name) or sha256(file))
    return marks


def _write_record(path: Path, record: Record) -> None:
    write_json(path / RECORD, {"format": FORMAT, **record.to_dict()})
