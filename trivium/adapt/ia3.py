"""(IA)^3 (arXiv:2205.05638) as a pass: learned scales of keys, of values, and of what the last feed-forward map reads."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ..core.errors import ConfigError
from ..models.model import BuiltModel
from ..nn.adapted_maps import Scale
from .adapter import Adapter, adapt_linear
from .passes import Targets, matches, select


class IA3(Adapter):
    """Channels of chosen maps times learned numbers that start at 1."""

    kind: Literal["ia3"] = "ia3"
    targets: Targets = Field(("inp.k", "inp.v", "ffn.out"), description="module names or their endings")
    inputs: tuple[str, ...] = Field(("ffn.out",), description="those of which the input is scaled, not the output")

    @classmethod
    def tiny(cls) -> IA3:
        return cls()

    def put(self, model: BuiltModel[Any]) -> None:
        chosen = select(model, self.targets, what=f"adapter {self.name!r}")
        for pattern in self.inputs:
            if not any(matches(name, pattern) for name in chosen):
                raise ConfigError(
                    f"adapter {self.name!r}: inputs: {pattern!r} matches none of the adapted maps", field="inputs", value=pattern
                )
        for name, module in chosen.items():
            adapted = adapt_linear(model, name, module)
            side = "in" if any(matches(name, pattern) for pattern in self.inputs) else "out"
            adapted.lora[self.name] = Scale(adapted, side=side)
