"""Reference sheets: what a model is and what it costs, from its spec alone.

The model is built on the meta device, so a sheet of the largest takes no memory and needs no weights: kinds of blocks in their
order, parameters (total, and those that one token passes through), bytes of cache, operations of a token. An assembly of
several stacks has a sheet for each of them. Elementwise operations and norms are left out of operations, as in `count`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapt.passes import apply_passes
from ..core import config as configs
from ..core import device as devices
from ..core.errors import ConfigError, FileError
from ..core.spec import Part, Spec, parts, validate
from ..io import directory, files
from ..io.hf import families
from ..models import count
from ..models.block import Block
from ..models.model import BuiltModel, Model, with_kind
from ..models.presets import assemblies, presets
from ..models.transformer import TransformerModel, build
from ..nn.activations import Activation
from ..nn.cross import CrossAttention
from ..nn.heads import Head, LMHead, MaskedLMHead, MultiToken
from ..nn.norms import Norm
from ..nn.patches import Patches
from ..nn.patterns import Pattern
from ..nn.positions import Position
from ..nn.positions_absolute import Absolute
from ..nn.store import Store

ROOTS: dict[str, type[Part]] = {
    "positions": Position,
    "absolute positions": Absolute,
    "patterns": Pattern,
    "norms": Norm,
    "activations": Activation,
}
CONTEXT = 2048  # tokens, where neither the model nor the reader says how many


def unloaded(x: str | Path, *, allow_unknown: Collection[str] = ()) -> BuiltModel[Any] | None:
    """The model that `x` describes, on the meta device: a model directory (what it holds of weights is not read), a bare
    config.json, a file with a spec or with a run's config that holds one, or the name of a preset; None if `x` is none of them.

    Raises `FileError` and `ConfigError` for what is damaged or cannot be expressed.
    """
    path = Path(x)
    if path.is_file() and path.suffix in (".json", ".yaml", ".yml"):
        data = configs.load(path).data
        if "model_type" in data:
            return _of_config(data, path.parent, allow_unknown)
        inner = next((key for key in ("spec", "model") if isinstance(data.get(key), Mapping)), None)  # of trivium.json, of a run
        return build(validate(Model, with_kind(data[inner] if inner else data), where=".".join(filter(None, (str(path), inner)))))
    if (path / directory.CONFIG).is_file():
        return _of_config(files.read_json(path / directory.CONFIG), path, allow_unknown)
    for shapes in () if path.exists() else (presets, assemblies):
        if str(x) in shapes:
            return build(shapes.get(str(x))())
    return None


def _of_config(config: Mapping[str, Any], home: Path, allow_unknown: Collection[str]) -> BuiltModel[Any]:
    """By a config.json that lies in `home`, with the passes that a trivium.json beside it names."""
    record, kind = directory.read_record(home), config.get("model_type")
    if kind == directory.NATIVE:
        if record is None:
            raise FileError(f"{home}: {directory.CONFIG} says {kind!r}, whose spec stands in {directory.RECORD}; that file is missing")
        model = apply_passes(build(record.spec), record.passes)
    else:
        allowed = {*allow_unknown, *(() if record is None else record.allowed)}
        family = families.get(str(kind), field=f"{directory.CONFIG}.model_type")
        model = apply_passes(build(family.to_spec(config, allow_unknown=allowed)[0]), () if record is None else record.passes)
    stored = config.get("dtype") or config.get("torch_dtype")
    return model if stored is None else model.to(devices.dtype(stored))


def sheet(model: BuiltModel[Any], *, context: int | None = None) -> dict[str, Any]:
    """The sheet of `model`, on any device, as it stands after its passes. `context`: the length that costs are told at; the
    model's own if none is given. Bytes are those of the model's dtype; `active` are the parameters that one token passes through."""
    size = count.parameters(model)
    decodes = _decodes(model)
    stacks = {name or model.spec.kind: stack for name, stack in model.named_modules() if isinstance(stack, TransformerModel)}
    return {
        "kind": model.spec.kind,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": size.total,
        "active": size.active,
        "weight_bytes": count.bytes_of(model.parameters()),
        "stacks": {name: _stack(stack, context=context, decodes=decodes and stack.spec.causal) for name, stack in stacks.items()},
    }


def _decodes(model: BuiltModel[Any]) -> bool:
    try:
        model.cache(1, 1)
    except ConfigError:  # an assembly without a cache
        return False
    return True


def _stack(model: TransformerModel, *, context: int | None, decodes: bool) -> dict[str, Any]:
    spec = model.spec
    memory = _memory_bytes(model)
    return {
        "dim": spec.dim,
        "vocab": spec.vocab,
        "context": spec.context,
        "causal": spec.causal,
        "order": shorthand(spec.layers),
        "shared": list(spec.shared),
        "blocks": [_block(model, name, block, decodes=decodes) for name, block in spec.blocks.items()],
        "embed": spec.embed.to_dict(),
        "head": spec.head.to_dict(),
        "tied": _tied(spec.head),
        **{what: list(dict.fromkeys(brief(part) for part in parts(spec) if isinstance(part, root))) for what, root in ROOTS.items()},
        "cache_bytes_per_token": sum(count.cache_bytes(model)) if decodes else 0,
        "state_bytes_per_row": sum(count.state_bytes(model)) if decodes else 0,
        **({"memory_bytes_per_token": memory} if memory else {}),
        "at": at(model, _length(model, context), decodes=decodes),
    }


def _block(model: TransformerModel, name: str, block: Block, *, decodes: bool) -> dict[str, Any]:
    """One kind of layer; its numbers are those of one layer of the kind."""
    index = model.spec.layers.index(name)
    size = count.parameters(model.layers[index])
    return {
        "block": name,
        "layers": model.spec.layers.count(name),
        **{part: None if (said := getattr(block, part)) is None else said.to_dict() for part in ("mixer", "cross", "ffn")},
        "norm": block.norm.to_dict(),
        "norm_at": "parallel" if block.parallel else block.norm_at,
        "residual": block.residual.to_dict(),
        "parameters": size.total,
        "active": size.active,
        "cache_bytes_per_token": count.cache_bytes(model)[index] if decodes else 0,
        "state_bytes_per_row": count.state_bytes(model)[index] if decodes else 0,
    }


def at(model: TransformerModel, context: int, *, decodes: bool = True) -> dict[str, int]:
    """What one row at `context` tokens takes: bytes of weights, and of a cache with room for it; floating-point operations of
    reading it whole and of one more token. Where the model reads a memory, that is as long."""
    whole = torch.zeros(1, context, dtype=torch.int64)
    memory = _memory(model, context)
    found = {"context": context, "weight_bytes": count.bytes_of(model.parameters())}
    read = {"read_flops": count.flops(model, whole, kept=1, memory=memory).forward}
    if not decodes:
        return found | read
    states = [layer.state() for layer in model.layers]  # type: ignore[operator]
    cache = Store(states, rows=1, capacity=context, dtype=model.dtype, device=torch.device("meta"))
    return {
        **found,
        "cache_bytes": cache.bytes + _memory_bytes(model) * context,
        **read,
        "token_flops": count.decoding_flops(model, held=context - 1, memory=memory),
    }


def _length(model: TransformerModel, asked: int | None) -> int:
    """The length that costs are told at: images have theirs."""
    embed = model.spec.embed
    return embed.count + embed.start if isinstance(embed, Patches) else asked or model.spec.context or CONTEXT


def _crosses(model: TransformerModel) -> list[CrossAttention]:
    found = [model.spec.blocks[name].cross for name in model.spec.layers]
    return [cross for cross in found if isinstance(cross, CrossAttention)]


def _memory(model: TransformerModel, length: int) -> Tensor | None:
    """A memory [1, M, C] that takes no room, where there is something that reads one."""
    crosses = _crosses(model)
    return torch.zeros(1, 1, 1).expand(1, length, crosses[0].memory_dim or model.spec.dim) if crosses else None


def _memory_bytes(model: TransformerModel) -> int:
    """What the cache keeps of each token of the memory: keys and values of every layer that reads it."""
    return sum(2 * cross.kv_heads * cross.head_dim for cross in _crosses(model)) * model.dtype.itemsize


def _tied(head: Head) -> bool | None:
    """Whether the head reads the embedding's table; None for one that has no such choice."""
    return head.tied if isinstance(head, LMHead | MaskedLMHead | MultiToken) else None


