"""A model as a GGUF file: what `family` reads, said the other way, by the same two tables of names.

The spec first becomes the config of `llama`, so what that family cannot say is refused with its reason; then keys, tensor
names, rotary rows and Llama 3's factors follow. Matrices get the type asked for; vectors and norms stay F32, as llama.cpp
wants them. What the file cannot carry along comes back as a note.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.errors import ConfigError, FileError, unknown
from ...models.transformer import TransformerModel
from ...text.gguf_export import metadata as vocabulary
from ...text.tokenizer import Tokenizer
from ..hf import families
from ..rules import backward, some
from ..tensors import Lazy
from .dequantize import CHUNK, TYPES
from .family import ARCHITECTURES, LLAMA3, ROPE_FACTORS, llama3_factors
from .quantize import quantize
from .writer import Stored, write_gguf

ARCH = "llama"
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # general.file_type
NAMES = {"fp32": "f32", "float32": "f32", "fp16": "f16", "float16": "f16", "bfloat16": "bf16"}
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZATION_VERSION = 2  # of ggml's block layouts
ENDS = ("eos", "eot", "eom")


@dataclass(frozen=True)
class Written:
    """What was written: the `type` of its matrices, the file's SHA-256, and sentences for the user."""

    path: Path
    type: str
    sha256: str
    notes: tuple[str, ...]


def write_model(
    path: Path | str,
    model: TransformerModel,
    *,
    dtype: str | None = None,
    tokenizer: Tokenizer | None = None,
    template: str | None = None,
    rest: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> Written:
    """Write `model` to the GGUF file `path`, whole or not at all, one tensor in memory at a time.

    `dtype`: f32, f16, bf16 or q8_0; None keeps the model's own. `rest` and `generation_config` are what reading gave; of
    them the ids of tokens that begin, end and pad go along. Raises `ConfigError` with the reason where GGUF's architecture
    `llama` cannot say what this model or its tokenizer does, `FileError` if the file cannot be written.
    """
    path = Path(path)
    kind = _kind(dtype, model.dtype)
    config, tensors = _in_family(path, model, rest or {})
    notes: list[str] = []
    metadata: dict[str, Any] = {
        "general.architecture": ARCH,
        "general.type": "model",
        "general.name": name or path.stem,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": QUANTIZATION_VERSION,
        **_keys(config, notes),
    }
    factors = _rope(config, metadata)
    if tokenizer is None:
        metadata["tokenizer.ggml.model"] = "none"
    else:
        found, said = vocabulary(tokenizer, size=config["vocab_size"])
        metadata |= found
        notes += said
    _special_tokens(metadata, config, generation_config or {}, notes)
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    if carried := families.get(ARCH).unknown_keys(config):
        notes.append(f"config.json's {', '.join(carried)}, allowed without being understood, have no place in GGUF and are left out")
    stored = {ROPE_FACTORS: as_stored(ROPE_FACTORS, factors, "F32")} if factors is not None else {}
    stored |= _tensors(config, tensors, kind, notes)
    if STORED.get(kind) != model.dtype and not (kind == "F32" and model.dtype in STORED.values()):
        notes.append(f"matrices are rounded from {str(model.dtype).removeprefix('torch.')} to {kind}")
    sha256 = write_gguf(path, metadata, stored, overwrite=overwrite)
    return Written(path, kind, sha256, tuple(notes))


def _kind(dtype: str | None, own: torch.dtype) -> str:
    """The ggml type of the matrices."""
    wanted = str(own).removeprefix("torch.") if dtype is None else dtype.lower()
    kind = NAMES.get(wanted, wanted).upper()
    if kind not in FILE_TYPES:
        raise ConfigError(unknown("type of GGUF tensors", wanted, [name.lower() for name in FILE_TYPES]), field="dtype", value=dtype)
    return kind


def _in_family(path: Path, model: TransformerModel, rest: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Lazy]]:
    """The model in Hugging Face's terms, as the family that the architecture stands for; tensors stay lazy."""
    if model.passes:
        kinds = ", ".join(step.kind for step in model.passes)
        raise ConfigError(f"{path}: a GGUF file cannot hold passes ({kinds}): merge them first")
    family = families.get(ARCH)
    try:
        config = family.to_hf(model.spec, rest)
    except ConfigError as error:
        raise ConfigError(f"{path}: GGUF's architecture {ARCH!r} cannot hold this model: {error}", field=error.field) from None
    return config, backward(
        family.weight_rules(model.spec), {name: Lazy.of(parameter.detach()) for name, parameter in model.named_parameters()}
    )


