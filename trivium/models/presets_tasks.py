"""Mini presets that do something else than go on with a text: encoders, heads for tasks, and assemblies of several stacks."""

from __future__ import annotations

from ..nn.activations import GELU, ReLU
from ..nn.attention import Attention, Scores
from ..nn.cross import CrossAttention
from ..nn.embeddings import Tokens
from ..nn.feedforward import MLP
from ..nn.heads import Head, LMHead, MaskedLMHead, MultiToken, NoHead
from ..nn.heads_task import Classifier, Project, Reward, Span, Tagger
from ..nn.norms import RMS, Layer, NoNorm
from ..nn.patches import Patches
from ..nn.patterns_sparse import Longformer
from ..nn.positions import Rope
from ..nn.positions_absolute import Learned
from ..nn.positions_relative import RelativeBias
from ..nn.resampler import MLPConnector, Resampler
from ..nn.residual import Gated
from .block import Block
from .dual_encoder import DualEncoder
from .encoder_decoder import EncoderDecoder
from .image_tokens import ImageTokens
from .looped import LatentReasoning
from .presets import assemblies, mini
from .recurrent_memory import RecurrentMemory
from .transformer import Transformer
from .vision_language import VisionLanguage

EACH = Attention(heads=8, kv_heads=8, head_dim=32, bias=("q", "k", "v", "out"))
GROUPED = Attention(heads=8, kv_heads=4, head_dim=32, position=Rope())
PLAIN = MLP(hidden=1024, activation=GELU(), gated=False, bias=True)
SWIGLU = MLP(hidden=704)


def bert(head: Head, mixer: Attention = EACH) -> Transformer:
    """BERT's encoder: learned positions, two types of tokens, norms after the sums."""
    norm = Layer(eps=1e-12)
    embed = Tokens(positions=Learned(size=1024), types=2, norm=norm, dropout=0.1)
    layer = Block(mixer=mixer, ffn=PLAIN, norm=norm, norm_at="post", dropout=0.1)
    return mini({"layer": layer}).replace(embed=embed, head=head, final_norm=NoNorm(), causal=False)


def images(head: Head) -> Transformer:
    """A vision transformer for images of 64 x 64 pixels (arXiv:2010.11929)."""
    norm = Layer()
    embed = Patches(image=64, patch=8, positions=Learned(size=65))
    encoder = mini({"layer": Block(mixer=EACH, ffn=PLAIN, norm=norm)})
    return encoder.replace(vocab=1, embed=embed, head=head, final_norm=norm, causal=False, context=65)


@assemblies.register("bert-mini")
def bert_masked() -> Transformer:
    """BERT (arXiv:1810.04805), which fills in what is masked."""
    return bert(MaskedLMHead())


@assemblies.register("bert-classifier-mini")
def bert_classifier() -> Transformer:
    """BERT with a class for each text, read off its first token."""
    return bert(Classifier(labels=2, inner=True))


@assemblies.register("bert-tagger-mini")
def bert_tagger() -> Transformer:
    """BERT with a tag for each token."""
    return bert(Tagger(labels=9))


@assemblies.register("bert-span-mini")
def bert_span() -> Transformer:
    """BERT with the start and the end of an answer."""
    return bert(Span())


@assemblies.register("embedder-mini")
def embedder() -> Transformer:
    """BERT with one vector of length one for each text, the mean of all tokens (arXiv:1908.10084)."""
    return bert(Project(pool="mean", normalize=True))


@assemblies.register("longformer-mini")
def longformer() -> Transformer:
    """BERT with a window to each side, and a first token that sees all and is seen by all (arXiv:2004.05150)."""
    return bert(MaskedLMHead(), EACH.replace(pattern=Longformer(size=64)))


@assemblies.register("reward-mini")
def reward() -> Transformer:
    """Llama's layers and one number for each text (arXiv:2203.02155)."""
    return mini({"layer": Block(mixer=GROUPED, ffn=SWIGLU)}).replace(head=Reward())


