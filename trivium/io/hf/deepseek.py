"""The families `deepseek_v2`, `deepseek_v3` and `deepseek_v32`: latent attention, then an MLP or a mixture of experts.

The first layers are dense, the rest mixtures. V3's router scores by sigmoid, in groups, with a correction that no
gradient reaches; V3.2 adds the indexer. V3's layers for predicting several tokens are not read. arXiv:2405.04434,
arXiv:2412.19437, arXiv:2512.02556.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...core.errors import ConfigError, FileError
from ...core.spec import Spec, validate
from ...models.block import Block
from ...models.transformer import Transformer
from ...nn.feedforward import FFN, MLP
from ...nn.heads import LMHead
from ...nn.latent import LatentAttention
from ...nn.moe import MoE
from ...nn.norms import RMS
from ...nn.positions import Rope
from ...nn.rope_scaling import YarnScaling, yarn_magnitude
from ...nn.routing import Groups
from ...nn.sparse import Indexer
from ..rules import Drop, Rename, Rule, Split
from ..tensors import Lazy
from . import Family, families, rope
from .llama import ACTIVATIONS

IDLE = frozenset({"aux_loss_alpha", "ep_size", "seq_aux"})  # keys of published files that are of training alone
LATENT_NORM = RMS(eps=1e-6)  # whatever rms_norm_eps says
CARRIED = {
    "initializer_range": 0.02,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "attention_dropout": 0.0,
    "output_router_logits": False,
}


class Keys(Spec):
    """What all three read from config.json. The defaults are V3's."""

    vocab_size: int = Field(129280, gt=0)
    hidden_size: int = Field(7168, gt=0)
    intermediate_size: int = Field(18432, gt=0)
    moe_intermediate_size: int = Field(2048, gt=0)
    num_hidden_layers: int = Field(61, gt=0, le=10_000)
    num_attention_heads: int = Field(128, gt=0)
    num_key_value_heads: int | None = Field(None, gt=0)
    n_shared_experts: int = Field(1, gt=0)
    n_routed_experts: int = Field(256, gt=0)
    num_experts_per_tok: int = Field(8, gt=0)
    routed_scaling_factor: float = 2.5
    n_group: int | None = Field(8, gt=0)
    topk_group: int | None = Field(4, gt=0)
    kv_lora_rank: int = Field(512, gt=0)
    q_lora_rank: int | None = Field(1536, gt=0)
    qk_rope_head_dim: int = Field(64, gt=0)
    qk_nope_head_dim: int = Field(128, gt=0)
    qk_head_dim: int | None = None  # the sum of the two, where it is written
    head_dim: int | None = None  # qk_rope_head_dim again
    v_head_dim: int = Field(128, gt=0)
    hidden_act: str = "silu"
    max_position_embeddings: int = Field(4096, gt=0)
    rms_norm_eps: float = Field(1e-6, gt=0)
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any]


class V2Keys(Keys):
    vocab_size: int = Field(102400, gt=0)
    hidden_size: int = Field(4096, gt=0)
    intermediate_size: int = Field(11008, gt=0)
    moe_intermediate_size: int = Field(1407, gt=0)
    num_hidden_layers: int = Field(32, gt=0, le=10_000)
    num_attention_heads: int = Field(32, gt=0)
    n_shared_experts: int = Field(2, gt=0)
    n_routed_experts: int = Field(64, gt=0)
    num_experts_per_tok: int | None = Field(None, gt=0)
    routed_scaling_factor: float = 1.0
    n_group: int | None = Field(None, gt=0)
    topk_group: int | None = Field(None, gt=0)
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"
    max_position_embeddings: int = Field(2048, gt=0)
    first_k_dense_replace: int = Field(0, ge=0)
    mlp_bias: bool = False


class V3Keys(Keys):
    norm_topk_prob: bool = True
    first_k_dense_replace: int = Field(3, ge=0)
    rope_interleave: bool = True


class V32Keys(Keys):
    q_lora_rank: int = Field(1536, gt=0)
    max_position_embeddings: int = Field(163840, gt=0)
    norm_topk_prob: bool = True
    first_k_dense_replace: int = Field(3, ge=0)
    mlp_layer_types: tuple[Literal["dense", "sparse"], ...] | None = None
    layer_types: tuple[Literal["indexed_attention"], ...] | None = None
    index_topk: int = Field(2048, gt=0)
    index_head_dim: int = Field(128, gt=0)
    index_n_heads: int = Field(64, gt=0)


