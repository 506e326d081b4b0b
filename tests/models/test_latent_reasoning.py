"""Thought without words: hidden states fed back as inputs, and stacks that run through the same weights again."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.tiny import apart, redraw, segments_of, tokens
from trivium.adapt.adapter import initialize_adapter, merge
from trivium.adapt.lora import LoRA
from trivium.core.errors import ConfigError, DataError
from trivium.core.spec import validate
from trivium.infer.generate import generate, generate_naive
from trivium.infer.sampling import Sampling
from trivium.io import directory
from trivium.models import count
from trivium.models.block import Block
from trivium.models.looped import LatentReasoning, LatentReasoningModel
from trivium.models.model import Model, with_kind
from trivium.models.transformer import Transformer, TransformerModel, build, initialize
from trivium.nn.attention import Attention
from trivium.nn.delta import GatedDelta
from trivium.nn.feedforward import MLP
from trivium.nn.heads import LMHead
from trivium.nn.inputs import Inputs
from trivium.nn.positions import Rope

LATENT = 60
ATTEND = Block(mixer=Attention(heads=4, kv_heads=2, head_dim=6, position=Rope(base=50.0)), ffn=MLP(hidden=28))
RECUR = Block(mixer=GatedDelta.tiny(), ffn=MLP(hidden=28))
BODY = Transformer(dim=24, vocab=61, layers="a r a", blocks={"a": ATTEND, "r": RECUR}, head=LMHead(tied=True), context=40)
THINKS = LatentReasoning(body=BODY, token=LATENT)
LOOPED = Transformer(
    dim=24, vocab=61, layers="first 3*(a r) last", blocks={"first": ATTEND, "a": ATTEND, "r": RECUR, "last": ATTEND}, shared=("a", "r")
)


def thinker() -> LatentReasoningModel:
    model = redraw(build(THINKS, device="cpu")).eval()
    assert isinstance(model, LatentReasoningModel)
    return model


def looped(spec: Transformer = LOOPED) -> TransformerModel:
    return redraw(build(spec, device="cpu")).eval()


def unrolled(model: TransformerModel) -> TransformerModel:
    """The plain stack in which every layer holds a copy of its own."""
    plain = build(model.spec.replace(shared=()), device="cpu").eval()
    plain.load_state_dict(copy.deepcopy(model.state_dict()))
    return plain


def words(*shape: int, seed: int = 0) -> torch.Tensor:
    return tokens(*shape, seed=seed, vocab=LATENT)


def thought(model: LatentReasoningModel, before: torch.Tensor, steps: int, after: torch.Tensor) -> torch.Tensor:
    """The formula, one state at a time: logits [T, V] of a text [T'], `steps` thoughts, and a text."""
    embed = model.body.embed
    embeds = embed.rows(before[None])
    for _ in range(steps):
        embeds = torch.cat([embeds, model.body(Inputs(embeds=embeds)).hidden[:, -1:]], 1)
    return model.body(Inputs(embeds=torch.cat([embeds, embed.rows(after[None])], 1))).logits[0]


@pytest.mark.concept("X.20", part="models/looped.py")
def test_no_latent_token_is_the_base_model():
    model, x = thinker(), words(2, 9)
    assert torch.equal(model(x).logits, model.body(x).logits)
    x[0, 4] = LATENT
    assert not torch.allclose(model(x).logits[0, 4:], model.body(x).logits[0, 4:])
    assert torch.equal(model(x).logits[1], model.body(x).logits[1])


@pytest.mark.concept("X.20", part="models/looped.py")
def test_each_latent_token_reads_the_state_before_it():
    """Rows and documents that think for 3, 0, 1 and 2 steps, at different places, between padding; gradients too."""
    model = thinker()
    texts = [(4, 3, 2), (5, 0, 0), (3, 1, 4), (2, 2, 1)]
    x = words(2, 16)
    segments = segments_of([[9, 5], [-2, 8, 5]], 16)
    places = [(0, 0), (0, 9), (1, 2), (1, 10)]
    for (row, start), (before, steps, _) in zip(places, texts, strict=True):
        x[row, start + before : start + before + steps] = LATENT
    logits = model(Inputs(x, segments=segments)).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)) * (segments >= 0)[..., None]
    (logits * weight).sum().backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for (row, start), (before, steps, after) in zip(places, texts, strict=True):
        stop = start + before + steps + after
        alone = thought(model, x[row, start : start + before], steps, x[row, start + before + steps : stop])
        assert apart(logits[row, start:stop], alone) <= 2e-5
        (alone * weight[row, start:stop]).sum().backward()
    for name, parameter in model.named_parameters():
        assert (packed[name] - parameter.grad).abs().max() < 1e-4 * parameter.grad.std(), name


def test_thoughts_go_through_the_cache():
    """In one forward or two, and what is said after is said as without a cache."""
    model, x = thinker(), words(2, 12)
    x[:, 4:7] = LATENT
    x[1, 10] = LATENT
    full = model(x).logits
    with torch.inference_mode():
        cache = model.cache(rows=2, capacity=12)
        assert apart(torch.cat([model(Inputs(piece, cache=cache)).logits for piece in x.split((8, 4), 1)], 1), full) <= 2e-5
        assert cache.lengths == [12, 12]
    prompts = [x[0, :9].tolist(), x[1].tolist(), x[0, :3].tolist()]
    sampling = Sampling(temperature=0, max_tokens=5, logit_bias={LATENT: -100.0})
    answers = [one.ids for one in generate(model, prompts, sampling)]
    assert answers == generate_naive(model, prompts, sampling)
    longer = [one.ids for one in generate(model, [prompts[0][:4] + [LATENT] * 9 + prompts[0][7:]], sampling)]
    assert longer != answers[:1]


