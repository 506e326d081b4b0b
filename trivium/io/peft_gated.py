"""LLaMA-Adapter in PEFT's layout (ADAPTION_PROMPT), of families whose q, k and v are stored apart: where they are fused (GPT-2),
PEFT leaves out the output map, which the paper has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..adapt.adapter import updates
from ..adapt.gated_prompt import LlamaAdapter
from ..core.errors import ConfigError
from ..models.transformer import TransformerModel
from .peft_format import PREFIX, Format, PeftConfig, say_rounding, sites_of, take
from .tensors import Lazy


class GatedConfig(PeftConfig):
    """Field names are PEFT's."""

    peft_type: Literal["ADAPTION_PROMPT"]
    adapter_len: int = Field(gt=0)
    adapter_layers: int = Field(gt=0)
    target_modules: str | None = None


class GatedFormat(Format):
    peft_type = "ADAPTION_PROMPT"
    config = GatedConfig

    def holds(self, step: Any) -> bool:
        return step.gates == "layer"

    def read(self, path: Path, config: Any, tensors: Mapping[str, Lazy], model: TransformerModel, family: str, name: str) -> LlamaAdapter:
        step = LlamaAdapter(name=name, length=config.adapter_len, layers=config.adapter_layers)
        modules = _modules(model, family)[-step.layers :]
        shapes: dict[str, tuple[int, ...]] = {f"{PREFIX}{module}.adaption_gate": (1,) for module in modules}
        shapes |= {f"{PREFIX}{module}.adaption_prompt": (1, step.length, model.spec.dim) for module in modules}
        found = take(path, tensors, shapes)
        step.apply(model)
        with torch.no_grad():
            for module, (_, update) in zip(modules, updates(model, name).values(), strict=True):
                update.gate.copy_(found[f"{PREFIX}{module}.adaption_gate"])
                update.prompt.copy_(found[f"{PREFIX}{module}.adaption_prompt"][0])
        say_rounding(path, tensors, model)
        return step

    def write(self, step: Any, model: TransformerModel, family: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        modules, tensors = _modules(model, family)[-step.layers :], {}
        for module, (_, update) in zip(modules, updates(model, step.name).values(), strict=True):
            tensors |= {f"{PREFIX}{module}.adaption_gate": update.gate, f"{PREFIX}{module}.adaption_prompt": update.prompt[None]}
        return {"adapter_len": step.length, "adapter_layers": step.layers, "target_modules": modules[0].rpartition(".")[2]}, tensors


def _modules(model: TransformerModel, family: str) -> list[str]:
    """Each layer's attention, by its name on disk."""
    found, biases = {}, {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    for place, site in sites_of(model, family).items():
        for mine in site.ours:
            if mine.startswith("layers.") and ".mixer." in mine:
                if len(site.ours) > 1:
                    raise ConfigError(
                        f"model_type {family!r} fuses {', '.join(site.ours)}: PEFT's learned prompts are another method there"
                    )
                if mine.endswith(".mixer.out") and f"{mine}.bias" in biases:
                    raise ConfigError(f"{place} has a bias, which PEFT adds twice where there are learned prompts")
                found[int(mine.split(".")[1])] = place.rpartition(".")[0]
    return [found[index] for index in sorted(found)]
