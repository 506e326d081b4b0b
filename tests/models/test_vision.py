"""Models that read images: gated crosses and the resampler against transformers' Idefics; which image a token reads; the cache."""

from __future__ import annotations

import pytest
import torch
from transformers.models.idefics.configuration_idefics import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from tests.parity import hf
from tests.tiny import apart, redraw, segments_of, tokens
from trivium.adapt.lora import LoRA
from trivium.core.errors import ConfigError, DataError
from trivium.core.spec import validate
from trivium.infer.generate import generate, generate_naive
from trivium.infer.sampling import Sampling
from trivium.io import directory
from trivium.models.block import Block
from trivium.models.dual_encoder import DualEncoder, ended
from trivium.models.encoder_decoder import EncoderDecoder
from trivium.models.model import Model, with_kind
from trivium.models.transformer import Transformer, build, initialize
from trivium.models.vision_language import VisionLanguage, VisionLanguageModel
from trivium.nn.activations import ReLU
from trivium.nn.attention import Attention
from trivium.nn.cross import CrossAttention
from trivium.nn.feedforward import MLP
from trivium.nn.heads import NoHead
from trivium.nn.heads_task import Project
from trivium.nn.inputs import Inputs
from trivium.nn.norms import RMS, Layer
from trivium.nn.patches import Patches
from trivium.nn.positions import Rope
from trivium.nn.positions_absolute import Learned
from trivium.nn.resampler import MLPConnector, Resampler
from trivium.nn.residual import Gated
from trivium.nn.step import Step

IMAGE, TEXT = 60, 59  # the token of an image, and how many others there are
PLAIN = Block(mixer=Attention(heads=4, kv_heads=2, head_dim=6, position=Rope(base=50.0)), ffn=MLP(hidden=28))
CROSS = CrossAttention(heads=3, kv_heads=3, head_dim=8, memory_dim=20, latest=IMAGE)
GATED = Block(cross=CROSS, ffn=MLP(hidden=30), residual=Gated())
SEES = Transformer(
    dim=20,
    vocab=1,
    layers="2*layer",
    blocks={"layer": Block(mixer=Attention(heads=2, kv_heads=2, head_dim=10), ffn=MLP(hidden=24))},
    embed=Patches(image=8, patch=4, positions=Learned(size=5)),
    head=NoHead(),
    causal=False,
)
WRITES = Transformer(dim=24, vocab=61, layers="3*plain", blocks={"plain": PLAIN}, context=60)
FLAMINGO = VisionLanguage(
    vision=SEES,
    connector=Resampler(latents=3, depth=2, heads=2, head_dim=6, hidden=26),
    text=WRITES.replace(layers="gated plain plain gated plain", blocks={"plain": PLAIN, "gated": GATED}),
    join="memory",
    image_token=IMAGE,
)
ALL = FLAMINGO.replace(
    text=FLAMINGO.text.replace(blocks={"plain": PLAIN, "gated": GATED.replace(cross=CROSS.replace(latest=None))}), image_token=None
)
LLAVA = VisionLanguage(vision=SEES, connector=MLPConnector(hidden=22), text=WRITES, image_token=IMAGE, depth=1)
every_model = pytest.mark.parametrize("spec", [FLAMINGO, LLAVA], ids=["memory", "tokens"])


