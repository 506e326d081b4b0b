"""Rotary positions in config.json: transformers 5's `rope_parameters`, and the older `rope_theta` with `rope_scaling`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...core.errors import ConfigError
from ...core.spec import validate
from ...nn.positions import Rope, RopeScaling

LEGACY = frozenset({"rope_theta", "rope_scaling", "rope_interleaved", "partial_rotary_factor"})


def modernize(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with one `rope_parameters`, which holds base, type and scaling; as transformers 5 reads older files."""
    config = dict(config)
    found = config.pop("rope_scaling", None) or config.get("rope_parameters") or {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"config.json: rope_parameters must be a mapping, not {found!r:.80}", field="rope_parameters", value=found)
    parameters = {
        "rope_theta": config.pop("rope_theta", 10000.0),
        "partial_rotary_factor": config.pop("partial_rotary_factor", None),
        **found,
    }
    parameters["rope_type"] = parameters.pop("rope_type", None) or parameters.get("type", "default")
    parameters.pop("type", None)
    if config.pop("rope_interleaved", False):
        raise ConfigError(
            "config.json: rope_interleaved is not supported: rotary channels are paired half a head apart", field="rope_interleaved"
        )
    if parameters.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
        raise ConfigError(
            "config.json: partial_rotary_factor is not supported: all channels of a head are turned", field="partial_rotary_factor"
        )
    if parameters["rope_type"] == "llama3":
        parameters.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return {**config, "rope_parameters": parameters}


def to_rope(parameters: Mapping[str, Any]) -> Rope:
    """What `rope_parameters` say. A type without a part of that name is a `ConfigError` that lists those there are."""
    scaling = {key: value for key, value in parameters.items() if key not in ("rope_theta", "rope_type")}
    kind = parameters["rope_type"]
    if kind == "default":
        if scaling:
            raise ConfigError(
                f"config.json: rope_parameters of type 'default' take no {', '.join(sorted(scaling))}", field="rope_parameters"
            )
        return validate(Rope, {"base": parameters["rope_theta"]}, where="config.json.rope_parameters")
    made = validate(RopeScaling, {"kind": kind, **scaling}, where="config.json.rope_parameters")
    return validate(Rope, {"base": parameters["rope_theta"], "scaling": made}, where="config.json.rope_parameters")


def from_rope(rope: Rope) -> dict[str, Any]:
    """The `rope_parameters` that say `rope`."""
    if rope.scaling is None:
        return {"rope_theta": rope.base, "rope_type": "default"}
    scaling = rope.scaling.to_dict(defaults=True)
    return {"rope_theta": rope.base, "rope_type": scaling.pop("kind"), **scaling}