class V3(Family):
    """DeepSeek-V3 and R1."""

    model_type = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"
    keys: type[Keys] = V3Keys
    carried = {**CARRIED, "pretraining_tp": 1, "num_nextn_predict_layers": 1}
    always: ClassVar[Mapping[str, Any]] = {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    }  # said by published files

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        return rope.modernize(config)

    def unknown_keys(self, config: Mapping[str, Any]) -> list[str]:
        known = {key for key, value in self.always.items() if config.get(key) == value} | IDLE
        return [key for key in super().unknown_keys(config) if key not in known]

    def to_spec(self, config: Mapping[str, Any], *, allow_unknown: Collection[str] = ()) -> tuple[Transformer, dict[str, Any]]:
        """Sizes of layers that this model has none of are carried."""
        spec, rest = super().to_spec(config, allow_unknown=allow_unknown)
        assert isinstance(spec, Transformer)
        said = self.values(spec)
        return spec, {**rest, **{key: config[key] for key in self.keys.model_fields if key in config and key not in said}}

    def spec(self, keys: Any) -> Transformer:
        check(keys)
        norm = RMS(eps=keys.rms_norm_eps)
        mixer = self.attention(keys)
        dense = MLP(hidden=keys.intermediate_size, activation=ACTIVATIONS[keys.hidden_act], bias=self.mlp_bias(keys))
        sparse = [index >= keys.first_k_dense_replace for index in range(keys.num_hidden_layers)]
        if isinstance(keys, V32Keys) and keys.mlp_layer_types is not None:
            sparse = [kind == "sparse" for kind in keys.mlp_layer_types]
        kinds: dict[bool, FFN] = {False: dense}
        if any(sparse):
            kinds[True] = self.mixture(keys)
        names = {kind: f"layer{number}" if len(set(sparse)) > 1 else "layer" for number, kind in enumerate(dict.fromkeys(sparse))}
        return Transformer(
            dim=keys.hidden_size,
            vocab=keys.vocab_size,
            layers=tuple(names[kind] for kind in sparse),
            blocks={name: Block(mixer=mixer, ffn=kinds[kind], norm=norm) for kind, name in names.items()},
            head=LMHead(tied=keys.tie_word_embeddings),
            final_norm=norm,
            context=rope.context(mixer.position, keys.max_position_embeddings) if mixer.position else keys.max_position_embeddings,
        )

    def mlp_bias(self, keys: Any) -> bool:
        """Whether the maps of dense layers and of shared experts have a bias."""
        return False

    def interleaved(self, keys: Any) -> bool:
        """Whether neighboring rotary channels are paired."""
        return keys.rope_interleave

    def indexer(self, keys: Any, position: Rope) -> Indexer | None:
        return None

    def attention(self, keys: Any) -> LatentAttention:
        turns = rope.to_rope(keys.rope_parameters, positions=keys.max_position_embeddings)
        bias = ("q", "kv", "rope", "out") if keys.q_lora_rank is not None else ("kv", "rope", "out")
        return LatentAttention(
            heads=keys.num_attention_heads,
            kv_rank=keys.kv_lora_rank,
            q_rank=keys.q_lora_rank,
            head_dim=keys.qk_nope_head_dim,
            rope_dim=keys.qk_rope_head_dim,
            v_dim=keys.v_head_dim,
            bias=bias if keys.attention_bias else (),
            norm=LATENT_NORM,
            position=turns.replace(layout="interleaved") if self.interleaved(keys) else turns,
            scale=scale(turns, keys.qk_nope_head_dim + keys.qk_rope_head_dim),
            indexer=self.indexer(keys, turns),
        )

    def mixture(self, keys: Any) -> MoE:
        activation = ACTIVATIONS[keys.hidden_act]
        return MoE(
            experts=keys.n_routed_experts,
            top_k=keys.num_experts_per_tok,
            expert=MLP(hidden=keys.moe_intermediate_size, activation=activation),
            shared=MLP(hidden=keys.moe_intermediate_size * keys.n_shared_experts, activation=activation, bias=self.mlp_bias(keys)),
            scale=keys.routed_scaling_factor,
            **self.routing(keys),
        )

    def routing(self, keys: Any) -> dict[str, Any]:
        """The fields of a mixture that tell the families apart."""
        return {"score": "sigmoid", "normalize": keys.norm_topk_prob, "groups": groups(keys, "top2"), "correction": True}

    def values(self, spec: Any) -> dict[str, Any]:
        mixer, dense, sparse = self.parts(spec)
        turns, mlp = mixer.position, dense or sparse.shared
        assert turns is not None
        mixtures = [isinstance(spec.blocks[name].ffn, MoE) for name in spec.layers]
        return {
            "vocab_size": spec.vocab,
            "hidden_size": spec.dim,
            "num_hidden_layers": len(spec.layers),
            "num_attention_heads": mixer.heads,
            "num_key_value_heads": mixer.heads,
            "kv_lora_rank": mixer.kv_rank,
            "q_lora_rank": mixer.q_rank,
            "qk_rope_head_dim": mixer.rope_dim,
            "qk_nope_head_dim": mixer.head_dim,
            "qk_head_dim": mixer.rope_dim + mixer.head_dim,
            "head_dim": mixer.rope_dim,
            "v_head_dim": mixer.v_dim,
            "attention_bias": bool(mixer.bias),
            "hidden_act": next((name for name, activation in ACTIVATIONS.items() if activation == mlp.activation), "silu"),
            "rms_norm_eps": spec.final_norm.eps if isinstance(spec.final_norm, RMS) else 1e-6,
            "max_position_embeddings": rope.positions(turns, spec.context or 2048),
            "tie_word_embeddings": isinstance(spec.head, LMHead) and spec.head.tied,
            "rope_parameters": rope.from_rope(turns.replace(layout="half")),
            "first_k_dense_replace": mixtures.index(True) if any(mixtures) else len(mixtures),
            **({"intermediate_size": dense.hidden} if dense is not None else {}),
            **(self.mixture_values(sparse) if sparse is not None else {}),
            **self.own_values(mixer, mlp, mixtures),
        }

    def mixture_values(self, sparse: MoE) -> dict[str, Any]:
        groups = sparse.groups
        return {
            "n_routed_experts": sparse.experts,
            "num_experts_per_tok": sparse.top_k,
            "moe_intermediate_size": sparse.expert.hidden,
            "n_shared_experts": sparse.shared.hidden // sparse.expert.hidden if sparse.shared is not None else 0,
            "norm_topk_prob": sparse.normalize,
            "routed_scaling_factor": sparse.scale,
            "n_group": groups.count if groups is not None else 1,
            "topk_group": groups.chosen if groups is not None else 1,
        }

    def own_values(self, mixer: LatentAttention, mlp: MLP, mixtures: list[bool]) -> dict[str, Any]:
        """The keys that only this family has; `mlp`: what every token passes, dense or shared."""
        assert mixer.position is not None
        return {"rope_interleave": mixer.position.layout == "interleaved"}

    def parts(self, spec: Any) -> tuple[LatentAttention, MLP | None, Any]:
        """The attention, the dense MLP and the mixture of a spec that has the shape, or the reason why it does not."""
        if not isinstance(spec, Transformer) or len({block.mixer for block in spec.blocks.values()}) != 1:
            raise self.cannot("all its layers must have the same attention")
        mixer = next(iter(spec.blocks.values())).mixer
        if not isinstance(mixer, LatentAttention) or mixer.position is None:
            raise self.cannot("each layer must be latent attention with rotary positions, then an mlp or a mixture of experts")
        dense = {block.ffn for block in spec.blocks.values() if isinstance(block.ffn, MLP)}
        sparse = {block.ffn for block in spec.blocks.values() if isinstance(block.ffn, MoE)}
        if len(dense) > 1 or len(sparse) > 1 or len(dense) + len(sparse) != len(spec.blocks) or any(part.shared is None for part in sparse):
            raise self.cannot("each layer must be latent attention with rotary positions, then an mlp or a mixture of experts, all alike")
        return mixer, next(iter(dense), None), next(iter(sparse), None)

    def rules(self, spec: Any) -> list[Rule]:
        mixer, _, _ = self.parts(spec)
        layer, ours = "model.layers.{i}", "layers.{i}"
        names = {
            "input_layernorm": "mixer_norm",
            "self_attn.kv_a_layernorm": "mixer.kv_norm",
            "self_attn.o_proj": "mixer.out",
            "post_attention_layernorm": "ffn_norm",
            "mlp.gate": "ffn.router",
            "mlp.gate.e_score_correction_bias": "ffn.router.correction.weight",
            **mlp_names("mlp", "ffn"),
            **mlp_names("mlp.shared_experts", "ffn.shared"),
            **mlp_names("mlp.experts.{e}", "ffn.experts.{e}"),
        }
        if mixer.q_rank is None:
            names["self_attn.q_proj"] = "mixer.inp.q"
        else:
            names |= {"self_attn.q_a_proj": "mixer.inp.q", "self_attn.q_a_layernorm": "mixer.q_norm", "self_attn.q_b_proj": "mixer.q_up"}
        if mixer.indexer is not None:
            inside = {"wq_b": "q", "wk": "inp.k", "weights_proj": "inp.weight", "k_norm": "norm"}
            names |= {f"self_attn.indexer.{theirs}": f"mixer.indexer.{mine}" for theirs, mine in inside.items()}
        tied = isinstance(spec.head, LMHead) and spec.head.tied
        return [
            Rename("model.embed_tokens", "embed"),
            *(Rename(f"{layer}.{theirs}", f"{ours}.{mine}") for theirs, mine in names.items()),
            Split(
                f"{layer}.self_attn.kv_a_proj_with_mqa",
                [f"{ours}.mixer.inp.kv", f"{ours}.mixer.inp.rope"],
                sizes=(mixer.kv_rank, mixer.rope_dim),
            ),
            SplitHeads(f"{layer}.self_attn.kv_b_proj", [f"{ours}.mixer.up.k", f"{ours}.mixer.up.v"], sizes=(mixer.head_dim, mixer.v_dim)),
            Rename("model.norm", "final_norm"),
            Drop("lm_head", same_as="model.embed_tokens") if tied else Rename("lm_head", "head.out"),
        ]