def tiny(spec: VisionLanguage) -> VisionLanguageModel:
    model = redraw(build(spec, device="cpu")).eval()
    assert isinstance(model, VisionLanguageModel)
    return model


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def rows(spec: VisionLanguage) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts with two images, none and one, as tokens and segments."""
    image = [IMAGE] * (spec.vectors if spec.join == "tokens" else 1)
    words = tokens(20, vocab=TEXT).tolist()
    texts = [words[:2] + image + words[2:5] + image + words[5:7], words[7:12], image + words[12:18]]
    longest = max(map(len, texts))
    x = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    return x, segments_of([[len(text)] for text in texts], longest)


def idefics(*, channel: bool = False) -> IdeficsConfig:
    vision = {"embed_dim": 20, "intermediate_size": 36}
    perceiver = {"use_resampler": True, "qk_layer_norms_perceiver": channel}
    config = IdeficsConfig(
        hidden_size=24, num_attention_heads=3, intermediate_size=30, vision_config=vision, perceiver_config=perceiver, rms_norm_eps=0.01,
        qk_layer_norms=channel, alpha_type="vector" if channel else "float", alpha_initializer="ones", dropout=0.0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return config


@pytest.mark.concept("X.24", part="nn/residual.py")
@pytest.mark.concept("X.24", part="nn/cross.py")
@pytest.mark.parametrize("channel", [False, True])
def test_a_gated_cross_is_that_of_idefics(channel):
    """One gate or one a channel, heads normed or not; tokens before any image, and tokens that each read their own. Gradients too."""
    theirs = IdeficsGatedCrossAttentionLayer(idefics(channel=channel), layer_idx=0).eval()
    hf.redraw(theirs, seed=0)
    spec = Block(
        cross=CROSS.replace(qk_norm=RMS(eps=0.01) if channel else None),
        ffn=MLP(hidden=30),
        norm=RMS(eps=0.01),
        residual=Gated(over="channel" if channel else "sublayer"),
    )
    model = build(WRITES.replace(layers="gated", blocks={"gated": spec}), device="cpu")
    layer, attention = model.layers[0], theirs.cross_attn
    pairs = {
        "cross_norm.weight": theirs.input_layernorm.weight,
        "cross_join.gate": theirs.alpha_cross_attn,
        "cross.inp.q.weight": attention.q_proj.weight,
        "cross.memory.k.weight": attention.k_proj.weight,
        "cross.memory.v.weight": attention.v_proj.weight,
        "cross.out.weight": attention.o_proj.weight,
        "ffn_norm.weight": theirs.post_attention_layernorm.weight,
        "ffn_join.gate": theirs.alpha_dense,
        "ffn.inp.gate.weight": theirs.mlp.gate_proj.weight,
        "ffn.inp.up.weight": theirs.mlp.up_proj.weight,
        "ffn.out.weight": theirs.mlp.down_proj.weight,
    }
    if channel:
        pairs |= {f"cross.norms.{name}.weight": getattr(attention, f"{name}_layer_norm").weight for name in "qk"}
    ours = dict(layer.named_parameters())
    assert ours.keys() == pairs.keys()
    with torch.no_grad():
        for name, parameter in pairs.items():
            ours[name].copy_(parameter.view_as(ours[name]))
    x, memory = torch.randn(2, 7, 24), torch.randn(2, 6, 20)
    given = torch.tensor([[3, IMAGE, 4, 5, IMAGE, 6, 7], [IMAGE, 1, 2, 3, 4, 5, 6]])
    part = torch.tensor([[-1, 0, 0, 0, 1, 1, 1], [0] * 7])  # the image that each token reads
    segments = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, -1, -1, -1]])
    mask = torch.zeros(2, 1, 7, 6).masked_fill((part[:, :, None] != segments[:, None])[:, None], torch.finfo(torch.float32).min)
    expected = theirs(x, image_hidden_states=memory, image_attention_mask=mask, cross_attention_gate=(part >= 0).float())
    actual = layer(x, Step.begin(Inputs(given, memory=memory, memory_segments=segments), causal=True))
    assert expected.std() > 0.5
    assert apart(actual, expected) <= 1e-5
    actual.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in pairs.items():
        size = parameter.grad.abs().max()
        assert apart(ours[name].grad / size, parameter.grad.view_as(ours[name]) / size) <= 1e-4


@pytest.mark.concept("X.24", part="nn/resampler.py")
@pytest.mark.parametrize("normed", [False, True])
def test_the_resampler_is_that_of_idefics(normed):
    theirs = IdeficsPerceiverResampler(idefics(channel=normed), 20, 3, 4, 6, 5).eval()
    hf.redraw(theirs, seed=0)
    spec = Resampler(latents=5, depth=3, heads=4, head_dim=6, hidden=80, activation=ReLU(), qk_norm=Layer() if normed else None)
    ours = spec.build(20, 20)
    names = {
        "latents": "latents.weight", "layer_norm": "norm", "0.context_layer_norm": "context_norm", "0.latents_layer_norm": "latents_norm",
        "0.q_layer_norm": "norms.q", "0.k_layer_norm": "norms.k", "0.q_proj": "inp.q", "0.k_proj": "memory.k", "0.v_proj": "memory.v",
        "0.output_proj": "out", "1.ln": "ffn_norm", "1.fc": "ffn.inp.up", "1.c_proj": "ffn.out",
    }  # fmt: skip
    mine, left = dict(ours.named_parameters()), set()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            stem, _, leaf = name.rpartition(".") if name != "latents" else ("latents", "", "")
            at = stem.split(".", 2) if stem.startswith("blocks.") else None
            target = f"layers.{at[1]}.{names[at[2]]}" if at else names[stem]
            target = f"{target}.{leaf}" if leaf else target
            mine[target].copy_(parameter)
            left.add(target)
    assert left == set(mine)
    x, other = (torch.randn(2, 9, 20, generator=torch.Generator().manual_seed(3)).requires_grad_() for _ in range(2))
    step = Step.begin(Inputs(embeds=x), causal=False)
    actual, expected = ours(x, step), theirs(other)
    assert actual.shape == (2, 5, 20) and expected.std() > 0.3
    assert apart(actual, expected) <= 1e-5
    assert apart(*(torch.autograd.grad(y.square().sum(), z)[0] for y, z in ((actual, x), (expected, other)))) <= 1e-4


@pytest.mark.concept("X.24", part="models/vision_language.py")
def test_a_gate_of_zero_is_the_language_model():
    """To the bit, whatever the images; and the gates are the first to learn."""
    base = redraw(build(WRITES, device="cpu")).eval()
    model = initialize(build(FLAMINGO, device="cpu"), seed=0).eval()
    at = [index for index, name in enumerate(FLAMINGO.text.layers) if name == "plain"]
    with torch.no_grad():
        for name in ("embed", "final_norm", "head"):
            getattr(model.text, name).load_state_dict(getattr(base, name).state_dict())
        for mine, theirs in zip(at, base.layers, strict=True):
            model.text.layers[mine].load_state_dict(theirs.state_dict())
    x, segments = rows(FLAMINGO)
    expected = base(Inputs(x, segments=segments)).logits
    out = model(Inputs(x, segments=segments, images=pictures(3)))
    assert torch.equal(out.logits, expected) and torch.equal(model(x[1:2, :5]).logits, base(x[1:2, :5]).logits)
    out.logits.square().sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0 and "text.layers.0." in name}
    assert moved == {"text.layers.0.cross_join.gate", "text.layers.0.ffn_join.gate"}
    with torch.no_grad():
        model.text.layers[0].cross_join.gate.fill_(1.0)
    changed = model(Inputs(x, segments=segments, images=pictures(3))).logits
    assert torch.equal(changed[0, :2], expected[0, :2]) and not torch.allclose(changed[0, 2:], expected[0, 2:])


@pytest.mark.concept("X.24", part="models/vision_language.py")
def test_a_token_reads_the_latest_image():
    """Images between texts: nothing is read before the first, and after the second the first only through what was said of it."""
    model, (x, segments) = tiny(FLAMINGO), rows(FLAMINGO)
    full = model(Inputs(x, segments=segments, images=pictures(3)), weights=True)
    weights = full.aux.cross[0]  # [B, H, T, M]
    assert weights.shape == (3, 3, 9, 6)
    read = (weights.sum(1) > 0).view(3, 9, 2, 3).any(-1)
    first, second = torch.arange(9) >= 2, torch.arange(9) >= 6
    assert (read[0, :, 0] == (first & ~second)).all() and (read[0, :, 1] == second).all()
    assert not read[1].any() and read[2, : int((segments[2] >= 0).sum()), 0].all() and not read[2, :, 1].any()
    other = pictures(3)
    other[1] += 1
    there = model(Inputs(x, segments=segments, images=other)).logits
    assert apart(there[0, :6], full.logits[0, :6]) <= 1e-5
    assert apart(there[1:][segments[1:] >= 0], full.logits[1:][segments[1:] >= 0]) <= 1e-5
    assert not torch.allclose(there[0, 6:], full.logits[0, 6:])
    everything = tiny(ALL)
    both = everything(Inputs(x[:1], images=pictures(2)), weights=True).aux.cross[0]
    assert both.shape == (1, 3, 9, 6) and (both > 0).all()


@every_model
@pytest.mark.concept("T03.06", part="models/vision_language.py")
def test_rows_and_images_go_together(spec):
    """Each row as if it were alone, its images with it."""
    model, (x, segments), images = tiny(spec), rows(spec), pictures(3)
    logits = model(Inputs(x, segments=segments, images=images)).logits
    for row, given in enumerate((images[:2], None, images[2:])):
        length = int((segments[row] >= 0).sum())
        assert apart(logits[row, :length], model(Inputs(x[row : row + 1, :length], images=given)).logits[0]) <= 2e-5
    swapped = model(Inputs(x, segments=segments, images=images[[1, 0, 2]])).logits
    assert torch.equal(swapped[1], logits[1]) and not torch.allclose(swapped[0], logits[0])


@every_model
@pytest.mark.concept("T03.06", part="models/vision_language.py")
def test_images_are_given_once(spec):
    """Cached steps equal the full forward, rolled back too; generated text is that of full forwards."""
    model, (x, segments), images = tiny(spec), rows(spec), pictures(3)
    more = tokens(3, 4, vocab=TEXT, seed=5)
    with torch.inference_mode():
        cache = model.cache(rows=3, capacity=20, rollback=3)
        model(Inputs(x, segments=segments, images=images, cache=cache))
        steps = torch.cat([model(Inputs(more[:, t : t + 1], cache=cache)).logits for t in range(4)], 1)
        cache.drop_last(3)
        assert apart(model(Inputs(more[:, 1:], cache=cache)).logits, steps[:, 1:]) <= 2e-5
        for row, given in enumerate((images[:2], None, images[2:])):
            length = int((segments[row] >= 0).sum())
            assert apart(steps[row], model(Inputs(torch.cat([x[row, :length], more[row]])[None], images=given)).logits[0, length:]) <= 2e-5
    prompts = [x[row, : int((segments[row] >= 0).sum())].tolist() for row in range(3)]
    sampling, given = Sampling(temperature=0, max_tokens=5, logit_bias={IMAGE: -1e4}), [images[:2], None, images[2:]]
    answers = [one.ids for one in generate(model, prompts, sampling, images=given)]
    assert answers == generate_naive(model, prompts, sampling, images=given)
    with pytest.raises(ConfigError, match="3 prompts, but 1 sets of images"):
        generate(model, prompts, images=given[:1])
    with pytest.raises(DataError, match=rf"prompts\[0\] has {2 * spec.places} image tokens .* its 0 images take 0"):
        generate(model, prompts)
    with pytest.raises(ConfigError, match="reads no images"):
        generate(redraw(build(WRITES, device="cpu")), prompts, images=given)


def test_an_image_in_a_later_step():
    """Where crosses read the latest one, a cache goes on from the images that it was given."""
    model, images = tiny(FLAMINGO), pictures(2)
    x = torch.cat([tokens(1, 3, vocab=TEXT), torch.tensor([[IMAGE]]), tokens(1, 4, vocab=TEXT, seed=1)], 1)
    inputs = model.see(Inputs(x, images=images[:1]))
    full = model.text(inputs).logits
    with torch.inference_mode():
        for cuts in ((1,) * 8, (2, 3, 3), (4, 4)):
            cache, pieces = model.cache(rows=1, capacity=8), []
            for number, piece in enumerate(x.split(cuts, 1)):
                memory = {"memory": inputs.memory, "memory_segments": inputs.memory_segments} if number == 0 else {}
                pieces.append(model.text(Inputs(piece, cache=cache, **memory)).logits)
            assert apart(torch.cat(pieces, 1), full) <= 2e-5
        with pytest.raises(DataError, match="in the first forward"):
            model(Inputs(x[:, 3:4], images=images[1:], cache=cache))


@every_model
def test_a_model_is_its_json_its_files_and_its_adapters(spec, tmp_path):
    model, (x, segments), images = tiny(spec), rows(spec), pictures(3)
    assert validate(Model, with_kind(spec.to_dict())) == spec
    plain = model(Inputs(x, segments=segments, images=images)).logits
    directory.write(tmp_path / "m", model)
    loaded = directory.read(tmp_path / "m")
    assert loaded.spec == spec and torch.equal(loaded.model(Inputs(x, segments=segments, images=images)).logits, plain)
    chosen = ("connector.out",) if spec.join == "tokens" else ("cross.inp.q",)
    for name in ("one", "two"):
        LoRA(name=name, rank=2, targets=chosen).apply(model)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if ".lora." in name:
                parameter.normal_(generator=torch.Generator().manual_seed(number))
    each = model(Inputs(x, segments=segments, images=images, adapters=torch.tensor([-1, 0, 1]))).logits
    assert apart(each[0], plain[0]) <= 2e-5
    alone = model(Inputs(x[2:], segments=segments[2:], images=images[2:], adapters=torch.tensor([1]))).logits
    there = segments[2] >= 0
    assert apart(each[2, there], alone[0, there]) <= 1e-4
    assert not torch.allclose(each[2, there], plain[2, there], atol=1e-3)


@pytest.mark.parametrize(
    "spec, change, message",
    [
        (LLAVA, {"image_token": None}, "needs an image_token"),
        (LLAVA, {"image_token": 61}, "needs an image_token"),
        (LLAVA, {"join": "memory"}, "blocks of text with a cross"),
        (LLAVA, {"depth": 3}, "more than the 2 layers"),
        (LLAVA, {"vision": WRITES}, "embed of kind patches"),
        (LLAVA, {"text": WRITES.replace(causal=False)}, "causal: true"),
        (LLAVA, {"vision": SEES.replace(embed=SEES.embed.replace(start=False, positions=None)), "start": True}, "nothing stands before"),
        (FLAMINGO, {"join": "tokens"}, "without a cross"),
        (FLAMINGO, {"image_token": 5}, "latest token 60"),
    ],
)
def test_what_does_not_fit_together_is_refused(spec, change, message):
    with pytest.raises(ConfigError, match=message):
        spec.replace(**change)


def test_images_that_no_token_stands_for_are_refused():
    model = tiny(LLAVA)
    with pytest.raises(DataError, match="2 images were given, of 4 image tokens"):
        model(Inputs(torch.tensor([[1, *[IMAGE] * 4, 2]]), images=pictures(2)))
    with pytest.raises(DataError, match="the rows have"):
        model(Inputs(torch.tensor([[1, *[IMAGE] * 3], [*[IMAGE] * 4, 2][:4]]), images=pictures(2)))
    with pytest.raises(DataError, match="give tokens"):
        model(Inputs(embeds=torch.zeros(1, 3, 24), images=pictures(1)))
    with pytest.raises(DataError, match="shared out among 2 rows"):
        tiny(ALL)(Inputs(tokens(2, 3, vocab=TEXT), images=pictures(3)))
    with pytest.raises(ConfigError, match="give tokens, not embeds"):
        tiny(FLAMINGO)(Inputs(embeds=torch.zeros(1, 3, 24), memory=torch.zeros(1, 3, 20)))


def test_an_encoder_of_images_may_stand_before_a_decoder():
    """A captioner is an encoder and a decoder like any other; its source is images."""
    writes = WRITES.replace(layers="w", blocks={"w": PLAIN.replace(cross=CROSS.replace(latest=None))})
    model = redraw(build(EncoderDecoder(encoder=SEES, decoder=writes, shared=False), device="cpu")).eval()
    x, images = tokens(2, 4, vocab=TEXT), pictures(2)
    logits = model(Inputs(x, source=Inputs(images=images))).logits
    assert apart(logits[1:], model(Inputs(x[1:], source=Inputs(images=images[1:]))).logits) <= 2e-5
    assert not torch.allclose(logits, model(Inputs(x, source=Inputs(images=images.flip(0)))).logits)


HEAD = {"size": 10, "normalize": True}
CLIP = DualEncoder(text=WRITES.replace(head=Project(pool="last", **HEAD)), vision=SEES.replace(head=Project(**HEAD)), end=7, scale=1.5)


@pytest.mark.concept("T03.06", part="models/dual_encoder.py")
def test_a_dual_encoder_compares(tmp_path):
    """Packed captions, padded ones, and ones told apart by their end, are the same; every vector has length one."""
    model = redraw(build(CLIP, device="cpu")).eval()
    x = tokens(2, 6, vocab=TEXT).masked_fill(tokens(2, 6, vocab=TEXT) == 7, 8)
    x[0, 3] = x[1, 5] = 7
    images = pictures(4)
    out = model(Inputs(x, images=images))
    assert out.logits.shape == (4, 2) and out.hidden.shape == (2, 6, 24)
    text, image = model.encode_text(x), model.encode_images(images)
    assert apart(text.norm(dim=1), torch.ones(2)) <= 2e-5
    assert apart(out.logits, model.scale.weight.exp() * image @ text.T) <= 2e-5
    packed = torch.cat([x[:1, :4], x[1:]], 1)
    assert apart(model(Inputs(packed, segments=segments_of([[4, 6]], 10), images=images)).logits, out.logits) <= 2e-5
    assert apart(model.encode_text(Inputs(x, segments=segments_of([[4], [6]], 6))), text) <= 2e-5
    assert torch.equal(
        ended(torch.tensor([[3, 9, 2, 9], [1, 2, 3, 0], [9, 1, 1, 1]]), None),
        torch.tensor([[0, 0, -1, -1], [0, 0, 0, -1], [0, -1, -1, -1]]),
    )
    assert torch.equal(ended(torch.tensor([[3, 7, 7, 9], [1, 2, 3, 0]]), 7), torch.tensor([[0, 0, -1, -1], [0, 0, 0, 0]]))
    directory.write(tmp_path / "m", model)
    loaded = directory.read(tmp_path / "m")
    assert loaded.spec == CLIP and torch.equal(loaded.model(Inputs(x, images=images)).logits, out.logits)
    assert initialize(build(CLIP, device="cpu"), seed=0).scale.weight.item() == 1.5
    with pytest.raises(ConfigError, match="a dual encoder compares"):
        model(x)
    with pytest.raises(ConfigError, match="has no cache"):
        generate(model, [[1, 2]])
    for change in ({"text": WRITES}, {"vision": SEES}, {"vision": WRITES.replace(head=Project(**HEAD))}):
        with pytest.raises(ConfigError, match="of kind"):
            CLIP.replace(**change)
