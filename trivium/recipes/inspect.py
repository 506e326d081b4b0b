"""What a model is, as plain values: spec, layers, sizes, hashes, lineage; and how two models differ."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core import config
from ..io import directory
from ..models import count
from ..models.transformer import TransformerModel
from .load import Bundle, load


def inspect(x: str | Path, *, accept: bool = False, allow_unknown: Collection[str] = ()) -> dict[str, Any]:
    """Facts about `x` (as `load` takes it). `accept` adopts files that were edited since trivium.json was written, and
    records them; `allow_unknown` names keys of config.json to carry unread."""
    return facts(load(x, accept=accept, allow_unknown=allow_unknown))


def facts(bundle: Bundle) -> dict[str, Any]:
    """Everything but the tensors. `cache_bytes_per_token` is what one more token of one row takes."""
    model, tokenizer, prompt = bundle.model, bundle.tokenizer, bundle.prompt
    record = directory.read_record(bundle.path) if bundle.path.is_dir() else None
    return {
        "path": str(bundle.path),
        "adapter": bundle.adapter,
        "family": bundle.family,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weight_bytes": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        "cache_bytes_per_token": sum(count.cache_bytes(model)),
        "context": bundle.spec.context,
        "at": at(model, bundle.spec.context or 2048),
        "spec": bundle.spec.to_dict(defaults=True),
        "passes": [step.to_dict() for step in model.passes],
        "layers": layers(model),
        "tokenizer": {"tokens": tokenizer.vocab_size, "special": len(tokenizer.special), "bos": tokenizer.bos, "eos": tokenizer.eos},
        "prompt": {**prompt.settings(), "stop_tokens": [tokenizer.token(stop) for stop in prompt.stops], "notes": list(prompt.notes)},
        "hashes": {
            "spec": bundle.spec.digest(),
            "weights": bundle.digest,
            "tokenizer": tokenizer.digest(),
            "prompt": prompt.digest(),
            **({} if record is None else {name: mark.sha256 for name, mark in record.files.items()}),
        },
        "lineage": [dict(step) for step in bundle.lineage],
    }


def at(model: TransformerModel, context: int) -> dict[str, int]:
    """What one row at `context` tokens takes: bytes of weights and cache, and floating-point operations of reading it whole
    and of one more token."""
    whole = torch.zeros(1, context, dtype=torch.int64)
    return {
        "context": context,
        "weight_bytes": count.bytes_of(model.parameters()),
        "cache_bytes": sum(count.cache_bytes(model)) * context,
        "read_flops": count.flops(model, whole, kept=1).forward,
        "token_flops": count.decoding_flops(model, held=context - 1),
    }


def layers(model: TransformerModel) -> list[dict[str, Any]]:
    """One row for each part, from the embedding to the head: what stands there, its parameters, its cache."""
    caches = count.cache_bytes(model)
    rows: list[dict[str, Any]] = [_row("embed", model.embed, model.spec.embed.kind, 0)]
    for index, (name, layer) in enumerate(zip(model.spec.layers, model.layers, strict=True)):
        block = model.spec.blocks[name]
        kinds = ", ".join(f"{part} {spec.kind}" for part, spec in (("mixer", block.mixer), ("ffn", block.ffn)) if spec is not None)
        rows.append(_row(f"{index} {name}", layer, kinds, caches[index]))
    rows.append(_row("final norm", model.final_norm, model.spec.final_norm.kind, 0))
    return [*rows, _row("head", model.head, model.spec.head.kind, 0)]


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What differs between the facts of two models, as (what, a, b); where they lie does not count."""
    keys = [key for key in a if key not in ("path", "adapter", "layers")]
    return config.diff({key: a[key] for key in keys}, {key: b[key] for key in keys})


def _row(name: str, module: nn.Module, what: str, cache: int) -> dict[str, Any]:
    size = count.parameters(module).total
    return {"layer": name, "what": what, "parameters": size, "cache_bytes_per_token": cache}
