"""LLaMA-Adapter (arXiv:2303.16199) as a pass: learned tokens in the topmost layers, behind gates that start at zero."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ..core.errors import ConfigError
from ..models.block import Layer
from ..models.model import BuiltModel
from ..nn.adapted_attention import AttentionPrompts, GatedPrompt
from ..nn.attention import Attention, AttentionMixer
from .adapter import Adapter


class LlamaAdapter(Adapter):
    """Learned tokens beside the keys of the last layers' attention; the model starts unchanged."""

    kind: Literal["llama_adapter"] = "llama_adapter"
    length: int = Field(10, gt=0, description="learned tokens of a layer")
    gates: Literal["layer", "head"] = Field("layer", description="one gate for a layer (PEFT's), or for each head (the paper's)")
    layers: int = Field(30, gt=0, description="how many layers have them, counted from the last")

    @classmethod
    def tiny(cls) -> LlamaAdapter:
        return cls(length=3, layers=1)

    def put(self, model: BuiltModel[Any]) -> None:
        stack = [module for module in model.modules() if isinstance(module, Layer)]
        if self.layers > len(stack):
            raise ConfigError(
                f"adapter {self.name!r}: {self.layers} layers are to be adapted, the model has {len(stack)}",
                field="layers",
                value=self.layers,
            )
        for layer in stack[-self.layers :]:
            mixer, spec = layer.mixer, layer.spec.mixer
            if not isinstance(mixer, AttentionMixer) or not isinstance(spec, Attention) or spec.share is not None:
                raise ConfigError(f"adapter {self.name!r}: layer {layer.index} has no keys and values of its own for learned tokens")
            if mixer.prompts is None:
                mixer.prompts = AttentionPrompts()
            mixer.prompts.adapters[self.name] = GatedPrompt(
                self.length, model.spec.dim, gates=1 if self.gates == "layer" else spec.heads, like=mixer.out.weight
            )
