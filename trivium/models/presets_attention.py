"""Mini presets whose mixers are attention, after models and papers of the field: what sees what, how positions are told, what is
normed, gated, shared and compressed. Only the shape is theirs; the sizes are those of `presets.mini`.
"""

from __future__ import annotations

from ..nn.activations import GELU, ReLU, SquaredReLU, Swish
from ..nn.attention import Attention, Mixer, Scores
from ..nn.compressed import Compress, CompressedAttention, Index
from ..nn.embeddings import Tokens
from ..nn.feedforward import FFN, MLP
from ..nn.heads import LMHead
from ..nn.hyper import Hyper
from ..nn.latent import LatentAttention
from ..nn.low_rank import LowRank
from ..nn.memory import Compressive
from ..nn.memory_infini import Infini
from ..nn.moe import MoE
from ..nn.norms import RMS, Layer, NoNorm
from ..nn.patterns import Chunk, Pattern, Window
from ..nn.patterns_sparse import BlockSparse, Dilated, SinkWindow
from ..nn.positions import Position, Rope
from ..nn.positions_absolute import Sinusoidal
from ..nn.positions_relative import Alibi, Relative, RelativeBias
from ..nn.rope_scaling import Llama3Scaling, LongScaling, YarnScaling
from ..nn.routing import Groups
from ..nn.sparse import Indexer
from .block import Block
from .presets import mini, presets
from .transformer import Transformer

HEADS = Attention(heads=8, kv_heads=4, head_dim=32, position=Rope())  # what the presets below start from
EACH = Attention(heads=8, kv_heads=8, head_dim=32)  # keys and values of its own for each head; no positions
SWIGLU = MLP(hidden=704)
PLAIN = MLP(hidden=1024, activation=GELU(), gated=False, bias=True)


def llama_like(mixer: Mixer, ffn: FFN = SWIGLU) -> Transformer:
    return mini({"layer": Block(mixer=mixer, ffn=ffn)})


def seeing(pattern: Pattern) -> Transformer:
    """Llama's layers, by turns with all tokens and with those of `pattern` in reach."""
    blocks = {"local": Block(mixer=HEADS.replace(pattern=pattern), ffn=SWIGLU), "full": Block(mixer=HEADS, ffn=SWIGLU)}
    return mini(blocks, layers="2*(local full)")


def placed(position: Position) -> Transformer:
    """GPT's layers with other positions."""
    norm = Layer()
    return mini({"layer": Block(mixer=EACH.replace(position=position), ffn=PLAIN, norm=norm)}).replace(final_norm=norm)


@presets.register("transformer-2017-mini")
def transformer_2017() -> Transformer:
    """The decoder of arXiv:1706.03762, alone: sinusoidal positions, layer norms after the sums, a plain ReLU mlp."""
    block = Block(mixer=EACH, ffn=MLP(hidden=1024, activation=ReLU(), gated=False, bias=True), norm=Layer(), norm_at="post", dropout=0.1)
    return mini({"layer": block}).replace(embed=Tokens(scale=16.0, positions=Sinusoidal(), dropout=0.1), final_norm=NoNorm())


@presets.register("alibi-mini")
def alibi() -> Transformer:
    """Distances as linear penalties (arXiv:2108.12409), in BLOOM's and MPT's kind of layer."""
    return placed(Alibi())


@presets.register("shaw-mini")
def shaw() -> Transformer:
    """Relative positions as vectors of keys (arXiv:1803.02155)."""
    return placed(Relative(reach=32))


@presets.register("relative-bias-mini")
def relative_bias() -> Transformer:
    """T5's buckets of distances (arXiv:1910.10683) in a decoder."""
    return placed(RelativeBias())


@presets.register("palm-mini")
def palm() -> Transformer:
    """Mixer and mlp side by side, one key and value head (arXiv:2204.02311)."""
    return mini({"layer": Block(mixer=HEADS.replace(kv_heads=1), ffn=MLP(hidden=704), norm=Layer(bias=False), parallel=True)})


@presets.register("llama3-mini")
def llama3() -> Transformer:
    """Rotary positions stretched from 256 tokens to 1,024, as Llama 3.1 does (arXiv:2407.21783)."""
    scaling = Llama3Scaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256)
    return llama_like(HEADS.replace(position=Rope(base=500000.0, scaling=scaling)))


@presets.register("phi3-mini")
def phi3() -> Transformer:
    """LongRoPE: a factor for each channel (arXiv:2402.13753). The factors are illustrative; a search finds a model's own."""
    longer = tuple(1.0 + 3.0 * i / 15 for i in range(16))
    scaling = LongScaling(short_factor=(1.0,) * 16, long_factor=longer, factor=4.0, original_max_position_embeddings=256)
    return llama_like(HEADS.replace(position=Rope(scaling=scaling)))


