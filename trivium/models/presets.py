"""Named specs, values only: the registries, the shapes of Llama and GPT, and the frame that the mini presets share.

`presets` are decoders, which `pretrain` and `ablate` take by name; `assemblies` is everything else: encoders, heads for tasks,
models of several stacks. The mini ones, of 4 to 10 million parameters, show each idea of the field at a size that two cores train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..core.registry import Registry
from ..nn.activations import GELU
from ..nn.attention import Attention
from ..nn.embeddings import Tokens
from ..nn.feedforward import MLP
from ..nn.heads import LMHead
from ..nn.norms import RMS, Layer, NoNorm
from ..nn.patterns import Full, Window
from ..nn.positions import Rope
from ..nn.positions_absolute import Learned
from .block import Block
from .model import Model
from .transformer import Transformer, expand_layers

presets: Registry[Callable[[], Transformer]] = Registry("preset", "trivium.models")
assemblies: Registry[Callable[[], Model]] = Registry("assembly", "trivium.models")


def llama(
    *, dim: int, layers: int, heads: int, kv_heads: int, hidden: int, vocab: int, head_dim: int | None = None, base: float = 10000.0,
    eps: float = 1e-5, tied: bool = False, window: int | None = None, context: int | None = None,
) -> Transformer:  # fmt: skip
    """The Llama shape: pre-norm RMS, grouped attention with rotary positions, SwiGLU (arXiv:2302.13971)."""
    attention = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim or dim // heads,
        position=Rope(base=base),
        pattern=Full() if window is None else Window(size=window),
    )
    block = Block(mixer=attention, ffn=MLP(hidden=hidden), norm=RMS(eps=eps))
    return Transformer(
        dim=dim,
        vocab=vocab,
        layers=("layer",) * layers,
        blocks={"layer": block},
        head=LMHead(tied=tied),
        final_norm=RMS(eps=eps),
        context=context,
    )


def gpt(
    *, dim: int, layers: str, heads: int, vocab: int, context: int, windows: Mapping[str, int | None], post: bool = False,
    eps: float = 1e-5, dropout: float = 0.1,
) -> Transformer:  # fmt: skip
    """The shape of GPT-1 (`post`) and GPT-2: learned positions, layer norms, a plain GELU mlp of 4 times the width, biases,
    tied head. `windows` says how far back each kind of layer looks (None: all the way)."""
    norm = Layer(eps=eps)
    blocks = {}
    for name, window in windows.items():
        attention = Attention(
            heads=heads,
            kv_heads=heads,
            head_dim=dim // heads,
            bias=("q", "k", "v", "out"),
            pattern=Full() if window is None else Window(size=window),
            dropout=dropout,
        )
        mlp = MLP(hidden=4 * dim, activation=GELU(approximate="tanh"), gated=False, bias=True)
        blocks[name] = Block(mixer=attention, ffn=mlp, norm=norm, norm_at="post" if post else "pre", dropout=dropout)
    return Transformer(
        dim=dim,
        vocab=vocab,
        layers=expand_layers(layers),
        blocks=blocks,
        embed=Tokens(positions=Learned(size=context), dropout=dropout),
        head=LMHead(tied=True),
        final_norm=NoNorm() if post else norm,
        context=context,
    )


def mini(blocks: Mapping[str, Block], *, layers: str = "4*layer", eps: float = 1e-5) -> Transformer:
    """The frame of the mini presets: width 256, a vocabulary of 8,192 whose table is the head's too, 1,024 tokens."""
    return Transformer(
        dim=256,
        vocab=8192,
        layers=expand_layers(layers),
        blocks=dict(blocks),
        head=LMHead(tied=True),
        final_norm=RMS(eps=eps),
        context=1024,
    )


def gpt2(*, dim: int, layers: int, heads: int) -> Transformer:
    """One of GPT-2's sizes, as published."""
    return gpt(dim=dim, layers=f"{layers}*layer", heads=heads, vocab=50257, context=1024, windows={"layer": None})


def gpt3(*, dim: int, layers: int, heads: int) -> Transformer:
    """One of GPT-3's sizes (arXiv:2005.14165): GPT-2's layers, dense and locally banded by turns. The paper does not say how
    wide a band is: 256 is GPT-Neo's."""
    turns = f"{layers // 2}*(dense banded)"
    return gpt(dim=dim, layers=turns, heads=heads, vocab=50257, context=2048, windows={"dense": None, "banded": 256}, dropout=0.0)


@presets.register("gpt1")
def gpt1() -> Transformer:
    """GPT-1, 117M parameters (Radford et al. 2018)."""
    return gpt(dim=768, layers="12*layer", heads=12, vocab=40478, context=512, windows={"layer": None}, post=True)


@presets.register("gpt2")
def gpt2_small() -> Transformer:
    """GPT-2, 124M parameters (Radford et al. 2019)."""
    return gpt2(dim=768, layers=12, heads=12)


@presets.register("gpt2-medium")
def gpt2_medium() -> Transformer:
    """GPT-2, 355M parameters."""
    return gpt2(dim=1024, layers=24, heads=16)


@presets.register("gpt2-large")
def gpt2_large() -> Transformer:
    """GPT-2, 774M parameters."""
    return gpt2(dim=1280, layers=36, heads=20)


@presets.register("gpt2-xl")
def gpt2_xl() -> Transformer:
    """GPT-2, 1.6B parameters."""
    return gpt2(dim=1600, layers=48, heads=25)


@presets.register("gpt3-175b")
def gpt3_175b() -> Transformer:
    """GPT-3, 175B parameters (arXiv:2005.14165)."""
    return gpt3(dim=12288, layers=96, heads=96)


@presets.register("tiny-gpt2")
def tiny_gpt2() -> Transformer:
    """A few thousand parameters, for tests."""
    return gpt(dim=32, layers="2*layer", heads=4, vocab=97, context=64, windows={"layer": None})


@presets.register("tiny-llama")
def tiny_llama() -> Transformer:
    """A few thousand parameters, for tests."""
    return llama(dim=36, layers=2, heads=6, kv_heads=2, head_dim=8, hidden=48, vocab=97, context=128)


@presets.register("smollm2-135m")
def smollm2_135m() -> Transformer:
    """SmolLM2, 135M parameters (arXiv:2502.02737)."""
    return llama(dim=576, layers=30, heads=9, kv_heads=3, hidden=1536, vocab=49152, base=100000.0, tied=True, context=8192)


@presets.register("llama-5m")
def llama_5m() -> Transformer:
    """About 5 million parameters with a vocabulary of 8,192: what two cores pretrain in minutes."""
    return llama(dim=256, layers=5, heads=8, kv_heads=4, hidden=704, vocab=8192, tied=True, context=1024)
