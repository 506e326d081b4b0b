"""Tiny transformers models whose every parameter is redrawn, so that each one shows in the logits.

With transformers' own start, norms are one, biases are zero and logits hardly vary: a model with two norms swapped
then agrees to the last bit. Here the logits of a redrawn model have a standard deviation between 1 and 3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

MODELS = {
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "openai-gpt": (transformers.OpenAIGPTConfig, transformers.OpenAIGPTLMHeadModel),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
    "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM),
    "smollm3": (transformers.SmolLM3Config, transformers.SmolLM3ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
    "mamba2": (transformers.Mamba2Config, transformers.Mamba2ForCausalLM),
    "qwen3_next": (transformers.Qwen3NextConfig, transformers.Qwen3NextForCausalLM),
    "deepseek_v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM),
    "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
    "deepseek_v32": (transformers.DeepseekV32Config, transformers.DeepseekV32ForCausalLM),
    "bart": (transformers.BartConfig, transformers.BartForConditionalGeneration),
    "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
    "llava": (transformers.LlavaConfig, transformers.LlavaForConditionalGeneration),
}


def classes(kind: str) -> tuple[Any, Any]:
    """The classes of the config and of the model: `kind` is a model_type of `MODELS`, or the name of transformers' class."""
    if kind in MODELS:
        return MODELS[kind]
    model_class = getattr(transformers, kind)
    return model_class.config_class, model_class


def tiny(kind: str, *, seed: int = 0, **keys: Any) -> transformers.PreTrainedModel:
    """A model of this kind (see `classes`) in fp32 and eval mode, redrawn, with eager attention."""
    config_class, model_class = classes(kind)
    torch.manual_seed(seed)
    model = model_class._from_config(config_class(**keys), attn_implementation="eager").eval()
    redraw(model, seed=seed)
    return model


@torch.no_grad()
def redraw(model: torch.nn.Module, *, seed: int) -> None:
    """Draw every parameter anew: vectors around one (norms) or zero (biases), matrices by their width."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        elif parameter.dim() <= 1:
            parameter.copy_(1.0 + 0.3 * noise)
        else:
            parameter.copy_(1.5 * parameter.shape[1] ** -0.5 * noise)


def save(model: transformers.PreTrainedModel, path: Path, **options: Any) -> Path:
    """What transformers writes."""
    model.save_pretrained(path, **options)
    return path


@torch.no_grad()
def logits(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """[B, T] -> [B, T, V], no padding."""
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


@torch.no_grad()
def greedy(model: transformers.PreTrainedModel, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """`count` greedy tokens for each row of `prompt` [B, T]; no end-of-text, no guessed mask."""
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
    )
    return out[:, prompt.shape[1] :]
