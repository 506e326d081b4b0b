"""The family `mixtral`: Mistral's blocks with a mixture of SwiGLU experts, softmax scores, the best k renormalized.

Experts are stored one by one, w1 (gate), w3 (up) and w2 (down). The coefficients of training losses are carried along;
router jitter, which only training would see, as well. arXiv:2401.04088.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ...core.spec import validate
from ...models.block import Block
from ...models.transformer import Transformer
from ...nn.attention import Attention
from ...nn.moe import MoE
from ...nn.norms import RMS
from ...nn.patterns import Full, Window
from ...nn.positions import Rope
from ..rules import Rename, Rule
from . import Family, families, llama, rope


class MixtralKeys(llama.Keys):
    intermediate_size: int = Field(14336, gt=0)
    num_key_value_heads: int | None = Field(8, gt=0)
    max_position_embeddings: int = Field(131072, gt=0)
    rms_norm_eps: float = Field(1e-5, gt=0)
    sliding_window: int | None = Field(None, gt=0)
    num_local_experts: int = Field(8, gt=0)
    num_experts_per_tok: int = Field(2, gt=0)


class Mixtral(llama.Llama):
    """Mixtral 8x7B and 8x22B."""

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    keys = MixtralKeys
    carried = {**llama.CARRIED, "output_router_logits": False, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0}

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        return rope.modernize(config, theta=1e6)

    def spec(self, keys: Any) -> Transformer:
        pattern = Full() if keys.sliding_window is None else Window(size=keys.sliding_window)
        moe = mixture(experts=keys.num_local_experts, top_k=keys.num_experts_per_tok, expert=llama.mlp(keys))
        block = Block(mixer=llama.attention(keys, {"pattern": pattern}), ffn=moe, norm=RMS(eps=keys.rms_norm_eps))
        return llama.stack(keys, [block] * keys.num_hidden_layers)

    def values(self, spec: Transformer) -> dict[str, Any]:
        attention, moe = sparse(self, spec)
        return {
            **llama.shared_values(spec, attention, moe.expert),
            "sliding_window": attention.pattern.size if isinstance(attention.pattern, Window) else None,
            "num_local_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
        }

    def rules(self, spec: Transformer) -> list[Rule]:
        theirs, ours = "model.layers.{i}.block_sparse_moe", "layers.{i}.ffn"
        maps = {"w1": "inp.gate", "w3": "inp.up", "w2": "out"}
        return [
            Rename(f"{theirs}.gate", f"{ours}.router"),
            *(Rename(f"{theirs}.experts.{{e}}.{name}", f"{ours}.experts.{{e}}.{mine}") for name, mine in maps.items()),
            *super().rules(spec),
        ]


def mixture(**fields: Any) -> MoE:
    """The mixture of these fields; what they say wrongly is an error of config.json."""
    return validate(MoE, fields, where="config.json")


def sparse(family: Family, spec: Transformer) -> tuple[Attention, MoE]:
    """The attention and the mixture of the first layer, or the reason why they are not there."""
    block = spec.blocks[spec.layers[0]]
    if not isinstance(block.mixer, Attention) or not isinstance(block.mixer.position, Rope) or not isinstance(block.ffn, MoE):
        raise family.cannot("each layer must be attention with rotary positions, then a mixture of experts")
    return block.mixer, block.ffn


families.add(Mixtral.model_type, Mixtral())