@presets.register("mistral-mini")
def mistral() -> Transformer:
    """Every layer sees a window (arXiv:2310.06825)."""
    return llama_like(HEADS.replace(pattern=Window(size=256)))


@presets.register("llama4-mini")
def llama4() -> Transformer:
    """Three layers that see their chunk, with positions, and one that sees all, without."""
    chunk = Block(mixer=HEADS.replace(pattern=Chunk(size=256)), ffn=SWIGLU)
    return mini({"chunk": chunk, "full": Block(mixer=HEADS.replace(position=None), ffn=SWIGLU)}, layers="3*chunk full")


@presets.register("smollm3-mini")
def smollm3() -> Transformer:
    """Every fourth layer without positions (arXiv:2501.18795)."""
    return mini(
        {"rope": Block(mixer=HEADS, ffn=SWIGLU), "nope": Block(mixer=HEADS.replace(position=None), ffn=SWIGLU)}, layers="3*rope nope"
    )


@presets.register("qwen3-mini")
def qwen3() -> Transformer:
    """Normed queries and keys (arXiv:2505.09388)."""
    norm = RMS(eps=1e-6)
    return mini({"layer": Block(mixer=HEADS.replace(position=Rope(base=1000000.0), qk_norm=norm), ffn=SWIGLU, norm=norm)}, eps=1e-6)


@presets.register("olmo2-mini")
def olmo2() -> Transformer:
    """Norms behind the sublayers, queries and keys normed across heads (arXiv:2501.00656)."""
    norm = RMS(round_first=False)
    mixer = HEADS.replace(qk_norm=norm, qk_norm_over="projection")
    return mini({"layer": Block(mixer=mixer, ffn=SWIGLU, norm=norm, norm_at="reordered")}).replace(final_norm=norm)


@presets.register("gemma2-mini")
def gemma2() -> Transformer:
    """Local and global layers by turns, norms before and behind, bounded scores and logits (arXiv:2408.00118)."""
    norm, ffn = RMS(eps=1e-6, offset=1.0, round_first=False), MLP(hidden=704, activation=GELU(approximate="tanh"))
    wide = HEADS.replace(scores=Scores(scale=32**-0.5, softcap=50.0))
    blocks = {
        "local": Block(mixer=wide.replace(pattern=Window(size=256)), ffn=ffn, norm=norm, norm_at="sandwich"),
        "full": Block(mixer=wide, ffn=ffn, norm=norm, norm_at="sandwich"),
    }
    return mini(blocks, layers="2*(local full)").replace(embed=Tokens(scale=16.0), head=LMHead(tied=True, softcap=30.0), final_norm=norm)


@presets.register("gemma3-mini")
def gemma3() -> Transformer:
    """Five local layers for each global one, each with a base of its own; normed queries and keys (arXiv:2503.19786)."""
    norm, ffn = RMS(eps=1e-6, offset=1.0, round_first=False), MLP(hidden=704, activation=GELU(approximate="tanh"))
    scored = HEADS.replace(qk_norm=norm, scores=Scores(scale=32**-0.5))
    local, wide = scored.replace(pattern=Window(size=256)), scored.replace(position=Rope(base=1000000.0))
    blocks = {name: Block(mixer=mixer, ffn=ffn, norm=norm, norm_at="sandwich") for name, mixer in (("local", local), ("full", wide))}
    return mini(blocks, layers="5*local full").replace(embed=Tokens(scale=16.0), final_norm=norm)


@presets.register("mixtral-mini")
def mixtral() -> Transformer:
    """Two of eight experts (arXiv:2401.04088)."""
    return llama_like(HEADS, MoE(experts=8, top_k=2, expert=MLP(hidden=256)))


@presets.register("gpt-oss-mini")
def gpt_oss() -> Transformer:
    """Learned sinks, windows by turns, YaRN, experts of the clamped form (arXiv:2508.10925)."""
    expert = MLP(hidden=256, activation=Swish(beta=1.702, trained=False), bias=True, limit=7.0, shift=1.0)
    moe = MoE(experts=8, top_k=2, expert=expert, router_bias=True)
    rope = Rope(base=150000.0, scaling=YarnScaling(factor=4.0, original_max_position_embeddings=256, truncate=False))
    full = HEADS.replace(bias=("q", "k", "v", "out"), position=rope, scores=Scores(sinks=True))
    norm = RMS(round_first=False)
    mixers = {"window": full.replace(pattern=Window(size=128)), "full": full}
    blocks = {name: Block(mixer=mixer, ffn=moe, norm=norm) for name, mixer in mixers.items()}
    return mini(blocks, layers="2*(window full)").replace(final_norm=norm)


