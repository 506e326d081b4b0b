"""Mini presets whose mixers keep a state of constant size: state spaces, linear attention, delta rules and gated units; and
hybrids of these with attention. Only the shape is that of the papers; the sizes are those of `presets.mini`.
"""

from __future__ import annotations

from ..nn.attention import Attention
from ..nn.delta import GatedDelta
from ..nn.feedforward import FFN, MLP
from ..nn.gated_linear import GatedLinear, Retention
from ..nn.gated_unit import GatedUnit
from ..nn.linear_attention import FeatureMap, LinearAttention, ReluFeatures, SoftmaxFeatures
from ..nn.mamba import Mamba
from ..nn.mamba2 import Mamba2
from ..nn.matmul_free import MLGRU
from ..nn.moe import MoE
from ..nn.norms import RMS, Layer
from ..nn.positions import Rope
from .block import Block
from .presets import mini, presets
from .transformer import Transformer

SWIGLU = MLP(hidden=704)
EXPERTS = MoE(experts=16, top_k=4, expert=MLP(hidden=96), shared=MLP(hidden=96), shared_gate=True)


def linear(features: FeatureMap | None = None) -> Transformer:
    mixer = LinearAttention(heads=8, head_dim=32)
    return mini({"layer": Block(mixer=mixer if features is None else mixer.replace(features=features), ffn=SWIGLU)})


@presets.register("mamba-mini")
def mamba() -> Transformer:
    """Selective state spaces alone (arXiv:2312.00752)."""
    return mini({"layer": Block(mixer=Mamba(inner=512, dt_rank=16))}, layers="8*layer").replace(context=None)


@presets.register("mamba2-mini")
def mamba2() -> Transformer:
    """One decay for each head: state spaces as attention (arXiv:2405.21060)."""
    return mini({"layer": Block(mixer=Mamba2(heads=16, head_dim=32, states=64))}, layers="8*layer").replace(context=None)


@presets.register("jamba-mini")
def jamba() -> Transformer:
    """One layer of attention among state spaces, experts in every second layer (arXiv:2403.19887)."""
    state, full = Mamba(inner=512, dt_rank=16), Attention(heads=8, kv_heads=4, head_dim=32)
    ffns: dict[str, FFN] = {"dense": SWIGLU, "sparse": MoE(experts=8, top_k=2, expert=MLP(hidden=256))}
    blocks = {name: Block(mixer=state, ffn=ffn) for name, ffn in ffns.items()} | {"full": Block(mixer=full, ffn=SWIGLU)}
    return mini(blocks, layers="dense sparse full sparse")


@presets.register("linear-attention-mini")
def linear_attention() -> Transformer:
    """Attention without a softmax, by feature maps (arXiv:2006.16236)."""
    return linear()


@presets.register("relu-attention-mini")
def relu_attention() -> Transformer:
    """The same with ReLU features."""
    return linear(ReluFeatures())


@presets.register("performer-mini")
def performer() -> Transformer:
    """Random features whose products are softmax's in the mean (arXiv:2009.14794)."""
    return linear(SoftmaxFeatures(count=64))


@presets.register("retention-mini")
def retention() -> Transformer:
    """A fixed decay for each head (RetNet, arXiv:2307.08621)."""
    return mini({"layer": Block(mixer=Retention(heads=4, key_dim=64, value_dim=128), ffn=MLP(hidden=512))})


@presets.register("gated-linear-mini")
def gated_linear() -> Transformer:
    """A decay for each channel, told by the token (GLA, arXiv:2312.06635)."""
    return mini({"layer": Block(mixer=GatedLinear(heads=4, key_dim=32, value_dim=64), ffn=SWIGLU)})


@presets.register("qwen3-next-mini")
def qwen3_next() -> Transformer:
    """Three gated delta rules (arXiv:2412.06464) for each gated attention; experts and a shared one behind its own gate."""
    norm = RMS(eps=1e-6, offset=1.0, round_first=False)
    full = Attention(heads=4, kv_heads=2, head_dim=64, position=Rope(base=1e7, share=0.25), qk_norm=norm, gate="channel")
    delta = GatedDelta(key_heads=4, value_heads=8, key_dim=32, value_dim=32)
    blocks = {name: Block(mixer=mixer, ffn=EXPERTS, norm=norm) for name, mixer in (("delta", delta), ("full", full))}
    return mini(blocks, layers="3*delta full").replace(final_norm=norm)


@presets.register("gau-mini")
def gau() -> Transformer:
    """Gated attention units, linear beyond a chunk, and nothing else (FLASH, arXiv:2202.10447)."""
    norm = Layer()
    return mini({"layer": Block(mixer=GatedUnit(inner=512, key_dim=64, span=128), norm=norm)}, layers="8*layer").replace(final_norm=norm)


@presets.register("matmul-free-mini")
def matmul_free() -> Transformer:
    """An elementwise gated recurrence (arXiv:2406.02528); the `low_bit` pass makes its maps ternary."""
    return mini({"layer": Block(mixer=MLGRU(hidden=256), ffn=SWIGLU)})
