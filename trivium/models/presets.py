"""Named specs, values only."""

from __future__ import annotations

from collections.abc import Callable

from ..core.registry import Registry
from ..nn.attention import Attention
from ..nn.feedforward import MLP
from ..nn.heads import LMHead
from ..nn.norms import RMS
from ..nn.patterns import Full, Window
from ..nn.positions import Rope
from .block import Block
from .transformer import Transformer

presets: Registry[Callable[[], Transformer]] = Registry("preset", "trivium.models")


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


@presets.register("tiny-llama")
def tiny_llama() -> Transformer:
    """A few thousand parameters, for tests."""
    return llama(dim=36, layers=2, heads=6, kv_heads=2, head_dim=8, hidden=48, vocab=97, context=128)


@presets.register("smollm2-135m")
def smollm2_135m() -> Transformer:
    return llama(dim=576, layers=30, heads=9, kv_heads=3, hidden=1536, vocab=49152, base=100000.0, tied=True, context=8192)


@presets.register("llama-5m")
def llama_5m() -> Transformer:
    """About 5 million parameters with a vocabulary of 8,192: what two cores pretrain in minutes."""
    return llama(dim=256, layers=5, heads=8, kv_heads=4, hidden=704, vocab=8192, tied=True, context=1024)
