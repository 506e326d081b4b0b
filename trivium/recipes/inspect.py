"""What a model is, as plain values: its sheet, spec, layers, hashes, lineage; and how two models differ.

A model with weights and its text side is loaded and told of in full. What has none (a preset, a config.json, a spec) and
what is no single stack is told of by its spec alone, which is built without memory.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from ..core import config
from ..io import directory
from ..io.tensors import INDEX, SINGLE
from ..models import count
from ..models.model import DEFAULT, BuiltModel
from ..models.transformer import TransformerModel
from .load import Bundle, load
from .sheet import sheet, unloaded


def inspect(x: str | Path, *, context: int | None = None, accept: bool = False, allow_unknown: Collection[str] = ()) -> dict[str, Any]:
    """Facts about `x`: as `load` takes it, or a preset, a config.json, a file with a spec, a model directory without weights.
    `context`: the length that costs are told at; the model's own if none is given. `accept` adopts files that were edited since
    trivium.json was written, and records them; `allow_unknown` names keys of config.json to carry unread."""
    if (ghost := _without_weights(x, allow_unknown)) is not None:
        return {"path": str(x), **described(ghost, context=context), "hashes": {"spec": ghost.spec.digest()}}
    return facts(load(x, accept=accept, allow_unknown=allow_unknown), context=context)


def _without_weights(x: str | Path, allow_unknown: Collection[str]) -> BuiltModel[Any] | None:
    """What is told of by its spec: what has no weights, and what `load` does not take; None for anything else."""
    path = Path(x)
    stored = any((path / name).is_file() for name in (SINGLE, INDEX))
    record = directory.read_record(path) if stored else None
    if record is not None and record.spec.kind == DEFAULT:
        return None
    model = unloaded(x, allow_unknown=allow_unknown)
    return None if stored and isinstance(model, TransformerModel) else model


def facts(bundle: Bundle, *, context: int | None = None) -> dict[str, Any]:
    """Everything but the tensors. `cache_bytes_per_token` is what one more token of one row takes."""
    model, tokenizer, prompt = bundle.model, bundle.tokenizer, bundle.prompt
    record = directory.read_record(bundle.path) if bundle.path.is_dir() else None
    return {
        "path": str(bundle.path),
        "adapter": bundle.adapter,
        "family": bundle.family,
        **described(model, context=context),
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


def described(model: BuiltModel[Any], *, context: int | None = None) -> dict[str, Any]:
    """What the model alone says, with weights or on the meta device. Costs `at` a context are those of its stacks together."""
    found = sheet(model, context=context)
    stacks = found["stacks"].values()
    costs: dict[str, int] = {}
    for stack in stacks:
        for name, value in stack["at"].items():
            costs[name] = value if name == "context" else costs.get(name, 0) + value
    return {
        "dtype": found["dtype"],
        "parameters": found["parameters"],
        "active_parameters": found["active"],
        "weight_bytes": found["weight_bytes"],
        "cache_bytes_per_token": sum(stack["cache_bytes_per_token"] for stack in stacks),
        "state_bytes_per_row": sum(stack["state_bytes_per_row"] for stack in stacks),
        "context": model.spec.context,
        "at": {**costs, "weight_bytes": found["weight_bytes"]},
        "spec": model.spec.to_dict(defaults=True),
        "passes": [step.to_dict() for step in model.passes],
        "layers": layers(model),
        "sheet": found,
    }


def layers(model: BuiltModel[Any]) -> list[dict[str, Any]]:
    """One row for each part, from the embedding to the head: what stands there, its parameters, its cache. Parameters that
    several parts share count where they come first; what an assembly has beside its stacks comes last."""
    stacks = [(name, stack) for name, stack in model.named_modules() if isinstance(stack, TransformerModel)]
    counted: set[nn.Parameter] = set()
    rows = [row for name, stack in stacks for row in _layers(stack, f"{name} " if name else "", counted)]
    rest = count.parameters(model).total - sum(row["parameters"] for row in rows)
    return [*rows, _row("beside the stacks", model.spec.kind, rest, 0)] if rest else rows


def _layers(model: TransformerModel, before: str, counted: set[nn.Parameter]) -> list[dict[str, Any]]:
    def own(module: nn.Module) -> int:
        new = [parameter for parameter in module.parameters() if parameter not in counted]
        counted.update(new)
        return sum(parameter.numel() for parameter in new)

    spec, caches = model.spec, count.cache_bytes(model)
    rows = [_row(f"{before}embed", spec.embed.kind, own(model.embed), 0)]
    for index, (name, layer) in enumerate(zip(spec.layers, model.layers, strict=True)):
        block = spec.blocks[name]
        named = (("mixer", block.mixer), ("cross", block.cross), ("ffn", block.ffn))
        kinds = ", ".join(f"{part} {spec.kind}" for part, spec in named if spec is not None)
        rows.append(_row(f"{before}{index} {name}", kinds, own(layer), caches[index]))
    rows.append(_row(f"{before}final norm", spec.final_norm.kind, own(model.final_norm), 0))
    return [*rows, _row(f"{before}head", spec.head.kind, own(model.head), 0)]


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What differs between the facts of two models, as (what, a, b), as far as both have them; where they lie does not count."""
    keys = [key for key in a if key in b and key not in ("path", "adapter", "layers", "sheet")]
    return config.diff({key: a[key] for key in keys}, {key: b[key] for key in keys})


def _row(name: str, what: str, parameters: int, cache: int) -> dict[str, Any]:
    return {"layer": name, "what": what, "parameters": parameters, "cache_bytes_per_token": cache}
