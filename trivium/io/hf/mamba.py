"""The families `mamba` and `mamba2`: norm and mixer in each block, no feed-forward part, no positions.

Their keys about time_step (but its limit) and rescaling say how training starts, not what the model is; `residual_in_fp32`
is not followed: the stream has the model's dtype. arXiv:2312.00752, arXiv:2405.21060.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ...core.errors import ConfigError
from ...core.spec import Spec, validate
from ...models.block import Block
from ...models.transformer import Transformer
from ...nn.attention import Mixer
from ...nn.heads import LMHead
from ...nn.mamba import Mamba
from ...nn.mamba2 import Mamba2
from ...nn.norms import RMS
from ..rules import Drop, Rename, Rule, Split
from . import Family, families

CARRIED = {
    "initializer_range": 0.1,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "time_step_floor": 1e-4,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "use_cache": True,
    "bos_token_id": 0,
}
# Written by the converters of the first checkpoints, read by none.
LEGACY = frozenset(
    {"d_inner", "d_model", "n_layer", "fused_add_norm", "norm_before_gate", "pad_vocab_size_multiple", "rms_norm", "ssm_cfg"}
)
INFINITY = {"__float__": "Infinity"}  # how transformers 5 writes it


class Keys(Spec):
    """What both families read from config.json."""

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0, le=10_000)
    expand: int = Field(2, gt=0)
    conv_kernel: int = Field(4, gt=0)
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: Literal["silu"] = "silu"
    layer_norm_epsilon: float = Field(1e-5, gt=0)
    tie_word_embeddings: bool = True


class MambaKeys(Keys):
    vocab_size: int = Field(50280, gt=0)
    hidden_size: int = Field(768, gt=0)
    num_hidden_layers: int = Field(32, gt=0, le=10_000)
    state_size: int = Field(16, gt=0)
    intermediate_size: int | None = Field(None, gt=0)
    time_step_rank: int | Literal["auto"] = "auto"


class Mamba2Keys(Keys):
    vocab_size: int = Field(32768, gt=0)
    hidden_size: int = Field(4096, gt=0)
    num_hidden_layers: int = Field(64, gt=0, le=10_000)
    state_size: int = Field(128, gt=0)
    num_heads: int = Field(128, gt=0)
    head_dim: int = Field(64, gt=0)
    n_groups: int = Field(8, gt=0)
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    tie_word_embeddings: bool = False


class MambaFamily(Family):
    """Mamba."""

    model_type = "mamba"
    architecture = "MambaForCausalLM"
    keys = MambaKeys
    carried = {
        **CARRIED,
        "pad_token_id": 0,
        "eos_token_id": 0,
        "time_step_init_scheme": "random",
        "time_step_scale": 1.0,
        "use_associative_scan": True,
        "use_mambapy": False,
    }

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        return config

    def unknown_keys(self, config: Mapping[str, Any]) -> list[str]:
        return [key for key in super().unknown_keys(config) if key not in LEGACY]

    def spec(self, keys: Any) -> Transformer:
        inner = keys.expand * keys.hidden_size
        if keys.intermediate_size not in (None, inner):
            raise ConfigError(
                f"config.json: intermediate_size ({keys.intermediate_size}) must be expand * hidden_size ({inner})",
                field="intermediate_size",
            )
        rank = math.ceil(keys.hidden_size / 16) if keys.time_step_rank == "auto" else keys.time_step_rank
        mixer = Mamba(
            inner=inner,
            states=keys.state_size,
            dt_rank=rank,
            kernel=keys.conv_kernel,
            conv_bias=keys.use_conv_bias,
            bias=keys.use_bias,
        )
        return shape(keys, mixer)

    def values(self, spec: Transformer) -> dict[str, Any]:
        mixer = only_mixer(self, spec)
        if not isinstance(mixer, Mamba):
            raise self.cannot("each layer must be a mixer of kind mamba and nothing else")
        return {
            **shared_values(self, spec, mixer.inner),
            "intermediate_size": mixer.inner,
            "state_size": mixer.states,
            "time_step_rank": mixer.dt_rank,
            "conv_kernel": mixer.kernel,
            "use_bias": mixer.bias,
            "use_conv_bias": mixer.conv_bias,
        }

    def rules(self, spec: Transformer) -> list[Rule]:
        mixer = only_mixer(self, spec)
        assert isinstance(mixer, Mamba)
        theirs, ours = "backbone.layers.{i}.mixer", "layers.{i}.mixer"
        select = [f"{ours}.select.{name}" for name in ("dt", "B", "C")]
        return [
            *frame_rules(spec),
            Split(f"{theirs}.in_proj", [f"{ours}.inp.x", f"{ours}.inp.gate"], sizes=(mixer.inner,) * 2),
            Split(f"{theirs}.x_proj", select, sizes=(mixer.dt_rank, mixer.states, mixer.states)),
            Rename(f"{theirs}.dt_proj.bias", f"{ours}.channels.dt_bias"),
            Rename(f"{theirs}.dt_proj", f"{ours}.steps"),
            *(Rename(f"{theirs}.{name}", f"{ours}.channels.{name}") for name in ("A_log", "D")),
        ]


class Mamba2Family(MambaFamily):
    """Mamba-2."""

    model_type = "mamba2"
    architecture = "Mamba2ForCausalLM"
    keys = Mamba2Keys
    carried = {**CARRIED, "pad_token_id": 1, "eos_token_id": 2, "chunk_size": 256, "time_step_rank": "auto"}

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        limit = config.get("time_step_limit")
        if not isinstance(limit, list | tuple):
            return config
        return {**config, "time_step_limit": [math.inf if value in (INFINITY, "Infinity") else value for value in limit]}

    def spec(self, keys: Any) -> Transformer:
        if keys.expand * keys.hidden_size != keys.num_heads * keys.head_dim:
            raise ConfigError(
                f"config.json: num_heads * head_dim ({keys.num_heads} * {keys.head_dim}) must be expand * hidden_size "
                f"({keys.expand} * {keys.hidden_size})",
                field="num_heads",
            )
        least, most = keys.time_step_limit
        fields = {
            "heads": keys.num_heads,
            "head_dim": keys.head_dim,
            "states": keys.state_size,
            "groups": keys.n_groups,
            "kernel": keys.conv_kernel,
            "conv_bias": keys.use_conv_bias,
            "bias": keys.use_bias,
            "eps": keys.layer_norm_epsilon,
            "dt_min": least,
            "dt_max": None if most == math.inf else most,
        }
        return shape(keys, validate(Mamba2, fields, where="config.json"))

    def values(self, spec: Transformer) -> dict[str, Any]:
        mixer = only_mixer(self, spec)
        if not isinstance(mixer, Mamba2):
            raise self.cannot("each layer must be a mixer of kind mamba2 and nothing else")
        return {
            **shared_values(self, spec, mixer.heads * mixer.head_dim),
            "state_size": mixer.states,
            "num_heads": mixer.heads,
            "head_dim": mixer.head_dim,
            "n_groups": mixer.groups,
            "conv_kernel": mixer.kernel,
            "use_bias": mixer.bias,
            "use_conv_bias": mixer.conv_bias,
            "time_step_limit": [mixer.dt_min, math.inf if mixer.dt_max is None else mixer.dt_max],
        }

    def to_hf(self, spec: Any, rest: Mapping[str, Any]) -> dict[str, Any]:
        config = super().to_hf(spec, rest)
        return {**config, "time_step_limit": [INFINITY if value == math.inf else value for value in config["time_step_limit"]]}

    def rules(self, spec: Transformer) -> list[Rule]:
        mixer = only_mixer(self, spec)
        assert isinstance(mixer, Mamba2)
        theirs, ours = "backbone.layers.{i}.mixer", "layers.{i}.mixer"
        inner, shared = mixer.heads * mixer.head_dim, mixer.groups * mixer.states
        return [
            *frame_rules(spec),
            Split(
                f"{theirs}.in_proj",
                [f"{ours}.inp.{name}" for name in ("gate", "x", "B", "C", "dt")],
                sizes=(inner, inner, shared, shared, mixer.heads),
            ),
            *(Rename(f"{theirs}.{name}", f"{ours}.decay.{name}") for name in ("A_log", "dt_bias")),
            Rename(f"{theirs}.D", f"{ours}.skip.D"),
            Rename(f"{theirs}.norm", f"{ours}.norm"),
        ]


def shape(keys: Keys, mixer: Mixer) -> Transformer:
    """The spec that the shared keys say around one mixer."""
    norm = RMS(eps=keys.layer_norm_epsilon)
    return Transformer(
        dim=keys.hidden_size,
        vocab=keys.vocab_size,
        layers=("layer",) * keys.num_hidden_layers,
        blocks={"layer": Block(mixer=mixer, norm=norm)},
        head=LMHead(tied=keys.tie_word_embeddings),
        final_norm=norm,
    )


def only_mixer(family: Family, spec: Transformer) -> Mixer | None:
    """The mixer of a spec whose layers are alike."""
    if len(spec.blocks) != 1:
        raise family.cannot(f"all its layers must be alike, and this one has {len(spec.blocks)} kinds ({', '.join(spec.blocks)})")
    (block,) = spec.blocks.values()
    return block.mixer


def shared_values(family: Family, spec: Transformer, inner: int) -> dict[str, Any]:
    """The shared keys that say `spec`, whose mixer has `inner` channels; what they cannot say shows when they are read back."""
    if inner % spec.dim:
        raise family.cannot(f"the channels inside ({inner}) must be a multiple of the width ({spec.dim})")
    return {
        "vocab_size": spec.vocab,
        "hidden_size": spec.dim,
        "num_hidden_layers": len(spec.layers),
        "expand": inner // spec.dim,
        "hidden_act": "silu",
        "layer_norm_epsilon": spec.final_norm.eps if isinstance(spec.final_norm, RMS) else 1e-5,
        "tie_word_embeddings": isinstance(spec.head, LMHead) and spec.head.tied,
    }


def frame_rules(spec: Transformer) -> list[Rule]:
    """What both families name alike."""
    theirs, ours = "backbone.layers.{i}", "layers.{i}"
    tied = isinstance(spec.head, LMHead) and spec.head.tied
    return [
        Rename("backbone.embeddings", "embed"),
        Rename(f"{theirs}.norm", f"{ours}.mixer_norm"),
        Rename(f"{theirs}.mixer.conv1d", f"{ours}.mixer.conv"),
        Rename(f"{theirs}.mixer.out_proj", f"{ours}.mixer.out"),
        Rename("backbone.norm_f", "final_norm"),
        Drop("lm_head", same_as="backbone.embeddings") if tied else Rename("lm_head", "head.out"),
    ]


for _family in (MambaFamily(), Mamba2Family()):
    families.add(_family.model_type, _family)