class V2(V3):
    """DeepSeek-V2: softmax scores, and where they are `group_limited_greedy`, groups ranked by their best expert."""

    model_type = "deepseek_v2"
    architecture = "DeepseekV2ForCausalLM"
    keys = V2Keys
    carried = {**CARRIED, "bos_token_id": 1, "eos_token_id": 2, "pretraining_tp": 1, "norm_topk_prob": False}
    always = {"scoring_func": "softmax", "moe_layer_freq": 1}

    def mlp_bias(self, keys: Any) -> bool:
        return keys.mlp_bias

    def interleaved(self, keys: Any) -> bool:
        return True

    def routing(self, keys: Any) -> dict[str, Any]:
        limited = groups(keys, "max") if keys.topk_method == "group_limited_greedy" else None
        return {"score": "softmax", "normalize": False, "groups": limited}

    def values(self, spec: Any) -> dict[str, Any]:
        values = super().values(spec)
        if spec.dim % values["num_attention_heads"]:
            raise self.cannot(f"transformers wants a width ({spec.dim}) that is a multiple of the number of heads")
        return values

    def mixture_values(self, sparse: MoE) -> dict[str, Any]:
        values = super().mixture_values(sparse)
        unread = {"norm_topk_prob"} if sparse.groups is not None else {"norm_topk_prob", "n_group", "topk_group"}
        method = "greedy" if sparse.groups is None else "group_limited_greedy"
        return {**{key: value for key, value in values.items() if key not in unread}, "topk_method": method}

    def own_values(self, mixer: LatentAttention, mlp: MLP, mixtures: list[bool]) -> dict[str, Any]:
        return {"mlp_bias": mlp.bias}


