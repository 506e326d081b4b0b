"""A model's context, the length that it was made for: what goes beyond is refused, and one `Extension` makes it longer.

Rotary positions are stretched by a scaling (see `nn/rope_scaling.py`), and the spec says so afterwards, so that what is
saved is what was run. No tensor changes. Learned positions end where their table ends and cannot be extended.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from ..core.errors import ConfigError
from ..core.spec import Spec, validate
from ..nn.attention import Attention, Mixer
from ..nn.embeddings import Tokens
from ..nn.latent import LatentAttention
from ..nn.positions import Rope
from ..nn.positions_absolute import Learned
from ..nn.rope_scaling import DynamicScaling, LinearScaling, RopeScaling, YarnScaling, ntk_base
from .transformer import Transformer

HINT = "give extend=KIND:FACTOR, such as yarn:4, where the model is loaded (--extend)"


class Extension(Spec):
    """How a context is made `factor` times longer. Written KIND:FACTOR, such as `yarn:4`."""

    kind: Literal["none", "linear", "ntk", "dynamic", "yarn"] = Field(description="the rotary scaling; none: positions simply go on")
    factor: float = Field(gt=1, description="how many times longer")

    @classmethod
    def parse(cls, text: str) -> Extension:
        """Raises `ConfigError` for what is not KIND:FACTOR."""
        found = re.fullmatch(r"(\w+):([\d.]+)", text)
        if found is None:
            raise ConfigError(f"extend: {text!r} is not KIND:FACTOR, such as yarn:4", field="extend", value=text)
        return validate(cls, {"kind": found[1], "factor": found[2]}, where="extend")

    def __str__(self) -> str:
        return f"{self.kind}:{self.factor:g}"

    def apply(self, spec: Transformer) -> Transformer:
        """`spec` with the longer context. Raises `ConfigError` where there is none to start from, or nothing to stretch."""
        if spec.context is None:
            raise ConfigError("this model does not say what context it was made for, so there is nothing to multiply", field="extend")
        if isinstance(spec.embed, Tokens) and isinstance(spec.embed.positions, Learned):
            raise ConfigError(
                f"this model has learned positions, {spec.embed.positions.size} of them, and cannot be extended beyond them", field="extend"
            )
        context = int(self.factor * spec.context)
        if self.kind == "none":
            return spec.replace(context=context)
        blocks = {name: block.replace(mixer=self._stretched(block.mixer, spec.context)) for name, block in spec.blocks.items()}
        if blocks == spec.blocks:
            raise ConfigError(
                f"this model has no rotary positions that {self.kind} could stretch; 'none:{self.factor:g}' lets positions go on",
                field="extend",
            )
        return spec.replace(blocks=blocks, context=context)

    def _stretched(self, mixer: Mixer | None, context: int) -> Mixer | None:
        if not isinstance(mixer, Attention | LatentAttention) or not isinstance(rope := mixer.position, Rope):
            return mixer
        if rope.scaling is not None:
            raise ConfigError(
                f"this model's rotary positions are stretched already, by {rope.scaling.kind!r} to a context of {context}",
                field="extend",
                value=str(self),
            )
        if self.kind == "ntk":  # a change of base is all that it is, and every format can say a base
            dim = rope.turned(mixer.head_dim) if isinstance(mixer, Attention) else mixer.rope_dim
            return mixer.replace(position=rope.replace(base=ntk_base(rope.base, self.factor, dim)))
        scaling = {
            "linear": lambda: LinearScaling(factor=self.factor),
            "dynamic": lambda: DynamicScaling(factor=self.factor, original_max_position_embeddings=context),
            "yarn": lambda: YarnScaling(factor=self.factor, original_max_position_embeddings=context),
        }[self.kind]()
        return mixer.replace(position=rope.replace(scaling=scaling))


def scalings_by_length(spec: Spec) -> list[RopeScaling]:
    """The rotary scalings in `spec` that turn by the length of what is read at once."""
    if isinstance(spec, RopeScaling):
        return [spec] if spec.by_length else []
    values = [getattr(spec, name) for name in type(spec).model_fields]
    inner = [item for value in values for item in (value.values() if isinstance(value, Mapping) else [value])]
    return [found for item in inner if isinstance(item, Spec) for found in scalings_by_length(item)]


def check_length(context: int | None, length: int, *, what: str, field: str) -> None:
    """Raise `ConfigError` if `what`, of `length` tokens, is longer than the model's `context`."""
    if context is not None and length > context:
        raise ConfigError(
            f"{what} {length} tokens, beyond the {context} that this model was made for; to make it reach further, {HINT}",
            field=field,
            value=length,
        )
