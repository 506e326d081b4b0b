"""Tiny models for tests: every parameter redrawn, so that no norm is one and no bias is zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trivium.core.seed import generator
from trivium.core.spec import Part
from trivium.models.block import Block
from trivium.models.transformer import Transformer, TransformerModel, build
from trivium.nn.activations import GELU, Activation, ReLU, Swish
from trivium.nn.attention import Attention, Mixer, Scores
from trivium.nn.compressed import Compress, CompressedAttention
from trivium.nn.cross import CrossAttention
from trivium.nn.embeddings import Embed, Tokens
from trivium.nn.feedforward import FFN, MLP
from trivium.nn.gated_unit import GatedUnit
from trivium.nn.heads import Head, LMHead, MaskedLMHead, MultiToken
from trivium.nn.hyper import Hyper
from trivium.nn.inputs import Inputs
from trivium.nn.latent import LatentAttention
from trivium.nn.linear_attention import FeatureMap, IdentityFeatures, LinearAttention
from trivium.nn.low_rank import LowRank
from trivium.nn.memory import Compressive
from trivium.nn.memory_infini import Infini
from trivium.nn.moe import MoE
from trivium.nn.norms import RMS, Layer, Norm
from trivium.nn.patches import Patches
from trivium.nn.patterns import Pattern, Window
from trivium.nn.patterns_sparse import SinkWindow
from trivium.nn.positions import Position, Rope
from trivium.nn.positions_absolute import Absolute
from trivium.nn.positions_relative import RelativeBias
from trivium.nn.residual import Gated, Residual
from trivium.nn.rope_scaling import RopeScaling
from trivium.nn.routing import Groups
from trivium.nn.sparse import Indexer

VOCAB, DIM = 61, 24
ROOTS = (Mixer, FFN, Norm, Activation, Position, RopeScaling, Pattern, Residual, Absolute, Embed, Head, FeatureMap)
FORMS: dict[str, Part] = {  # further forms of a part that take another path through it
    "ffn-mlp-plain": MLP(hidden=40, activation=ReLU(), gated=False, bias=True),
    "ffn-mlp-clamped": MLP(hidden=40, activation=Swish(beta=1.5, trained=False), bias=True, limit=0.7, shift=1.0),
    "ffn-moe-grouped": MoE(
        experts=6,
        top_k=2,
        expert=MLP(hidden=12),
        shared=MLP(hidden=16),
        score="sigmoid",
        scale=1.5,
        groups=Groups(count=3, chosen=2),
        correction=True,
    ),
    "ffn-moe-gated": MoE(
        experts=5,
        top_k=3,
        expert=MLP(hidden=12, bias=True),
        shared=MLP(hidden=16),
        shared_gate=True,
        normalize=False,
        router_bias=True,
    ),
    "ffn-moe-capacity": MoE(experts=4, top_k=2, expert=MLP(hidden=12), capacity=0.8),
    "mixer-linear-attention-plain": LinearAttention(heads=3, head_dim=8, features=IdentityFeatures(), normalize=False, bias=("q", "out")),
    "mixer-cross-latest": CrossAttention(heads=3, kv_heads=3, head_dim=8, memory_dim=20, latest=7),
    "mixer-gated-unit-quadratic": GatedUnit(inner=20, key_dim=8, form="quadratic", span=4),
    "mixer-compressive-plain": Compressive(heads=6, kv_heads=3, head_dim=8, size=4, memory=5, through=True),
    "mixer-compressive-pooled": Compressive(heads=6, kv_heads=2, head_dim=8, size=2, memory=2, compressed=2, rate=2, pool="max"),
    "mixer-infini-linear": Infini(heads=4, kv_heads=4, head_dim=8, size=3, update="linear"),
    "mixer-low-rank-one-map": LowRank(heads=6, kv_heads=2, head_dim=8, size=5, rank=5, blocks=1, one_map=True, through=False),
    "pattern-sinks-absolute": SinkWindow(size=3, first=2),
    "residual-gated-channels": Gated(over="channel", start=0.3),
    "residual-hyper-free": Hyper(streams=2, constrained=False, end="mean"),
    "residual-hyper-static": Hyper(streams=3, dynamic=False, rounds=5),
    "activation-gelu-exact": GELU(),
    "activation-swish-fixed": Swish(beta=1.5, trained=False),
    "activation-gelu-sigmoid": GELU(approximate="sigmoid"),
    "mixer-attention-softcap": Attention(heads=6, kv_heads=2, head_dim=8, position=Rope(base=50.0), scores=Scores(softcap=2.0)),
    "mixer-attention-sinks": Attention(heads=6, kv_heads=2, head_dim=8, position=Rope(base=50.0), scores=Scores(scale=0.3, sinks=True)),
    "mixer-attention-normed": Attention(
        heads=6, kv_heads=2, head_dim=8, position=Rope(base=50.0), qk_norm=RMS(), gate="channel", bias=("gate",)
    ),
    "mixer-attention-normed-values": Attention(heads=6, kv_heads=2, head_dim=8, v_norm=RMS(eps=1e-4)),
    "mixer-attention-normed-wide": Attention(heads=6, kv_heads=3, head_dim=8, qk_norm=RMS(), qk_norm_over="projection", gate="head"),
    "norm-layer-without-bias": Layer(eps=1e-4, bias=False),
    "norm-layer-without-affine": Layer(eps=1e-4, affine=False),
    "norm-rms-without-affine": RMS(eps=1e-4, affine=False),
    "position-rope-part": Rope(base=50.0, layout="interleaved", share=0.5),
    "position-relative_bias-own": RelativeBias(buckets=8, distance=7, bidirectional=True, shared=False),
    "head-lm-adorned": LMHead(tied=True, bias=True, scale=0.7, softcap=3.0),
    "head-lm-bias": LMHead(bias=True),
    "head-masked_lm-untied": MaskedLMHead(activation=ReLU(), tied=False),
    "head-multi_token-untied": MultiToken(count=2),
    "embedding-tokens-typed": Tokens(types=2, norm=Layer(eps=1e-4)),
    "mixer-latent-plain-queries": LatentAttention(
        heads=2, kv_rank=12, head_dim=6, rope_dim=4, v_dim=5, bias=("q", "kv", "rope", "out"), pattern=Window(size=5), scale=0.3
    ),
    "mixer-compressed-all": CompressedAttention.tiny().replace(compress=Compress(rate=3)),
    "mixer-compressed-overlapping": CompressedAttention.tiny().replace(compress=Compress(rate=4, overlap=True), window=2),
    "mixer-compressed-window-alone": CompressedAttention.tiny().replace(compress=None),
    "mixer-latent-indexed": LatentAttention.tiny().replace(indexer=Indexer(heads=5, head_dim=6, rope_dim=4, top_k=4)),
}


def parts() -> list[tuple[str, Part]]:
    """Every registered part of a model, as (name, its tiny spec), and further forms of some. Heads that do not give something
    at each position, and embeddings of images, have contracts of their own, in tests/nn/test_heads.py and test_patches.py."""
    named = [(f"{root.registry.what}-{name}", member.tiny()) for root in ROOTS for name, member in root.registry.items()]
    alike = [(name, part) for name, part in (*named, *FORMS.items()) if not isinstance(part, Patches)]
    return [(name, part) for name, part in alike if not isinstance(part, Head) or part.reads == "positions"]


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
        case FeatureMap():
            block["mixer"] = LinearAttention(heads=2, head_dim=16, features=part, normalize=part.positive)
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


def apart(actual: torch.Tensor, expected: torch.Tensor, *, unit: float | torch.Tensor = 1.0) -> float:
    """The largest difference of tensors of one shape and dtype, in units, for a test to bound; infinite where one is NaN."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    found = ((actual - expected) / unit).abs().masked_fill(actual == expected, 0).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return found.max().item() if found.numel() else 0.0


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