LATENT = LatentAttention(heads=8, kv_rank=64, q_rank=96, head_dim=32, rope_dim=16, v_dim=32)
FINE = MoE(  # fine-grained experts, a shared one, and choices that a correction balances
    experts=16,
    top_k=4,
    expert=MLP(hidden=96),
    shared=MLP(hidden=96),
    score="sigmoid",
    scale=2.5,
    groups=Groups(count=4, chosen=2),
    correction=True,
)


@presets.register("deepseek-v3-mini")
def deepseek_v3() -> Transformer:
    """Latent attention, a dense layer and then fine-grained experts (arXiv:2412.19437)."""
    blocks = {"dense": Block(mixer=LATENT, ffn=SWIGLU), "sparse": Block(mixer=LATENT, ffn=FINE)}
    return mini(blocks, layers="dense 3*sparse")


@presets.register("deepseek-v32-mini")
def deepseek_v32() -> Transformer:
    """Latent attention over the tokens that an indexer selects (DeepSeek-V3.2)."""
    return llama_like(
        LATENT.replace(position=Rope(layout="interleaved"), indexer=Indexer(heads=4, head_dim=32, top_k=128, rope_dim=16)), FINE
    )


@presets.register("deepseek-v4-mini")
def deepseek_v4() -> Transformer:
    """Windows beside a compressed past, selected or whole by turns; hyper-connections held to doubly stochastic mixing."""
    selected = Compress(rate=4, overlap=True, index=Index(heads=4, head_dim=32, top_k=32))
    mixer = CompressedAttention(heads=8, head_dim=32, rope_dim=16, q_rank=96, window=64, compress=selected, groups=2, group_rank=64)
    blocks = {
        name: Block(mixer=mixer.replace(compress=compress), ffn=FINE, residual=Hyper())
        for name, compress in (("selected", selected), ("whole", Compress(rate=32)))
    }
    return mini(blocks, layers="2*(selected whole)")


@presets.register("hyper-mini")
def hyper() -> Transformer:
    """Llama with free hyper-connections of four streams (arXiv:2409.19606)."""
    return mini({"layer": Block(mixer=HEADS, ffn=SWIGLU, residual=Hyper(constrained=False))})


@presets.register("shared-kv-mini")
def shared_kv() -> Transformer:
    """Every second layer uses the keys and values of the one before it (arXiv:2405.12981)."""
    return mini(
        {"own": Block(mixer=HEADS, ffn=SWIGLU), "shared": Block(mixer=HEADS.replace(share="own"), ffn=SWIGLU)}, layers="2*(own shared)"
    )


@presets.register("gated-attention-mini")
def gated_attention() -> Transformer:
    """Attention whose output each head gates (arXiv:2505.06708)."""
    return llama_like(HEADS.replace(gate="head"))


@presets.register("relu2-mini")
def relu2() -> Transformer:
    """Squared ReLU and norms without weights, as fast small recipes have them (arXiv:2109.08668)."""
    norm = RMS(affine=False)
    block = Block(mixer=HEADS.replace(qk_norm=norm), ffn=MLP(hidden=1024, activation=SquaredReLU(), gated=False), norm=norm)
    return mini({"layer": block}).replace(final_norm=norm)


@presets.register("dilated-mini")
def dilated() -> Transformer:
    """Windows with gaps, and full layers, by turns (arXiv:2004.05150)."""
    return seeing(Dilated(size=64, dilation=4))


@presets.register("block-sparse-mini")
def block_sparse() -> Transformer:
    """Blocks: local, every fourth, the first and random ones (arXiv:1904.10509, arXiv:2007.14062)."""
    return seeing(BlockSparse(size=32, local=2, stride=4, first=1, random=1))


@presets.register("streaming-mini")
def streaming() -> Transformer:
    """The first tokens and a window, turned by their places in the cache: text without end (arXiv:2309.17453)."""
    return llama_like(HEADS.replace(pattern=SinkWindow(size=252, first=4, rebase=True)))


@presets.register("compressive-mini")
def compressive() -> Transformer:
    """Segments, a memory of earlier ones, and an older one that is compressed (arXiv:1911.05507)."""
    return llama_like(
        Compressive(heads=8, kv_heads=4, head_dim=32, position=Rope(), size=128, memory=128, compressed=32, rate=4, pool="conv")
    )


@presets.register("infini-mini")
def infini() -> Transformer:
    """Segments beside a matrix that remembers all before them (arXiv:2404.07143)."""
    return llama_like(Infini(heads=8, kv_heads=4, head_dim=32, position=Rope(), size=128, through=True))


@presets.register("linformer-mini")
def linformer() -> Transformer:
    """Keys and values of a segment projected to fewer (arXiv:2006.04768), block by block in a decoder."""
    return llama_like(LowRank(heads=8, kv_heads=4, head_dim=32, position=Rope(), size=64, rank=8, blocks=15))
