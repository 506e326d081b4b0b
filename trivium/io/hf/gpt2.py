"""The families `gpt2` and `openai-gpt` (GPT-1): learned positions, layer norms, plain feed-forward with GELU, biases everywhere.

GPT-1 has its norms after the sums and none at the end, GPT-2 before them. Both store every matrix the other way round
(their Conv1D), and q, k and v as one. Radford et al. 2018 and 2019.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import Field

from ...core.errors import ConfigError
from ...core.spec import Spec, validate
from ...models.block import Block
from ...models.transformer import Transformer
from ...nn.activations import GELU, Activation, ReLU, SiLU
from ...nn.attention import Attention
from ...nn.embeddings import Tokens
from ...nn.feedforward import MLP
from ...nn.heads import LMHead
from ...nn.norms import Layer, NoNorm
from ...nn.positions_absolute import Learned
from ..rules import Drop, Rename, Rule, Split, Transpose
from . import Family, families

# The first name of each activation is the one that is written where a file did not say another.
TANH = GELU(approximate="tanh")
GPT2_ACTIVATIONS: Mapping[str, Activation] = {
    "gelu_new": TANH,
    "gelu_pytorch_tanh": TANH,
    "gelu_fast": TANH,
    "gelu": GELU(),
    "gelu_python": GELU(),
    "quick_gelu": GELU(approximate="sigmoid"),
    "relu": ReLU(),
    "silu": SiLU(),
    "swish": SiLU(),
}
GPT1_ACTIVATIONS: Mapping[str, Activation] = {"gelu": TANH, "relu": ReLU(), "silu": SiLU(), "swish": SiLU()}
CARRIED = {
    "initializer_range": 0.02,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "summary_activation": None,
    "summary_proj_to_labels": True,
    "summary_first_dropout": 0.1,
}
NAMES = {
    "ln_1": Rename, "attn.c_proj": Transpose, "ln_2": Rename, "mlp.c_fc": Transpose, "mlp.c_proj": Transpose,
}  # fmt: skip
OURS = {"ln_1": "mixer_norm", "attn.c_proj": "mixer.out", "ln_2": "ffn_norm", "mlp.c_fc": "ffn.inp.up", "mlp.c_proj": "ffn.out"}


class Keys(Spec):
    """What both families read from config.json."""

    vocab_size: int = Field(gt=0)
    n_positions: int = Field(gt=0)
    n_embd: int = Field(768, gt=0)
    n_layer: int = Field(12, gt=0, le=10_000)
    n_head: int = Field(12, gt=0)
    resid_pdrop: float = Field(0.1, ge=0, lt=1)
    embd_pdrop: float = Field(0.1, ge=0, lt=1)
    attn_pdrop: float = Field(0.1, ge=0, lt=1)
    layer_norm_epsilon: float = Field(1e-5, gt=0)
    tie_word_embeddings: bool = True


class GPT1Keys(Keys):
    vocab_size: int = Field(40478, gt=0)
    n_positions: int = Field(512, gt=0)
    afn: str = "gelu"


class GPT2Keys(Keys):
    vocab_size: int = Field(50257, gt=0)
    n_positions: int = Field(1024, gt=0)
    n_inner: int | None = Field(None, gt=0)
    activation_function: str = "gelu_new"
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: Literal[False] = False
