"""The family `phi3` (Phi 3, 3.5 and 4): as Llama, with q, k and v stored as one matrix, gate and up as another, and LongRoPE.

arXiv:2404.14219. What older files call `su` or `yarn` scaling is LongRoPE.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ...models.block import Block
from ...models.transformer import Transformer
from ...nn.norms import RMS
from ...nn.patterns import Full, Window
from ...nn.positions import Rope
from ...nn.rope_scaling import LongScaling
from ..rules import Rename, Rule, Split
from . import families, rope
from .llama import NAMES, Keys, Llama, attention, mlp, parts, shared_values, stack, without_implied


class Phi3Keys(Keys):
    vocab_size: int = Field(32064, gt=0)
    hidden_size: int = Field(3072, gt=0)
    intermediate_size: int = Field(8192, gt=0)
    max_position_embeddings: int = Field(4096, gt=0)
    original_max_position_embeddings: int = Field(4096, gt=0)
    rms_norm_eps: float = Field(1e-5, gt=0)
    resid_pdrop: float = Field(0.0, ge=0, lt=1)
    sliding_window: int | None = Field(None, gt=0)


class Phi3(Llama):
    """Phi 3, 3.5 and 4, their text models."""

    model_type = "phi3"
    architecture = "Phi3ForCausalLM"
    keys = Phi3Keys
    carried = {
        "initializer_range": 0.02,
        "use_cache": True,
        "pad_token_id": 32000,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,  # transformers applies none
    }
    spelled = ("rope_parameters", "original_max_position_embeddings")

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        config = rope.modernize(config)
        parameters = dict(config["rope_parameters"])
        if parameters["rope_type"] in ("su", "yarn"):
            parameters["rope_type"] = "longrope"
        if parameters["rope_type"] == "longrope":  # the trained length stands beside them, and counts
            default = Phi3Keys.model_fields[rope.ORIGINAL].default
            parameters[rope.ORIGINAL] = config.get(rope.ORIGINAL, default)
        return {**config, "rope_parameters": parameters}

    def spec(self, keys: Any) -> Transformer:
        pattern = Full() if keys.sliding_window is None else Window(size=keys.sliding_window)
        mixer = attention(keys, {"pattern": pattern}, partial=True)
        block = Block(mixer=mixer, ffn=mlp(keys), norm=RMS(eps=keys.rms_norm_eps), dropout=keys.resid_pdrop)
        return stack(keys, [block] * keys.num_hidden_layers)

    def values(self, spec: Transformer) -> dict[str, Any]:
        attention, mlp = parts(self, spec)
        (block,) = spec.blocks.values()
        assert isinstance(attention.position, Rope)
        scaling = attention.position.scaling
        values: dict[str, Any] = {
            **shared_values(spec, attention, mlp),
            "rope_parameters": {"partial_rotary_factor": 1.0, **rope.from_rope(attention.position)},
            "original_max_position_embeddings": scaling.original_max_position_embeddings if isinstance(scaling, LongScaling) else 4096,
            "resid_pdrop": block.dropout,
            "sliding_window": attention.pattern.size if isinstance(attention.pattern, Window) else None,
        }
        return without_implied(values)

    def layer_rules(self, spec: Transformer, theirs: str, ours: str) -> list[Rule]:
        attention, mlp = parts(self, spec)
        kept = {name: mine for name, mine in NAMES.items() if "inp" not in mine}
        heads = [attention.heads, attention.kv_heads, attention.kv_heads]
        return [
            *(Rename(f"{theirs}.{name}", f"{ours}.{mine}") for name, mine in kept.items()),
            Split(
                f"{theirs}.self_attn.qkv_proj",
                [f"{ours}.mixer.inp.{name}" for name in "qkv"],
                sizes=[n * attention.head_dim for n in heads],
            ),
            Split(f"{theirs}.mlp.gate_up_proj", [f"{ours}.ffn.inp.gate", f"{ours}.ffn.inp.up"], sizes=[mlp.hidden] * 2),
        ]


families.add(Phi3.model_type, Phi3())