class V32(V3):
    """DeepSeek-V3.2: V3 whose attention reads what an indexer selects."""

    model_type = "deepseek_v32"
    architecture = "DeepseekV32ForCausalLM"
    keys = V32Keys
    carried = {**CARRIED, "mlp_bias": False}

    def interleaved(self, keys: Any) -> bool:
        return True

    def indexer(self, keys: Any, position: Rope) -> Indexer:
        return Indexer(
            heads=keys.index_n_heads, head_dim=keys.index_head_dim, top_k=keys.index_topk, rope_dim=keys.qk_rope_head_dim, position=position
        )

    def own_values(self, mixer: LatentAttention, mlp: MLP, mixtures: list[bool]) -> dict[str, Any]:
        if mixer.indexer is None:
            raise self.cannot("it has no indexer")
        return {
            "index_topk": mixer.indexer.top_k,
            "index_head_dim": mixer.indexer.head_dim,
            "index_n_heads": mixer.indexer.heads,
            "layer_types": ["indexed_attention"] * len(mixtures),
            "mlp_layer_types": ["sparse" if mixture else "dense" for mixture in mixtures],
        }


class SplitHeads(Rule):
    """One map on disk holds, head by head, the outputs of several of ours: `sizes` of each head in turn."""

    def __init__(self, disk: str, ours: list[str], *, sizes: tuple[int, ...]):
        super().__init__([disk], ours)
        self.sizes = sizes

    def forward(self, tensors: list[Lazy]) -> list[Lazy]:
        (whole,) = tensors
        heads, rest = divmod(whole.shape[0], sum(self.sizes))
        if rest:
            raise FileError(f"{self.disk[0].text}: {whole.shape[0]} rows are not whole heads of {self.sizes}")
        return [
            whole.derive((heads * size, *whole.shape[1:]), lambda value, number=number: self._part(value, number))
            for number, size in enumerate(self.sizes)
        ]

    def _part(self, whole: Tensor, number: int) -> Tensor:
        return whole.unflatten(0, (-1, sum(self.sizes))).split(self.sizes, 1)[number].flatten(0, 1)

    def backward(self, tensors: list[Lazy]) -> list[Lazy]:
        shape = (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:])

        def whole() -> Tensor:
            heads = [tensor.load().unflatten(0, (-1, size)) for tensor, size in zip(tensors, self.sizes, strict=True)]
            return torch.cat(heads, 1).flatten(0, 1)

        return [Lazy(shape, tensors[0].dtype, whole)]


