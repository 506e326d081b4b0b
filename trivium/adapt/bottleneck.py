"""Bottleneck adapters as a pass: small networks behind sublayers (after both, arXiv:1902.00751; after the feed-forward part
alone, arXiv:2005.00247) or beside them, with a scale (arXiv:2110.04366). No weights of the base can express them, and PEFT has
no format for them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializeAsAny

from ..core.errors import ConfigError
from ..models.block import Layer
from ..models.model import BuiltModel
from ..nn import adapted_sublayer as parts
from ..nn.activations import Activation, ReLU
from .adapter import Adapter
from .passes import replace_module


class Bottleneck(Adapter):
    """To what each sublayer gives, scale * up(f(down(x))) is added, of an x that `reads` names."""

    kind: Literal["bottleneck"] = "bottleneck"
    size: int = Field(64, gt=0, description="width of the bottleneck")
    after: tuple[Literal["mixer", "ffn"], ...] = Field(("mixer", "ffn"), min_length=1, description="the sublayers that get one")
    reads: parts.Reads = Field(
        "output", description="the sublayer's output, its sum with the stream (Pfeiffer's), the sublayer's input (beside it), or the stream"
    )
    scale: float = Field(1.0, description="what is added is multiplied by it")
    activation: SerializeAsAny[Activation] = Field(ReLU(), description="the nonlinearity")

    @classmethod
    def tiny(cls) -> Bottleneck:
        return cls(size=5)

    def put(self, model: BuiltModel[Any]) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, Layer)}
        for name in self.after:
            chosen = {path: layer for path, layer in layers.items() if self._has(layer, name)}
            if not chosen:
                raise ConfigError(f"adapter {self.name!r}: no layer of the model has a {name} of its own", field="after", value=name)
            for path, layer in chosen.items():
                self._place(layer, name, path, model)

    def _has(self, layer: Layer, name: str) -> bool:
        """Whether the layer has such a sublayer of its own; the ffn of a parallel block stands in its mixer's place."""
        return name in dict(layer.named_children()) and not (name == "ffn" and layer.spec.parallel)

    def _place(self, layer: Layer, name: str, path: str, model: BuiltModel[Any]) -> None:
        key = f"{name}_adapters"
        host = dict(layer.named_children()).get(key)
        if host is None:
            host = parts.Bottlenecks()
            replace_module(model, f"{path}.{key}", host)
        assert isinstance(host, parts.Bottlenecks)
        like = next(parameter for parameter in layer.parameters())
        host.adapters[self.name] = parts.Bottleneck(
            model.spec.dim, self.size, activation=self.activation.build(), reads=self.reads, scale=self.scale, like=like
        )
