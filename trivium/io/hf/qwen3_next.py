"""The family `qwen3_next`: Gated DeltaNet layers and, each so often, gated attention that turns a part of each head; mixtures
of experts with a gated shared one, or MLPs. Norms have weights around zero, but for that of the delta rule's output.

Queries and gates of attention lie together head by head on disk, and so do q, k, v and gate, beta and decay of the delta rule.
The layers of multi-token prediction (`mtp`) are read over, as by transformers. arXiv:2412.06464, arXiv:2505.09388.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ...core.errors import ConfigError
from ...core.spec import validate
from ...models.block import Block
from ...models.transformer import Transformer
from ...nn.attention import Attention
from ...nn.delta import GatedDelta
from ...nn.feedforward import MLP
from ...nn.heads import LMHead
from ...nn.moe import MoE
from ...nn.norms import RMS
from ...nn.positions import Rope
from ..rules import Drop, Interleave, Rename, Rule
from . import Family, families, llama, rope

LINEAR, FULL = "linear_attention", "full_attention"
EXPERT = {"gate_proj": "inp.gate", "up_proj": "inp.up", "down_proj": "out"}
MIXTURE = {"mlp.gate": "ffn.router", "mlp.shared_expert_gate": "ffn.shared_gate"} | {
    f"mlp.shared_expert.{name}": f"ffn.shared.{mine}" for name, mine in EXPERT.items()
}
NORMS = {"input_layernorm": "mixer_norm", "post_attention_layernorm": "ffn_norm"}
ATTENTION = {
    "self_attn.k_proj": "mixer.inp.k",
    "self_attn.v_proj": "mixer.inp.v",
    "self_attn.o_proj": "mixer.out",
    "self_attn.q_norm": "mixer.norms.q",
    "self_attn.k_norm": "mixer.norms.k",
}
DELTA = {"linear_attn.conv1d": "mixer.conv", "linear_attn.norm": "mixer.norm", "linear_attn.out_proj": "mixer.out"} | {
    f"linear_attn.{name}": f"mixer.decay.{name}" for name in ("A_log", "dt_bias")
}


class Qwen3NextKeys(llama.Keys):
    """What the family reads from config.json."""

    vocab_size: int = Field(151936, gt=0)
    hidden_size: int = Field(2048, gt=0)
    intermediate_size: int = Field(5632, gt=0)
    num_hidden_layers: int = Field(48, gt=0, le=10_000)
    num_attention_heads: int = Field(16, gt=0)
    num_key_value_heads: int | None = Field(2, gt=0)
    head_dim: int | None = Field(256, gt=0)
    max_position_embeddings: int = Field(32768, gt=0)
    attention_bias: bool = False
    layer_types: tuple[Literal["linear_attention", "full_attention"], ...]
    linear_conv_kernel_dim: int = Field(4, gt=0)
    linear_key_head_dim: int = Field(128, gt=0)
    linear_value_head_dim: int = Field(128, gt=0)
    linear_num_key_heads: int = Field(16, gt=0)
    linear_num_value_heads: int = Field(32, gt=0)
    decoder_sparse_step: int = Field(1, gt=0)
    mlp_only_layers: tuple[int, ...] | None = None
    num_experts: int = Field(512, ge=0)
    num_experts_per_tok: int = Field(10, gt=0)
    moe_intermediate_size: int = Field(512, gt=0)
    shared_expert_intermediate_size: int = Field(512, gt=0)
    norm_topk_prob: bool = True

    def sparse(self, layer: int) -> bool:
        """Whether a layer has a mixture of experts."""
        chosen = (layer + 1) % self.decoder_sparse_step == 0 and layer not in (self.mlp_only_layers or ())
        return chosen and self.num_experts > 0


PLACEMENT = ("decoder_sparse_step", "mlp_only_layers", "num_experts")  # the same layers may be sparse in several words


class Qwen3Next(Family):
    """Qwen3-Next."""

    model_type = "qwen3_next"
    architecture = "Qwen3NextForCausalLM"
    keys = Qwen3NextKeys
    carried = {
        "initializer_range": 0.02,
        "use_cache": True,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "attention_dropout": 0.0,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    # Where no layer is of some sort, its keys say nothing, and a file's own are kept.
    spelled = (
        "rope_parameters",
        *(name for name in Qwen3NextKeys.model_fields if name not in llama.Keys.model_fields),
        "intermediate_size",
    )

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        config = {"partial_rotary_factor": 0.25, **config}
        interval, layers = config.pop("full_attention_interval", 4), config.get("num_hidden_layers", 48)
        sound = isinstance(interval, int) and isinstance(layers, int) and interval > 0 and layers <= 10_000
        if config.get("layer_types") is None and sound:
            config["layer_types"] = [FULL if (i + 1) % interval == 0 else LINEAR for i in range(layers)]
        return rope.modernize(config)

    def spec(self, keys: Any) -> Transformer:
        if len(keys.layer_types) != keys.num_hidden_layers:
            raise ConfigError(
                f"config.json: layer_types lists {len(keys.layer_types)} layers, num_hidden_layers says {keys.num_hidden_layers}",
                field="layer_types",
            )
        norm = RMS(eps=keys.rms_norm_eps, offset=1.0, round_first=False)
        mixers = {LINEAR: delta(keys), FULL: attention(keys, norm)}
        dense, sparse = llama.mlp(keys), mixture(keys) if any(map(keys.sparse, range(keys.num_hidden_layers))) else None
        blocks = [
            Block(mixer=mixers[kind], ffn=sparse if keys.sparse(i) else dense, norm=norm)
            for i, kind in enumerate(keys.layer_types)
        ]  # fmt: skip
        return llama.stack(keys, blocks).replace(final_norm=norm)

    def values(self, spec: Transformer) -> dict[str, Any]:
        blocks = [spec.blocks[name] for name in spec.layers]
        values: dict[str, Any] = {"layer_types": [LINEAR if isinstance(block.mixer, GatedDelta) else FULL for block in blocks]}
        for block in blocks:
            values |= mixer_values(self, block) | ffn_values(self, block)
        if "rope_parameters" not in values:
            raise self.cannot("some layer must be attention: it says what the others do not")
        sparse = [isinstance(block.ffn, MoE) for block in blocks]
        return {
            **{name: field.default for name, field in self.keys.model_fields.items() if not field.is_required()},
            "vocab_size": spec.vocab,
            "hidden_size": spec.dim,
            "num_hidden_layers": len(blocks),
            "max_position_embeddings": spec.context or 32768,
            "rms_norm_eps": spec.final_norm.eps if isinstance(spec.final_norm, RMS) else 1e-6,
            "tie_word_embeddings": isinstance(spec.head, LMHead) and spec.head.tied,
            **values,
            "mlp_only_layers": [i for i, has in enumerate(sparse) if not has],
        }

    def to_hf(self, spec: Any, rest: Mapping[str, Any]) -> dict[str, Any]:
        config = super().to_hf(spec, rest)
        own = {key: rest[key] for key in PLACEMENT if key in rest}
        return {**config, **own} if self._says({**self.values(spec), **own}, spec.with_plain_names()) else config

    def rules(self, spec: Transformer) -> list[Rule]:
        theirs, ours = "model.layers.{i}", "layers.{i}"
        tied = isinstance(spec.head, LMHead) and spec.head.tied
        names = {**NORMS, **MIXTURE, **{f"mlp.{name}": f"ffn.{mine}" for name, mine in EXPERT.items()}}
        return [
            *(Rename(f"{theirs}.mlp.experts.{{e}}.{name}", f"{ours}.ffn.experts.{{e}}.{mine}") for name, mine in EXPERT.items()),
            Rename("model.embed_tokens", "embed"),
            *(rule for i, name in enumerate(spec.layers) for rule in mixer_rules(i, spec.blocks[name])),
            *(Rename(f"{theirs}.{name}", f"{ours}.{mine}") for name, mine in names.items()),
            Rename("model.norm", "final_norm"),
            Drop("lm_head", same_as="model.embed_tokens") if tied else Rename("lm_head", "head.out"),
            *further_prediction(),
        ]


def attention(keys: Qwen3NextKeys, norm: RMS) -> Attention:
    """The gated attention that the keys say."""
    bias = ("q", "k", "v", "gate", "out") if keys.attention_bias else ()
    return llama.attention(keys, {"bias": bias, "qk_norm": norm, "gate": "channel"}, partial=True)


def delta(keys: Qwen3NextKeys) -> GatedDelta:
    """The gated delta rule that the keys say."""
    fields = {
        "key_heads": keys.linear_num_key_heads,
        "value_heads": keys.linear_num_value_heads,
        "key_dim": keys.linear_key_head_dim,
        "value_dim": keys.linear_value_head_dim,
        "kernel": keys.linear_conv_kernel_dim,
        "norm": RMS(eps=keys.rms_norm_eps),
    }
    return validate(GatedDelta, fields, where="config.json")


def mixture(keys: Qwen3NextKeys) -> MoE:
    """The mixture of experts that the keys say."""
    expert = llama.mlp(keys)
    fields = {
        "experts": keys.num_experts,
        "top_k": keys.num_experts_per_tok,
        "expert": expert.replace(hidden=keys.moe_intermediate_size),
        "shared": expert.replace(hidden=keys.shared_expert_intermediate_size),
        "shared_gate": True,
        "normalize": keys.norm_topk_prob,
    }
    return validate(MoE, fields, where="config.json")


def mixer_values(family: Family, block: Block) -> dict[str, Any]:
    """The keys that say a block's mixer."""
    mixer = block.mixer
    if isinstance(mixer, GatedDelta):
        return {
            "linear_num_key_heads": mixer.key_heads,
            "linear_num_value_heads": mixer.value_heads,
            "linear_key_head_dim": mixer.key_dim,
            "linear_value_head_dim": mixer.value_dim,
            "linear_conv_kernel_dim": mixer.kernel,
        }
    if not isinstance(mixer, Attention) or not isinstance(mixer.position, Rope):
        raise family.cannot("each layer must be a gated delta rule, or attention with rotary positions")
    return {
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "attention_bias": bool(mixer.bias),
        "rope_parameters": {"partial_rotary_factor": mixer.position.share, **rope.from_rope(mixer.position)},
    }


