"""Images as patches against torch's convolution; codes against torch.cdist; images as tokens and back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.tiny import apart, redraw, tokens
from trivium.adapt.adapter import initialize_adapter
from trivium.adapt.lora import LoRA
from trivium.core.errors import ConfigError, DataError, TriviumError
from trivium.core.spec import validate
from trivium.infer.generate import generate
from trivium.infer.sampling import Sampling
from trivium.io import directory
from trivium.models import presets
from trivium.models.block import Block
from trivium.models.image_tokens import ImageTokens, ImageTokensModel
from trivium.models.model import Model, with_kind
from trivium.models.transformer import Transformer, TransformerModel, build, initialize
from trivium.nn.attention import Attention
from trivium.nn.embeddings import Tokens
from trivium.nn.feedforward import MLP
from trivium.nn.heads import NoHead
from trivium.nn.heads_task import Classifier, Project, Tagger
from trivium.nn.inputs import Inputs
from trivium.nn.norms import Layer
from trivium.nn.patches import Patches, fold, unfold
from trivium.nn.positions_absolute import Learned
from trivium.nn.quantized_images import nearest, quantize, signal_to_noise

BLOCK = Block(mixer=Attention(heads=4, kv_heads=2, head_dim=6), ffn=MLP(hidden=28))
SPEC = Transformer(
    dim=24,
    vocab=1,
    layers="2*b",
    blocks={"b": BLOCK},
    embed=Patches(image=8, patch=4, positions=Learned(size=5), norm=Layer(eps=1e-3)),
    head=Classifier(labels=7),
    causal=False,
)
CODER = ImageTokens(
    encoder=SPEC.replace(embed=Patches(image=8, patch=2, start=False), head=NoHead()),
    decoder=SPEC.replace(vocab=16, embed=Tokens(positions=Learned(size=16)), head=Tagger(labels=12)),
    offset=40,
)


def pictures(count: int, size: int = 8, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def tiny(spec: Transformer = SPEC) -> TransformerModel:
    return redraw(build(spec, device="cpu")).eval()


def coder() -> ImageTokensModel:
    model = redraw(build(CODER, device="cpu")).eval()
    assert isinstance(model, ImageTokensModel)
    return model


@pytest.mark.concept("T03.06", part="nn/patches.py")
@pytest.mark.parametrize("bias", [True, False])
def test_a_map_of_patches_is_a_convolution(bias):
    """Forward and gradients; the vector that stands before them, and positions."""
    model = tiny(SPEC.replace(embed=SPEC.embed.replace(bias=bias, norm=None)))
    mine, other = (pictures(3).requires_grad_() for _ in range(2))
    step = model.begin(Inputs(images=mine))
    embed = model.embed
    x = embed(None, step)
    kernel = embed.project.weight.view(24, 3, 4, 4)
    grid = F.conv2d(other, kernel, embed.project.bias, stride=4).flatten(2).transpose(1, 2)
    expected = torch.cat([embed.start.weight.expand(3, 1, -1), grid], 1) + embed.positions.weight
    assert apart(x, expected) <= 2e-5
    weight = torch.randn(x.shape)
    assert apart(*(torch.autograd.grad((y * weight).sum(), image)[0] for y, image in ((x, mine), (expected, other)))) <= 2e-5


def test_folding_undoes_unfolding():
    images = pictures(2, size=12, channels=2)
    patches = unfold(images, 3)
    assert patches.shape == (2, 16, 18) and torch.equal(patches[1, 6], images[1, :, 3:6, 6:9].flatten())
    assert torch.equal(fold(patches, patch=3, width=12), images)
    wide = torch.cat([images, images], 3)
    assert torch.equal(fold(unfold(wide, 4), patch=4, width=24), wide)


def test_an_encoder_of_images():
    """Every patch reaches the class, images do not reach one another, and order matters by positions alone."""
    model, images = tiny(), pictures(3)
    full = model(Inputs(images=images))
    assert full.logits.shape == (3, 7) and full.hidden.shape == (3, 5, 24) and full.logits.std() > 0.1
    assert apart(model(Inputs(images=images[1:2])).logits, full.logits[1:2]) <= 2e-5
    pixels = images.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(Inputs(images=pixels)).logits[0].square().sum(), pixels)
    assert (unfold(grad, 4)[0].abs().sum(-1) > 0).all() and (grad[1:] == 0).all()
    turned = torch.cat([images[:, :, 4:], images[:, :, :4]], 2)
    unplaced = tiny(SPEC.replace(embed=SPEC.embed.replace(positions=None)))
    assert apart(unplaced(Inputs(images=turned)).logits, unplaced(Inputs(images=images)).logits) <= 2e-5
    assert not torch.allclose(model(Inputs(images=turned)).logits, full.logits)
    assert apart(model(Inputs(images=images.double())).logits, full.logits) <= 2e-5
    weighed = model(Inputs(images=images), weights=True).aux.weights
    assert weighed[0].shape == (3, 4, 5, 5)


def test_an_encoder_is_drawn_saved_and_adapted(tmp_path):
    model, images = initialize(build(SPEC, device="cpu"), seed=2).eval(), pictures(2)
    plain = model(Inputs(images=images)).logits
    assert plain.isfinite().all() and validate(Transformer, SPEC.to_dict()) == SPEC
    directory.write(tmp_path / "m", model)
    assert torch.equal(directory.read(tmp_path / "m").model(Inputs(images=images)).logits, plain)
    LoRA(rank=2, targets=("embed.project", "mixer.out")).apply(model)
    initialize_adapter(model, seed=1)
    assert apart(model(Inputs(images=images)).logits, plain) <= 1e-6
    assert all(p.grad is None for p in model.parameters())
    model.train()(Inputs(images=images)).logits.square().sum().backward()
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None} == {"default"}


def test_images_that_do_not_fit_are_refused():
    model = tiny()
    with pytest.raises(DataError, match=r"images must be \[N, 3, 8, 8\]"):
        model(Inputs(images=pictures(2, size=12)))
    with pytest.raises(DataError, match="this model reads images"):
        model(tokens(2, 5, vocab=1))
    with pytest.raises(ConfigError, match="reads no images"):
        redraw(build(presets.llama(dim=24, layers=1, heads=2, kv_heads=2, hidden=30, vocab=61), device="cpu"))(Inputs(images=pictures(1)))
    with pytest.raises(ValueError, match="images must be"):
        Inputs(images=torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="give tokens"):
        Inputs()
    with pytest.raises(ConfigError, match="multiple of patch"):
        SPEC.embed.replace(image=9)
    assert tiny(SPEC.replace(head=Project()))(Inputs(images=pictures(1))).logits.shape == (1, 24)


@pytest.mark.concept("X.23", part="nn/quantized_images.py")
def test_codes_are_the_nearest_rows():
    """As distances say; the gradient passes as it is to what was quantized, and the table gets its own."""
    torch.manual_seed(0)
    x, table = torch.randn(5, 7, 6).requires_grad_(), torch.randn(19, 6).requires_grad_()
    found = quantize(x, table)
    wanted = torch.cdist(x, table[None]).argmin(-1)
    assert torch.equal(found.numbers, wanted) and len(wanted.unique()) > 5 and torch.equal(nearest(table, table), torch.arange(19))
    assert apart(found.values, table[wanted]) <= 1e-6
    weight = torch.randn(5, 7, 6)
    to_x, to_table = torch.autograd.grad((found.values * weight).sum(), [x, table], allow_unused=True)
    assert torch.equal(to_x, weight) and to_table is None
    pull, commitment = (torch.autograd.grad(loss, [x, table], allow_unused=True) for loss in (found.pull, found.commitment))
    assert pull[0] is None and commitment[1] is None
    gap = (x - table[wanted]).detach()
    assert apart(commitment[0], 2 * gap / 6) <= 1e-6
    assert apart(pull[1], torch.zeros(19, 6).index_add(0, wanted.flatten(), -2 * gap.flatten(0, 1) / 6)) <= 1e-6
    assert apart(found.pull, F.mse_loss(x, table[wanted], reduction="sum") / 6) <= 1e-4


def scenes(count: int, seed: int) -> torch.Tensor:
    """Images of one bright rectangle on a dark ground, of few colors."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.full((count, 3, 8, 8), 0.1)
    for image in images:
        top, left, color = (int(torch.randint(n, (1,), generator=generator)) for n in (5, 5, 3))
        image[color, top : top + 3, left : left + 4] = 0.9
    return images