def brief(part: Spec | Mapping[str, Any] | None) -> str:
    """A part in a few words: its kind, and its fields that are not left at their defaults."""
    if part is None:
        return "none"
    said = part.to_dict() if isinstance(part, Spec) else part
    fields = ", ".join(f"{name}={_word(value)}" for name, value in said.items() if name != "kind")
    kind = said.get("kind", "")
    return f"{kind}({fields})" if fields else str(kind)


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return brief(value)
    if isinstance(value, list | tuple):
        return "[" + (", ".join(_word(item) for item in value) if len(value) <= 8 else f"{len(value)} values") + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def shorthand(names: Sequence[str]) -> str:
    """`layers` as short as repetition makes it: "4*(5*local full) 2*local"; `expand_layers` reads it back."""
    words, i = [], 0
    while i < len(names):
        best = (1, 1)  # period, times
        for period in range(1, (len(names) - i) // 2 + 1):
            times = 1
            while tuple(names[i + times * period : i + (times + 1) * period]) == tuple(names[i : i + period]):
                times += 1
            if times > 1 and period * times > best[0] * best[1]:
                best = (period, times)
        period, times = best
        inner = names[i] if period == 1 else f"({shorthand(names[i : i + period])})"
        words.append(inner if times == 1 else f"{times}*{inner}")
        i += period * times
    return " ".join(words)


def tables(found: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """A sheet as (title, rows): the facts of each stack, and of each kind of its layers."""
    made = []
    for name, stack in found["stacks"].items():
        made.append((name, _facts(found, stack)))
        made += [(f"{name}, {block['block']}: {_many(block['layers'], 'layer')}", _kind(block)) for block in stack["blocks"]]
    return [(title, [{"what": what, "value": value} for what, value in facts.items()]) for title, facts in made]


def _facts(found: Mapping[str, Any], stack: Mapping[str, Any]) -> dict[str, str]:
    cost, alone = stack["at"], len(found["stacks"]) == 1
    facts = {
        "shape": ", ".join(
            (
                _many(sum(block["layers"] for block in stack["blocks"]), "layer"),
                f"width {stack['dim']:,}",
                *(() if stack["embed"]["kind"] == "patches" else (f"{stack['vocab']:,} tokens",)),
                f"context {'not said' if stack['context'] is None else format(stack['context'], ',')}",
                *(() if stack["causal"] else ("sees both ways",)),
            )
        ),
        "order": stack["order"],
        **({"shared": f"the weights of {', '.join(stack['shared'])}, by all layers of the name"} if stack["shared"] else {}),
        "parameters": f"{found['parameters']:,}{'' if alone else ' (of all stacks)'}"
        + (f", of which {found['active']:,} active" if found["active"] != found["parameters"] else ""),
        "weights": f"{_size(found['weight_bytes'])} as {found['dtype']}{'' if alone else ' (of all stacks)'}",
        "embedding": brief(stack["embed"]),
        "head": brief({name: value for name, value in stack["head"].items() if name != "tied"})
        + {True: ", tied to the embedding", False: ", not tied", None: ""}[stack["tied"]],
        **{what: ", ".join(stack[what]) for what in ROOTS if stack[what]},
    }
    if "token_flops" in cost:
        memory = stack.get("memory_bytes_per_token")
        facts["cache"] = (
            f"{stack['cache_bytes_per_token']:,} bytes of cache per token, {stack['state_bytes_per_row']:,} bytes of state per row"
            + (f", {memory:,} bytes per token of the memory" if memory else "")
        )
    facts[f"at {cost['context']:,} tokens"] = ", ".join(
        (
            *([f"{_size(cost['cache_bytes'])} of cache"] if "cache_bytes" in cost else []),
            f"{cost['read_flops'] / 1e9:,.2f} GFLOP to read one row whole",
            *([f"{cost['token_flops'] / 1e9:,.3f} GFLOP for one more token"] if "token_flops" in cost else []),
        )
    )
    return facts


def _kind(block: Mapping[str, Any]) -> dict[str, str]:
    cache, state = block["cache_bytes_per_token"], block["state_bytes_per_row"]
    active = f", of which {block['active']:,} active" if block["active"] != block["parameters"] else ""
    return {
        **{part: brief(block[part]) for part in ("mixer", "cross", "ffn") if block[part] is not None},
        "norm": f"{brief(block['norm'])}, {block['norm_at']}",
        "residual": brief(block["residual"]),
        "each": f"{block['parameters']:,} parameters{active}; {cache:,} bytes per token and {state:,} per row in the cache",
    }


def _many(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _size(value: int) -> str:
    return f"{value / (1 << 30):,.1f} GiB" if value >= 10 << 30 else f"{value / (1 << 20):,.1f} MiB"