def ffn_values(family: Family, block: Block) -> dict[str, Any]:
    """The keys that say a block's feed-forward part."""
    ffn = block.ffn
    if isinstance(ffn, MLP):
        return {"intermediate_size": ffn.hidden}
    if not isinstance(ffn, MoE) or ffn.shared is None:
        raise family.cannot("each layer must have an mlp, or a mixture of experts with a shared one")
    return {
        "num_experts": ffn.experts,
        "num_experts_per_tok": ffn.top_k,
        "moe_intermediate_size": ffn.expert.hidden,
        "shared_expert_intermediate_size": ffn.shared.hidden,
        "norm_topk_prob": ffn.normalize,
    }


def mixer_rules(layer: int, block: Block) -> list[Rule]:
    """Those of one layer's mixer: both sorts have names of ours in common, so that each layer has its own rules."""
    theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
    mixer, names = block.mixer, ATTENTION if isinstance(block.mixer, Attention) else DELTA
    plain = [Rename(f"{theirs}.{name}", f"{ours}.{mine}") for name, mine in names.items()]
    if isinstance(mixer, Attention):
        sizes = (mixer.heads * mixer.head_dim,) * 2
        return [joined(f"{theirs}.self_attn.q_proj", ours, ("q", "gate"), sizes, mixer.heads), *plain]
    assert isinstance(mixer, GatedDelta)
    key, value = mixer.key_heads * mixer.key_dim, mixer.value_heads * mixer.value_dim
    return [
        joined(f"{theirs}.linear_attn.in_proj_qkvz", ours, ("q", "k", "v", "gate"), (key, key, value, value), mixer.key_heads),
        joined(f"{theirs}.linear_attn.in_proj_ba", ours, ("beta", "decay"), (mixer.value_heads,) * 2, mixer.key_heads),
        *plain,
    ]


def joined(disk: str, layer: str, names: tuple[str, ...], sizes: tuple[int, ...], heads: int) -> Rule:
    """Maps of a layer's mixer that lie on disk together, head by head."""
    return Interleave(disk, [f"{layer}.mixer.inp.{name}" for name in names], sizes=sizes, groups=heads)


def further_prediction() -> list[Rule]:
    """The layers that predict further tokens: stored in the published files, and no part of this model."""
    layer = [*NORMS, *ATTENTION, "self_attn.q_proj", *MIXTURE, *(f"mlp.experts.{{e}}.{name}" for name in EXPERT)]
    return [
        *(Drop(f"mtp.{name}") for name in ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")),
        *(Drop(f"mtp.layers.{{i}}.{name}") for name in layer),
    ]


families.add(Qwen3Next.model_type, Qwen3Next())
