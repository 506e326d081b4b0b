"""The family `qwen3_moe`: Qwen 3's attention with a mixture of small experts, and a plain MLP in layers that a config names.

Experts are stored one by one. Files that say `num_experts` are of transformers before 5. arXiv:2505.09388.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ...models.block import Block
from ...models.transformer import Transformer
from ...nn.attention import Attention
from ...nn.feedforward import MLP
from ...nn.moe import MoE
from ...nn.norms import RMS
from ...nn.patterns import Full, Window
from ..rules import Rename, Rule
from . import families, llama, qwen
from .mixtral import mixture


class Qwen3MoeKeys(llama.Keys):
    vocab_size: int = Field(151936, gt=0)
    hidden_size: int = Field(2048, gt=0)
    intermediate_size: int = Field(6144, gt=0)
    num_hidden_layers: int = Field(24, gt=0, le=10_000)
    num_key_value_heads: int | None = Field(4, gt=0)
    max_position_embeddings: int = Field(32768, gt=0)
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = Field(4096, gt=0)
    num_local_experts: int = Field(128, gt=0)
    num_experts_per_tok: int = Field(8, gt=0)
    moe_intermediate_size: int = Field(768, gt=0)
    norm_topk_prob: bool = False
    decoder_sparse_step: int = Field(1, gt=0)
    mlp_only_layers: tuple[int, ...] | None = None


class Qwen3Moe(qwen.Qwen3):
    """Qwen 3 with experts: 30B-A3B, 235B-A22B."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    keys = Qwen3MoeKeys
    carried = {**qwen.CARRIED, "output_router_logits": False, "router_aux_loss_coef": 0.001}
    spelled = ("rope_parameters", "intermediate_size", "moe_intermediate_size", "mlp_only_layers", "decoder_sparse_step")

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        config = super().modernize(config)
        if "num_experts" in config:
            config["num_local_experts"] = config.pop("num_experts")
        return config

    def spec(self, keys: Any) -> Transformer:
        fields = {
            "bias": ("q", "k", "v", "out") if keys.attention_bias else (),
            "qk_norm": RMS(eps=keys.rms_norm_eps),
            "pattern": Window(size=keys.sliding_window) if keys.use_sliding_window and keys.sliding_window is not None else Full(),
        }
        dense = llama.mlp(keys)
        moe = mixture(
            experts=keys.num_local_experts,
            top_k=keys.num_experts_per_tok,
            expert=dense.replace(hidden=keys.moe_intermediate_size),
            normalize=keys.norm_topk_prob,
        )
        mixer, norm = llama.attention(keys, fields), RMS(eps=keys.rms_norm_eps)
        sparse = [(i + 1) % keys.decoder_sparse_step == 0 and i not in (keys.mlp_only_layers or ()) for i in range(keys.num_hidden_layers)]
        return llama.stack(keys, [Block(mixer=mixer, ffn=moe if one else dense, norm=norm) for one in sparse])

    def values(self, spec: Transformer) -> dict[str, Any]:
        blocks = [spec.blocks[name] for name in spec.layers]
        mixer, ffns = blocks[0].mixer, [block.ffn for block in blocks]
        moe = next((ffn for ffn in ffns if isinstance(ffn, MoE)), None)
        if not isinstance(mixer, Attention) or moe is None:
            raise self.cannot("each layer must be attention with rotary positions, then a mixture of experts or an mlp")
        dense = next((ffn for ffn in ffns if isinstance(ffn, MLP)), None)
        step, only = sparsity([isinstance(ffn, MoE) for ffn in ffns])
        return {
            **llama.without_implied(llama.shared_values(spec, mixer, moe.expert)),
            "intermediate_size": 6144 if dense is None else dense.hidden,
            "attention_bias": bool(mixer.bias),
            "use_sliding_window": isinstance(mixer.pattern, Window),
            "sliding_window": mixer.pattern.size if isinstance(mixer.pattern, Window) else None,
            "num_local_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.expert.hidden,
            "norm_topk_prob": moe.normalize,
            "decoder_sparse_step": step,
            "mlp_only_layers": only,
        }

    def rules(self, spec: Transformer) -> list[Rule]:
        theirs, ours = "model.layers.{i}.mlp", "layers.{i}.ffn"
        maps = {"gate_proj": "inp.gate", "up_proj": "inp.up", "down_proj": "out"}
        return [
            Rename(f"{theirs}.gate", f"{ours}.router"),
            *(Rename(f"{theirs}.experts.{{e}}.{name}", f"{ours}.experts.{{e}}.{mine}") for name, mine in maps.items()),
            *super().rules(spec),
        ]


def sparsity(sparse: list[bool]) -> tuple[int, list[int]]:
    """decoder_sparse_step and mlp_only_layers that say which layers have experts, with the shortest list."""
    out = []
    for step in range(1, len(sparse) + 1):
        due = [(i + 1) % step == 0 for i in range(len(sparse))]
        if all(due[i] or not one for i, one in enumerate(sparse)):
            out.append((step, [i for i, one in enumerate(sparse) if due[i] and not one]))
    return min(out, key=lambda said: len(said[1]))


families.add(Qwen3Moe.model_type, Qwen3Moe())