def _keys(config: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The architecture's metadata, from the config."""
    found: dict[str, Any] = {}
    for key in ARCHITECTURES[ARCH].keys:
        value: Any = config
        for part in key.hf.split("."):
            value = value[part]
        found[f"{ARCH}.{key.gguf}"] = key.type(value)
        if key.type is float and float(str(np.float32(value))) != value:
            notes.append(f"{ARCH}.{key.gguf}: {value!r} is stored as float32 and will be read as {float(str(np.float32(value)))!r}")
    head_dim = config["head_dim"]
    widths = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    return found | {f"{ARCH}.{key}": head_dim for key in widths} | {f"{ARCH}.vocab_size": config["vocab_size"]}


def _rope(config: Mapping[str, Any], metadata: dict[str, Any]) -> Lazy | None:
    """Add the rotary scaling's keys to `metadata`; Llama 3's comes as a tensor of factors, which is returned."""
    rope, head_dim = config["rope_parameters"], config["head_dim"]
    match rope["rope_type"]:
        case "default":
            return None
        case "linear":
            metadata |= {f"{ARCH}.rope.scaling.type": "linear", f"{ARCH}.rope.scaling.factor": float(rope["factor"])}
            return None
        case "llama3":
            factors = llama3_factors(rope, theta=rope["rope_theta"], head_dim=head_dim).astype(np.float32)
            context = rope["original_max_position_embeddings"]
            if context != LLAMA3["original_max_position_embeddings"]:
                metadata[f"{ARCH}.rope.scaling.original_context_length"] = context
            readable = LLAMA3 | {"factor": float(str(factors.max())), "original_max_position_embeddings": context}
            if lost := [f"{name} {rope[name]:g}" for name, value in readable.items() if rope[name] != value]:
                raise ConfigError(f"GGUF keeps only each frequency's factor, and those do not tell this model's {', '.join(lost)}")
            return Lazy.of(torch.from_numpy(factors))
        case other:
            raise ConfigError(f"rotary scaling {other!r} is not written to GGUF (known: linear, llama3)", field="rope_parameters")


def _special_tokens(metadata: dict[str, Any], config: Mapping[str, Any], generation_config: Mapping[str, Any], notes: list[str]) -> None:
    """Add the ids that the tokenizer itself does not name: up to three tokens end a text, a turn, a message."""
    for name, field in {"bos": "bos_token_id", "padding": "pad_token_id"}.items():
        if (id := config.get(field)) is not None:
            metadata.setdefault(f"tokenizer.ggml.{name}_token_id", id)
    listed = generation_config.get("eos_token_id", config.get("eos_token_id"))
    ids = [metadata.get("tokenizer.ggml.eos_token_id"), *(listed if isinstance(listed, list) else [listed])]
    ids = list(dict.fromkeys(id for id in ids if id is not None))
    metadata |= {f"tokenizer.ggml.{name}_token_id": id for name, id in zip(ENDS, ids, strict=False)}
    if extra := ids[len(ENDS) :]:
        notes.append(f"GGUF has words for {len(ENDS)} tokens that end a text; {extra} end one in this model too and are left out")


def _tensors(config: Mapping[str, Any], tensors: Mapping[str, Lazy], kind: str, notes: list[str]) -> dict[str, Stored]:
    """All tensors under llama.cpp's names, in the order in which they come."""
    names = {}
    for name in ARCHITECTURES[ARCH].names:
        for layer in range(config["num_hidden_layers"]) if "{}" in name.hf else (0,):
            names[name.hf.format(layer)] = (name.gguf.format(layer), name.rotary)
    if left := [name for name in tensors if name not in names]:
        raise ConfigError(f"GGUF's architecture {ARCH!r} has no place for {len(left)} tensors: {some(left)}")
    found, wide = {}, []
    for name, lazy in tensors.items():
        gguf, rotary = names[name]
        if rotary is not None:
            lazy = lazy.derive(lazy.shape, lambda value, heads=config[rotary]: interleaved(value, heads=heads))
        type = "F32" if len(lazy.shape) < 2 else kind
        if lazy.shape[-1] % TYPES[type].block:
            type = "F16"
            wide.append(gguf)
        found[gguf] = as_stored(gguf, lazy, type)
    if wide:
        notes.append(f"{len(wide)} matrices are F16, since their rows are not whole blocks of {TYPES[kind].block}: {some(wide)}")
    return found


def interleaved(rows: Tensor, *, heads: int) -> Tensor:
    """Rows of q or k, from Hugging Face's order (first halves, then second) to llama.cpp's (pairs side by side)."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def as_stored(name: str, lazy: Lazy, type: str) -> Stored:
    """A tensor as the ggml type `type`, encoded when it is written."""

    def pieces() -> Iterator[np.ndarray]:
        flat = lazy.load().detach().cpu().contiguous().view(-1)
        assert flat.numel() == math.prod(lazy.shape), f"{name}: not what was announced"
        if flat.dtype == STORED.get(type):
            yield flat.view(torch.uint8).numpy()
            return
        try:
            for part in flat.split(CHUNK):
                yield quantize(type, part.float().numpy())
        except FileError as error:
            raise FileError(f"{name}: {error}") from None

    return Stored(lazy.shape, type, pieces)