@assemblies.register("multi-token-mini")
def multi_token() -> Transformer:
    """Llama's layers and heads for the next two tokens (arXiv:2404.19737)."""
    return mini({"layer": Block(mixer=GROUPED, ffn=SWIGLU)}).replace(head=MultiToken(count=2, tied=True))


@assemblies.register("vit-mini")
def vit() -> Transformer:
    """Images to one of ten classes."""
    return images(Classifier(labels=10))


@assemblies.register("t5-mini")
def t5() -> EncoderDecoder:
    """Two stacks with biases of distances and plain ReLU mlps (arXiv:1910.10683)."""
    heads, norm = Attention(heads=8, kv_heads=8, head_dim=32, scores=Scores(scale=1.0)), RMS(eps=1e-6)
    ffn = MLP(hidden=1024, activation=ReLU(), gated=False)
    reads = Block(mixer=heads.replace(position=RelativeBias(bidirectional=True)), ffn=ffn, norm=norm)
    cross = CrossAttention(heads=8, kv_heads=8, head_dim=32, scale=1.0)
    writes = Block(mixer=heads.replace(position=RelativeBias()), cross=cross, ffn=ffn, norm=norm)
    encoder = mini({"layer": reads}, layers="3*layer", eps=1e-6).replace(head=NoHead(), causal=False, context=None)
    decoder = mini({"layer": writes}, layers="3*layer", eps=1e-6).replace(head=LMHead(tied=True, scale=256**-0.5), context=None)
    return EncoderDecoder(encoder=encoder, decoder=decoder)


@assemblies.register("recurrent-memory-mini")
def recurrent_memory() -> RecurrentMemory:
    """Eight vectors handed on from each 128 tokens to the next (arXiv:2207.06881)."""
    return RecurrentMemory(body=mini({"layer": Block(mixer=GROUPED, ffn=SWIGLU)}), memory=8, size=128)


@assemblies.register("coconut-mini")
def coconut() -> LatentReasoning:
    """Llama's layers, which think in hidden states where token 8,191 stands (arXiv:2412.06769)."""
    return LatentReasoning(body=mini({"layer": Block(mixer=GROUPED, ffn=SWIGLU)}), token=8191)


@assemblies.register("image-tokens-mini")
def image_tokens() -> ImageTokens:
    """Images of 64 x 64 pixels as 64 of 1,024 codes, and back (arXiv:1711.00937)."""
    encoder = images(NoHead()).replace(embed=Patches(image=64, patch=8, start=False, positions=Learned(size=64)), context=64)
    decoder = encoder.replace(vocab=1024, embed=Tokens(positions=Learned(size=64)), head=Tagger(labels=192))
    return ImageTokens(encoder=encoder, decoder=decoder)


@assemblies.register("clip-mini")
def clip() -> DualEncoder:
    """Texts and images in one space (arXiv:2103.00020)."""
    head = Project(pool="last", size=128, normalize=True)
    text = mini({"layer": Block(mixer=EACH, ffn=PLAIN, norm=Layer())}).replace(
        embed=Tokens(positions=Learned(size=1024)), head=head, final_norm=Layer()
    )
    return DualEncoder(text=text, vision=images(head.replace(pool="first")))


@assemblies.register("llava-mini")
def llava() -> VisionLanguage:
    """Patches as tokens among a text's (arXiv:2310.03744)."""
    text = mini({"layer": Block(mixer=GROUPED, ffn=SWIGLU)})
    return VisionLanguage(vision=images(NoHead()), connector=MLPConnector(), text=text, image_token=8191)


@assemblies.register("flamingo-mini")
def flamingo() -> VisionLanguage:
    """Images that a resampler sums up and gated crosses read, before every second layer (arXiv:2204.14198)."""
    reader = Block(cross=CrossAttention(heads=8, kv_heads=8, head_dim=32), ffn=PLAIN, residual=Gated())
    text = mini({"reader": reader, "layer": Block(mixer=GROUPED, ffn=SWIGLU)}, layers="2*(reader 2*layer)")
    resampler = Resampler(latents=16, depth=2, heads=8, head_dim=32, hidden=1024)
    return VisionLanguage(vision=images(NoHead()), connector=resampler, text=text, join="memory")
