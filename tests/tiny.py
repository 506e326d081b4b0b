"""Tiny models for tests: every parameter redrawn, so that no norm is one and no bias is zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trivium.core.seed import generator
from trivium.core.spec import Part
from trivium.models.block import Block
from trivium.models.transformer import Transformer, TransformerModel, build
from trivium.nn.activations import GELU, Activation, ReLU
from trivium.nn.attention import Attention, Mixer, Scores
from trivium.nn.cross import CrossAttention
from trivium.nn.embeddings import Embed, Tokens
from trivium.nn.feedforward import FFN, MLP
from trivium.nn.heads import Head, LMHead
from trivium.nn.inputs import Inputs
from trivium.nn.norms import RMS, Layer, Norm
from trivium.nn.patterns import Pattern
from trivium.nn.positions import Position, Rope, RopeScaling
from trivium.nn.positions_absolute import Absolute
from trivium.nn.residual import Residual

VOCAB, DIM = 61, 24
ROOTS = (Mixer, FFN, Norm, Activation, Position, RopeScaling, Pattern, Residual, Absolute, Embed, Head)
FORMS: dict[str, Part] = {  # further forms of a part that take another path through it
    "ffn-mlp-plain": MLP(hidden=40, activation=ReLU(), gated=False, bias=True),
    "activation-gelu-exact": GELU(),
    "activation-gelu-sigmoid": GELU(approximate="sigmoid"),
    "mixer-attention-softcap": Attention(heads=6, kv_heads=2, head_dim=8, position=Rope(base=50.0), scores=Scores(softcap=2.0)),
    "mixer-attention-sinks": Attention(heads=6, kv_heads=2, head_dim=8, position=Rope(base=50.0), scores=Scores(scale=0.3, sinks=True)),
    "mixer-attention-normed": Attention(
        heads=6, kv_heads=2, head_dim=8, position=Rope(base=50.0), qk_norm=RMS(), gate="channel", bias=("gate",)
    ),
    "mixer-attention-normed-wide": Attention(heads=6, kv_heads=3, head_dim=8, qk_norm=RMS(), qk_norm_over="projection", gate="head"),
    "norm-layer-without-bias": Layer(eps=1e-4, bias=False),
}


def parts() -> list[tuple[str, Part]]:
    """Every registered part of a model, as (name, its tiny spec), and further forms of some."""
    return [(f"{root.registry.what}-{name}", member.tiny()) for root in ROOTS for name, member in root.registry.items()] + list(
        FORMS.items()
    )


def host(part: Part, *, causal: bool = True) -> Transformer:
    """A two-layer model that uses `part` where its kind of part goes."""
    attention, ffn = Attention(heads=6, kv_heads=2, head_dim=8, position=Rope(base=50.0), bias=("q", "out")), MLP(hidden=40)
    block: dict[str, object] = {"mixer": attention, "ffn": ffn, "norm": RMS(eps=1e-4)}
    model: dict[str, object] = {"head": LMHead(tied=False)}
    match part:
        case CrossAttention():
            block["cross"] = part
        case Mixer():
            block["mixer"] = part
        case FFN():
            block["ffn"] = part
        case Norm():
            block["norm"], model["final_norm"] = part, part
        case Activation():
            block["ffn"] = ffn.replace(activation=part)
        case Position():
            block["mixer"] = attention.replace(position=part)
        case RopeScaling():
            block["mixer"] = attention.replace(position=Rope(base=50.0, scaling=part))
        case Pattern():
            block["mixer"] = attention.replace(pattern=part)
        case Residual():
            block["residual"] = part
        case Absolute():
            model["embed"] = Tokens(positions=part)
        case Embed():
            model["embed"] = part
        case Head():
            model["head"] = part
    return Transformer(dim=DIM, vocab=VOCAB, layers=("a", "a"), blocks={"a": Block(**block)}, causal=causal, **model)


@torch.no_grad()
def redraw(model: torch.nn.Module, *, seed: int = 0, std: float = 0.15) -> torch.nn.Module:
    """Every parameter anew: matrices normal, vectors one plus normal; large enough that logits have a deviation near 1."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator(seed, name)).to(parameter.dtype)
        parameter.copy_(noise * (std if parameter.dim() > 1 else 0.3) + (1.0 if parameter.dim() == 1 and "bias" not in name else 0.0))
    return model


def tiny(spec: Transformer, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> TransformerModel:
    model = build(spec, device="cpu", dtype=dtype)
    redraw(model, seed=seed)
    return model.eval()


def tokens(*shape: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=generator(seed, "tokens"))


def segments_of(rows: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    """[B, width] segments from each row's document lengths; a negative length is a stretch of padding."""
    out = torch.full((len(rows), width), -1)
    for b, lengths in enumerate(rows):
        at = 0
        for index, length in enumerate(lengths):
            if length > 0:
                out[b, at : at + length] = index
            at += abs(length)
    return out


def ask(part: Part | None, x: torch.Tensor, **given: Any) -> Inputs:
    """The inputs of a forward of `host(part)` on tokens `x` [B, T]: with a memory, the same for every row, where it reads one."""
    if isinstance(part, CrossAttention):
        memory = torch.randn(1, 7, part.memory_dim or DIM, generator=generator(0, "memory")).expand(len(x), -1, -1)
        given = {"memory": memory, "memory_segments": torch.tensor([0, 0, 0, 0, 0, -1, -1]).expand(len(x), -1), **given}
    return Inputs(x, **given)
