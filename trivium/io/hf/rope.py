"""Rotary positions in config.json: transformers 5's `rope_parameters`, and the older `rope_theta` with `rope_scaling`.

A rotary type is a scaling of the same name. Two say less than the part needs: `dynamic` takes the trained length from
max_position_embeddings, which for it is not the context, and `yarn` and `longrope` may leave their factor to the lengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...core.errors import ConfigError, unknown
from ...core.spec import validate
from ...nn.positions import Rope
from ...nn.rope_scaling import DynamicScaling, RopeScaling

TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
ORIGINAL = "original_max_position_embeddings"
BY_ORIGINAL = frozenset({"yarn", "longrope", "llama3"})  # the types that say the trained length themselves


def modernize(config: dict[str, Any], *, theta: float = 10000.0) -> dict[str, Any]:
    """`config` with one `rope_parameters`, which holds base, type and scaling; as transformers 5 reads older files. `theta`:
    the family's own default."""
    config = dict(config)
    found = config.pop("rope_scaling", None) or config.get("rope_parameters") or {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"config.json: rope_parameters must be a mapping, not {found!r:.80}", field="rope_parameters", value=found)
    parameters = {"rope_theta": config.pop("rope_theta", theta), **found}
    if (share := config.pop("partial_rotary_factor", None)) is not None:
        parameters.setdefault("partial_rotary_factor", share)
    parameters["rope_type"] = parameters.pop("rope_type", None) or parameters.get("type", "default")
    parameters.pop("type", None)
    if config.pop("rope_interleaved", False):
        raise ConfigError(
            "config.json: rope_interleaved is not supported: rotary channels are paired half a head apart", field="rope_interleaved"
        )
    if parameters["rope_type"] in BY_ORIGINAL:
        parameters.setdefault(ORIGINAL, config.get("max_position_embeddings"))
    return {**config, "rope_parameters": parameters}


def to_rope(parameters: Mapping[str, Any], *, positions: int, partial: bool = False) -> Rope:
    """What `rope_parameters` say, beside max_position_embeddings (`positions`). `partial`: whether the family can turn a part
    of a head only. Raises `ConfigError` that lists the types there are for any other, and for what does not belong there."""
    where = "config.json.rope_parameters"
    given = {key: value for key, value in parameters.items() if value is not None or key == "rope_theta"}
    kind, made = given.pop("rope_type"), {"base": given.pop("rope_theta"), "share": given.pop("partial_rotary_factor", 1.0)}
    if kind not in TYPES:
        raise ConfigError(unknown("rope_type", str(kind), TYPES, field=where), field="rope_type", value=kind, choices=TYPES)
    if made["share"] != 1 and not partial:
        raise ConfigError(
            "config.json: partial_rotary_factor is not supported here: all channels of a head are turned", field="partial_rotary_factor"
        )
    if kind == "default":
        if given:
            raise ConfigError(f"config.json: rope_parameters of type 'default' take no {', '.join(sorted(given))}", field="rope_parameters")
        return validate(Rope, made, where=where)
    if kind == "dynamic" and given.setdefault(ORIGINAL, positions) != positions:
        raise ConfigError(
            f"config.json: rope_parameters of type 'dynamic' start from max_position_embeddings ({positions}); {ORIGINAL} "
            f"({given[ORIGINAL]}) says another length",
            field="rope_parameters",
        )
    if kind in ("yarn", "longrope") and isinstance(original := given.get(ORIGINAL), int) and original > 0:
        given.setdefault("factor", positions / original)
    made["scaling"] = validate(RopeScaling, {"kind": kind, **given}, where=where)
    return validate(Rope, made, where=where)


def from_rope(rope: Rope) -> dict[str, Any]:
    """The `rope_parameters` that say `rope`. Raises `ConfigError` for a scaling that transformers has no type for."""
    out: dict[str, Any] = {"rope_theta": rope.base}
    if rope.share != 1:
        out["partial_rotary_factor"] = rope.share
    if rope.scaling is None:
        return {**out, "rope_type": "default"}
    scaling = rope.scaling.to_dict()
    kind = scaling.pop("kind")
    if kind not in TYPES:
        raise ConfigError(
            f"config.json has no rotary type {kind!r} (it has {', '.join(TYPES)}); save this model as 'trivium'",
            field="rope_type", value=kind, choices=TYPES,
        )  # fmt: skip
    if isinstance(rope.scaling, DynamicScaling):
        scaling.pop(ORIGINAL)
    return {**out, "rope_type": kind, **scaling}


def context(rope: Rope, positions: int) -> int:
    """The context of a model whose max_position_embeddings is `positions`."""
    return int(rope.scaling.factor * positions) if isinstance(rope.scaling, DynamicScaling) else positions


def positions(rope: Rope, context: int) -> int:
    """The max_position_embeddings of a model of this context."""
    return rope.scaling.original_max_position_embeddings if isinstance(rope.scaling, DynamicScaling) else context