def test_what_cannot_be_thought_is_refused():
    model = thinker()
    with pytest.raises(DataError, match="none may come first"):
        model(torch.tensor([[LATENT, 3]]))
    with pytest.raises(DataError, match="none may come first"):
        model(Inputs(torch.tensor([[5, 3, LATENT]]), segments=torch.tensor([[0, 0, 1]])))
    for change in ({"token": 61}, {"body": BODY.replace(causal=False)}):
        with pytest.raises(ConfigError, match="the body is causal"):
            THINKS.replace(**change)


def test_a_thinker_is_saved_and_adapted(tmp_path):
    model, x = thinker(), words(1, 8)
    x[:, 4:6] = LATENT
    assert validate(Model, with_kind(THINKS.to_dict())) == THINKS
    directory.write(tmp_path / "m", model)
    loaded = directory.read(tmp_path / "m")
    assert loaded.spec == THINKS and torch.equal(loaded.model(x).logits, model(x).logits)
    LoRA(rank=2).apply(model)
    initialize_adapter(model, seed=0)
    assert apart(model(x).logits, loaded.model(x).logits) <= 1e-6


@pytest.mark.concept("X.20", part="models/transformer.py")
@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_shared_block_that_is_run_again_is_the_tied_stack(times):
    """Of k copies with equal weights; the weights' gradient is the sum of theirs. One pass is the plain stack."""
    spec = LOOPED.replace(layers=f"first {times}*(a r) last", shared=("a", "r") if times > 1 else ())
    model, x = looped(spec), tokens(2, 10)
    plain = unrolled(model)
    assert apart(model(x).logits, plain(x).logits) <= 0
    model(x).logits.square().sum().backward()
    plain(x).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        layer = name.split(".")[1]
        if layer in ("1", "2"):
            parts = [plain.get_parameter(name.replace(f"layers.{layer}", f"layers.{int(layer) + 2 * k}")).grad for k in range(times)]
            assert (parameter.grad - sum(parts)).abs().max() < 1e-5 * parameter.grad.std(), name
    once = looped(spec.replace(layers="first a r last", shared=()))
    assert len(list(model.parameters())) == len(list(once.parameters()))


@pytest.mark.concept("X.20", part="models/transformer.py")
@pytest.mark.parametrize("chunks", [(1,) * 10, (4, 1, 5)], ids=str)
def test_each_time_a_shared_block_runs_has_state_of_its_own(chunks):
    model, x = looped(), tokens(2, 10)
    cache = model.cache(rows=2, capacity=10, rollback=2)
    with torch.inference_mode():
        assert apart(torch.cat([model(Inputs(piece, cache=cache)).logits for piece in x.split(chunks, 1)], 1), model(x).logits) <= 2e-5
        cache.drop_last(2)
        assert apart(model(Inputs(x[:, 8:], cache=cache)).logits, model(x).logits[:, 8:]) <= 2e-5
    assert not torch.equal(cache.tensor(1, "k"), cache.tensor(3, "k"))


def test_shared_weights_are_counted_stored_and_drawn_once(tmp_path):
    model, x = initialize(build(LOOPED, device="cpu"), seed=1).eval(), tokens(1, 6)
    once = build(LOOPED.replace(layers="first a r last", shared=()), device="cpu")
    assert count.parameters(model).total == count.parameters(once).total
    segments = torch.zeros(1, 6, dtype=torch.int64)
    assert count.flops(model, segments, kept=3) == count.flops(unrolled(model), segments, kept=3)
    directory.write(tmp_path / "m", model)
    loaded = directory.read(tmp_path / "m")
    assert loaded.spec == LOOPED and torch.equal(loaded.model(x).logits, model(x).logits)
    layers = loaded.model.layers
    assert layers[1].mixer.out.weight is layers[5].mixer.out.weight and layers[0].mixer.out.weight is not layers[1].mixer.out.weight
    half = build(LOOPED, device="cpu", dtype=torch.bfloat16)
    assert half.layers[1].ffn.out.weight is half.layers[3].ffn.out.weight and half.dtype == torch.bfloat16
    plain = LOOPED.with_plain_names()
    assert plain.shared == ("layer1", "layer2") and plain.layers[:3] == ("layer0", "layer1", "layer2")


def test_more_depth_takes_no_more_weights():
    """A stack that ends in its loop runs longer on the same tensors."""
    short = LOOPED.replace(layers="first 2*(a r)", blocks={name: LOOPED.blocks[name] for name in ("first", "a", "r")})
    model, deep = looped(short), build(short.replace(layers="first 4*(a r)"), device="cpu").eval()
    weights = dict(model.named_parameters())
    assert weights.keys() == dict(deep.named_parameters()).keys()
    with torch.no_grad():
        for name, parameter in deep.named_parameters():
            parameter.copy_(weights[name])
    x = tokens(1, 7)
    hidden, step = None, deep.begin(Inputs(x))
    hidden = deep.run(deep.embed(x, step), step, depth=5)
    assert apart(deep.final_norm(hidden), model(x).hidden) <= 2e-5
    assert not torch.allclose(deep(x).logits, model(x).logits)


def test_adapters_of_shared_weights_stay_apart():
    model, x = looped(), tokens(1, 6)
    plain = model(x).logits
    LoRA(rank=2).apply(model)
    initialize_adapter(model, seed=0)
    assert apart(model(x).logits, plain) <= 1e-6
    with pytest.raises(ConfigError, match="share their weights"):
        merge(model, probe=x)


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ConfigError, match="'first' is not that of several layers"):
        LOOPED.replace(shared=("first",))
    with pytest.raises(ConfigError, match="'b' is not that of several layers"):
        LOOPED.replace(shared=("b",))