def groups(keys: Any, rank: Literal["max", "top2"]) -> Groups | None:
    """The groups that bound a token's choice of experts; one group bounds nothing."""
    return None if keys.n_group in (None, 1) else validate(Groups, {"count": keys.n_group, "chosen": keys.topk_group, "rank": rank})


def mlp_names(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.gate_proj": f"{ours}.inp.gate", f"{theirs}.up_proj": f"{ours}.inp.up", f"{theirs}.down_proj": f"{ours}.out"}


def check(keys: Any) -> None:
    """Raise `ConfigError` for what transformers would compute otherwise, or not at all."""
    if keys.hidden_act not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ConfigError(
            f"config.json: hidden_act {keys.hidden_act!r} is not supported (known: {known})", field="hidden_act", choices=ACTIVATIONS
        )
    for name in ("mlp_layer_types", "layer_types"):
        if isinstance(keys, V32Keys) and (kinds := keys.model_dump()[name]) is not None and len(kinds) != keys.num_hidden_layers:
            raise ConfigError(f"config.json: {name} lists {len(kinds)} layers, num_hidden_layers is {keys.num_hidden_layers}", field=name)
    expected = {
        "num_key_value_heads": keys.num_attention_heads,
        "head_dim": keys.qk_rope_head_dim,
        "qk_head_dim": keys.qk_nope_head_dim + keys.qk_rope_head_dim,
    }
    for name, wanted in expected.items():
        if (found := keys.model_dump()[name]) not in (None, wanted):
            raise ConfigError(f"config.json: {name} is {found}, and with the other keys it can only be {wanted}", field=name, value=found)


def scale(turns: Rope, width: int) -> float | None:
    """What scores are multiplied by beside the default: YaRN's `mscale_all_dim` sharpens all channels, not the turned ones alone."""
    scaling = turns.scaling
    if not isinstance(scaling, YarnScaling) or not scaling.mscale_all_dim:
        return None
    return width**-0.5 * yarn_magnitude(scaling.factor, scaling.mscale_all_dim) ** 2


for _family in (V2(), V3(), V32()):
    families.add(_family.model_type, _family)