@pytest.mark.slow
@pytest.mark.concept("X.23", part="models/image_tokens.py")
def test_training_makes_images_come_back():
    """On images that it has not seen, by 4 decibels more than from their mean. The table is used, and is trained by its own term."""
    model = initialize(build(CODER.replace(decoder=CODER.decoder.replace(vocab=64)), device="cpu"), seed=0)
    seen, unseen = scenes(64, 0), scenes(32, 1)

    def quality() -> float:
        with torch.no_grad():
            return signal_to_noise(unseen, model.decode(model.encode(unseen))).mean().item()

    before, codes, optimizer = quality(), model.codes.detach().clone(), torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(80):
        if step in (0, 20, 40):  # the encoder moves fastest at first
            model.draw_codes(seen, seed=step)
        out = model(Inputs(images=seen))
        pull, commitment = out.aux.total("pull"), out.aux.total("commitment")
        loss = 20 * F.mse_loss(model.pictures(out.logits), seen) + (pull + 0.25 * commitment) / out.logits.shape[:2].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert quality() > max(before, signal_to_noise(unseen, seen.mean(0)).mean().item()) + 4
    assert len(model.encode(unseen).unique()) > 5 and not torch.allclose(model.codes, codes)


@pytest.mark.concept("X.23", part="models/image_tokens.py")
def test_images_are_tokens_of_one_vocabulary():
    """One decoder reads text and images in one sequence, and what it writes among them is an image again."""
    model, images = coder(), pictures(2)
    ids = model.encode(images)
    assert ids.shape == (2, 16) and ids.min() >= 40 and ids.max() < 56 == CODER.vocab and CODER.context == 16
    out = model(Inputs(images=images))
    assert apart(model.decode(ids), model.pictures(out.logits)) <= 2e-5
    assert torch.equal(model.decode(ids[1:]), model.decode(ids)[1:])
    writer = redraw(build(presets.llama(dim=24, layers=2, heads=2, kv_heads=2, hidden=30, vocab=56), device="cpu")).eval()
    mixed = torch.cat([tokens(2, 3, vocab=40), ids, tokens(2, 2, vocab=40, seed=1)], 1)
    assert writer(mixed).logits.shape == (2, 21, 56)
    barred = dict.fromkeys(range(40), -10000.0)
    answer = generate(writer, [mixed[0, :3].tolist()], Sampling(temperature=0, max_tokens=16, logit_bias=barred))[0].ids
    assert model.decode(torch.tensor([answer])).shape == (1, 3, 8, 8)
    with pytest.raises(DataError, match="tokens 40 to 55 are of images"):
        model.decode(ids - 20)
    with pytest.raises(DataError, match="an image is 16 tokens"):
        model.decode(ids[:, :9])
    with pytest.raises(ConfigError, match="has no cache"):
        generate(model, [[41, 42]])


def test_a_coder_is_its_json_and_its_files(tmp_path):
    model, images = coder(), pictures(2)
    assert validate(Model, with_kind(CODER.to_dict())) == CODER
    directory.write(tmp_path / "m", model)
    loaded = directory.read(tmp_path / "m")
    assert loaded.spec == CODER and torch.equal(loaded.model.encode(images), model.encode(images))
    for change in (
        {"encoder": CODER.encoder.replace(head=Project())},
        {"decoder": CODER.decoder.replace(dim=12)},
        {"decoder": CODER.encoder},
    ):
        with pytest.raises(TriviumError, match="the (en|de)coder has"):
            CODER.replace(**change)
