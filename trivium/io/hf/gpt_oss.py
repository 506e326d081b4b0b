"""The family `gpt_oss`: attention with learned sinks, windows in every other layer, clamped experts with biases.

All experts' maps are stored as one tensor each, [E, in, out], gate and up in turn along the outputs. Published files hold
them in 4 bits (`quantization_config`), which is refused: read what transformers writes after dequantizing. arXiv:2508.10925.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...core.errors import ConfigError
from ...models.block import Block
from ...models.transformer import Transformer
from ...nn.activations import Swish
from ...nn.attention import Attention, Scores
from ...nn.norms import RMS
from ...nn.patterns import Full, Window
from ..rules import Rename, Rule
from ..tensors import Lazy
from . import families, llama, rope
from .mixtral import mixture, sparse

YARN = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
LEGACY = frozenset({"experts_per_token", "initial_context_length"})  # other names of what other keys say, read by none


class GptOssKeys(llama.Keys):
    vocab_size: int = Field(201088, gt=0)
    hidden_size: int = Field(2880, gt=0)
    intermediate_size: int = Field(2880, gt=0)
    num_hidden_layers: int = Field(36, gt=0, le=10_000)
    num_attention_heads: int = Field(64, gt=0)
    num_key_value_heads: int | None = Field(8, gt=0)
    head_dim: int | None = Field(64, gt=0)
    max_position_embeddings: int = Field(131072, gt=0)
    rms_norm_eps: float = Field(1e-5, gt=0)
    attention_bias: bool = True
    sliding_window: int | None = Field(128, gt=0)
    layer_types: tuple[Literal["sliding_attention", "full_attention"], ...] | None = None
    num_local_experts: int = Field(128, gt=0)
    num_experts_per_tok: int = Field(4, gt=0)
    swiglu_alpha: float = 1.702
    swiglu_limit: float = Field(7.0, gt=0)


class GptOss(llama.Llama):
    """gpt-oss 20b and 120b."""

    model_type = "gpt_oss"
    architecture = "GptOssForCausalLM"
    keys = GptOssKeys
    carried = {
        **llama.CARRIED,
        "bos_token_id": None,
        "eos_token_id": None,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        if not config.keys() & {"rope_scaling", "rope_parameters", "rope_theta"}:
            config = {**config, "rope_parameters": YARN}
        return rope.modernize(config, theta=YARN["rope_theta"])

    def unknown_keys(self, config: Mapping[str, Any]) -> list[str]:
        return [key for key in super().unknown_keys(config) if key not in LEGACY]

    def spec(self, keys: Any) -> Transformer:
        types = keys.layer_types or tuple(("sliding_attention", "full_attention")[i % 2] for i in range(keys.num_hidden_layers))
        if len(types) != keys.num_hidden_layers:
            raise ConfigError(f"config.json: layer_types names {len(types)} layers of {keys.num_hidden_layers}", field="layer_types")
        if keys.sliding_window is None and "sliding_attention" in types:
            raise ConfigError("config.json: layer_types has sliding attention, and sliding_window gives no size", field="sliding_window")
        expert = llama.mlp(keys, bias=True).replace(
            activation=Swish(beta=keys.swiglu_alpha, trained=False), limit=keys.swiglu_limit, shift=1.0
        )
        moe = mixture(experts=keys.num_local_experts, top_k=keys.num_experts_per_tok, expert=expert, router_bias=True)
        norm = RMS(eps=keys.rms_norm_eps, round_first=False)
        blocks = {
            kind: Block(
                mixer=llama.attention(
                    keys,
                    {
                        "bias": ("q", "k", "v", "out") if keys.attention_bias else (),
                        "pattern": Window(size=keys.sliding_window) if kind == "sliding_attention" else Full(),
                        "scores": Scores(sinks=True),
                    },
                ),
                ffn=moe,
                norm=norm,
            )
            for kind in set(types)
        }
        return llama.stack(keys, [blocks[kind] for kind in types]).replace(final_norm=norm)

    def values(self, spec: Transformer) -> dict[str, Any]:
        attention, moe = sparse(self, spec)
        mixers = [spec.blocks[name].mixer for name in spec.layers]
        patterns = [mixer.pattern for mixer in mixers if isinstance(mixer, Attention)]
        if len(patterns) < len(mixers):
            raise self.cannot("each layer must be attention, then a mixture of experts")
        sizes = {pattern.size for pattern in patterns if isinstance(pattern, Window)}
        if len(sizes) > 1:
            raise self.cannot(f"its windows must be of one size, not {', '.join(map(str, sorted(sizes)))}")
        if not isinstance(moe.expert.activation, Swish) or moe.expert.limit is None:
            raise self.cannot("its experts are gated with a swish of fixed beta, and have a limit")
        return {
            **llama.shared_values(spec, attention, moe.expert),
            "attention_bias": bool(attention.bias),
            "sliding_window": next(iter(sizes), None),
            "layer_types": ["sliding_attention" if isinstance(pattern, Window) else "full_attention" for pattern in patterns],
            "num_local_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "swiglu_alpha": moe.expert.activation.beta,
            "swiglu_limit": moe.expert.limit,
        }

    def rules(self, spec: Transformer) -> list[Rule]:
        _, moe = sparse(self, spec)
        theirs, ours = "model.layers.{i}", "layers.{i}"
        return [
            Rename(f"{theirs}.self_attn.sinks", f"{ours}.mixer.sinks.weight"),
            Rename(f"{theirs}.mlp.router", f"{ours}.ffn.router"),
            *(
                InTurn(
                    f"{theirs}.mlp.experts.{name}{end}", f"{ours}.ffn.experts", experts=moe.experts, maps=[f"{one}.{leaf}" for one in maps]
                )
                for name, maps in {"gate_up_proj": ("inp.gate", "inp.up"), "down_proj": ("out",)}.items()
                for leaf, end in {"weight": "", "bias": "_bias"}.items()
            ),
            *super().rules(spec),
        ]


class InTurn(Rule):
    """One tensor on disk, [E, in, n * out] or [E, n * out], holds n maps of all experts, whose outputs take turns."""

    def __init__(self, disk: str, ours: str, *, experts: int, maps: Sequence[str]):
        super().__init__([disk], [f"{ours}.{e}.{name}" for e in range(experts) for name in maps])
        self.experts, self.maps = experts, len(maps)

    def forward(self, tensors: list[Lazy]) -> list[Lazy]:
        (whole,) = tensors
        shape = (whole.shape[-1] // self.maps, *whole.shape[1:-1])
        return [whole.derive(shape, partial(self._own, e=e, k=k)) for e in range(self.experts) for k in range(self.maps)]

    def _own(self, whole: Tensor, *, e: int, k: int) -> Tensor:
        return whole[e, ..., k :: self.maps].transpose(0, -1).contiguous()

    def backward(self, tensors: list[Lazy]) -> list[Lazy]:
        first = tensors[0]
        shape = (self.experts, *first.shape[1:], self.maps * first.shape[0])
        return [Lazy(shape, first.dtype, lambda: torch.stack([self._turned(tensors, e) for e in range(self.experts)]))]

    def _turned(self, tensors: list[Lazy], e: int) -> Tensor:
        own = [lazy.load() for lazy in tensors[e * self.maps : (e + 1) * self.maps]]
        return torch.stack(own, 1).flatten(0, 1).transpose(0, -1)


families.add(GptOss.model_type, GptOss())
