"""Prompt tuning, P-tuning and prefix tuning in PEFT's layout: one tensor, `prompt_embeddings`, what the virtual tokens are once
any network that made them has run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..adapt.adapter import Adapter, updates
from ..adapt.prefix import Prefix, keys_of
from ..adapt.prompt import Prompt
from ..models.transformer import TransformerModel
from .peft_format import Format, PeftConfig, say_rounding, take
from .tensors import Lazy

TENSOR = "prompt_embeddings"


class PromptConfig(PeftConfig):
    """Field names are PEFT's."""

    peft_type: Literal["PROMPT_TUNING"]
    num_virtual_tokens: int = Field(gt=0)
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None


class EncoderConfig(PromptConfig):
    """P-tuning's."""

    peft_type: Literal["P_TUNING"]  # type: ignore[assignment]


class PrefixConfig(PromptConfig):
    """Prefix tuning's."""

    peft_type: Literal["PREFIX_TUNING"]  # type: ignore[assignment]


ANYTHING: dict[str, tuple[Any, ...]] = {"num_transformer_submodules": (None, 1)}
STARTS = frozenset(  # how the tokens started or were made, which their values have forgotten
    {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path", "encoder_hidden_size",
     "encoder_num_layers", "encoder_dropout", "encoder_reparameterization_type", "prefix_projection", "init_weights"}
)  # fmt: skip


class VirtualFormat(Format):
    """What the three have in common."""

    values: ClassVar[Mapping[str, tuple[Any, ...]]] = ANYTHING
    ignored: ClassVar[frozenset[str]] = STARTS

    def step(self, config: Any, name: str) -> Prompt | Prefix:
        return Prompt(name=name, length=config.num_virtual_tokens)

    def width(self, model: TransformerModel, step: Adapter) -> int:
        """Of one virtual token's row."""
        return model.spec.dim

    def read(self, path: Path, config: Any, tensors: Mapping[str, Lazy], model: TransformerModel, family: str, name: str) -> Adapter:
        step = self.step(config, name)
        found = take(path, tensors, {TENSOR: (config.num_virtual_tokens, self.width(model, step))})
        step.apply(model)
        with torch.no_grad():
            for _, update in updates(model, name).values():
                update.table.copy_(found[TENSOR])
        say_rounding(path, tensors, model)
        return step

    def write(self, step: Any, model: TransformerModel, family: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        ((_, update),) = updates(model, step.name).values()
        with torch.no_grad():
            values = update.values()
        heads, dim = self.shape(model, step)
        return {
            "num_virtual_tokens": step.length,
            "num_layers": len(model.layers),
            "num_attention_heads": heads,
            "token_dim": dim,
            "num_transformer_submodules": 1,
        }, {TENSOR: values}

    def shape(self, model: TransformerModel, step: Any) -> tuple[int, int]:
        """(heads, width of all of them), as PEFT's config has them."""
        return 1, model.spec.dim


class PromptFormat(VirtualFormat):
    peft_type = "PROMPT_TUNING"
    config = PromptConfig


class EncoderFormat(VirtualFormat):
    """Read alone: what its network made is a prompt like another."""

    peft_type = "P_TUNING"
    config = EncoderConfig


class PrefixFormat(VirtualFormat):
    peft_type = "PREFIX_TUNING"
    config = PrefixConfig

    def step(self, config: Any, name: str) -> Prefix:
        return Prefix(name=name, length=config.num_virtual_tokens)

    def width(self, model: TransformerModel, step: Adapter) -> int:
        return len(model.layers) * 2 * self.shape(model, step)[1]

    def shape(self, model: TransformerModel, step: Any) -> tuple[int, int]:
        heads, head_dim = keys_of(model, step)
        return heads, heads * head_dim
