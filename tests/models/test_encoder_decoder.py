"""Encoder and decoder as one model: what the spec says, what the source does, and that the cache reads it once."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import apart, redraw, segments_of, tokens
from trivium.adapt.lora import LoRA, initialize_adapter
from trivium.core.errors import ConfigError, DataError
from trivium.core.spec import validate
from trivium.infer.generate import generate, generate_naive
from trivium.infer.sampling import Sampling
from trivium.io import directory
from trivium.models.block import Block
from trivium.models.encoder_decoder import EncoderDecoder, EncoderDecoderModel
from trivium.models.model import Model, with_kind
from trivium.models.transformer import Transformer, build, initialize
from trivium.nn.attention import Attention
from trivium.nn.cross import CrossAttention
from trivium.nn.feedforward import MLP
from trivium.nn.heads import LMHead, NoHead
from trivium.nn.inputs import Inputs
from trivium.nn.positions import Rope
from trivium.recipes.load import load

HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 6}
MIX, FFN = Attention(**HEADS, position=Rope(base=50.0)), MLP(hidden=28)
ENCODER = Transformer(dim=24, vocab=61, layers="3*read", blocks={"read": Block(mixer=MIX, ffn=FFN)}, head=NoHead(), causal=False)
DECODER = Transformer(
    dim=24,
    vocab=61,
    layers="write plain",
    blocks={"write": Block(mixer=MIX, cross=CrossAttention(**HEADS), ffn=FFN), "plain": Block(mixer=MIX, ffn=FFN)},
    head=LMHead(tied=True, bias=True),
    context=30,
)
SPEC = EncoderDecoder(encoder=ENCODER, decoder=DECODER)
APART = EncoderDecoder(
    encoder=ENCODER.replace(dim=20, vocab=43),
    decoder=DECODER.replace(
        blocks={**DECODER.blocks, "write": DECODER.blocks["write"].replace(cross=CrossAttention(**HEADS, memory_dim=20))}
    ),
    shared=False,
)


def tiny(spec: EncoderDecoder = SPEC) -> EncoderDecoderModel:
    model = redraw(build(spec, device="cpu")).eval()
    assert isinstance(model, EncoderDecoderModel)
    return model


def test_the_spec_is_its_json():
    data = with_kind(SPEC.to_dict())
    assert data["kind"] == "encoder_decoder" and "kind" not in data["encoder"]
    again = validate(Model, data)
    assert again == SPEC and again.digest() == SPEC.digest()
    assert validate(Model, with_kind(ENCODER.to_dict())) == ENCODER
    assert validate(Model, ENCODER.to_dict(defaults=True)) == ENCODER


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encoder": ENCODER.replace(causal=True)}, "the encoder has causal: false"),
        ({"encoder": ENCODER.replace(head=LMHead())}, "head: none"),
        ({"decoder": DECODER.replace(causal=False)}, "the decoder has causal: true"),
        ({"decoder": DECODER.replace(layers="plain", blocks={"plain": DECODER.blocks["plain"]})}, "has a cross"),
        ({"encoder": ENCODER.replace(dim=20)}, "memory_dim 24, the encoder's dim is 20"),
        ({"encoder": ENCODER.replace(vocab=60)}, "one vocab and dim"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        SPEC.replace(**change)


@pytest.mark.parametrize("spec", [SPEC, APART], ids=["shared", "apart"])
def test_a_source_is_the_memory_that_its_encoding_is(spec):
    model, source, x = tiny(spec), tokens(2, 7, vocab=43), tokens(2, 5, seed=1)
    segments = segments_of([[7], [4]], 7)
    read = Inputs(source, segments=segments)
    memory = model.encode(read)
    assert memory.shape == (2, 7, spec.encoder.dim)
    out = model(Inputs(x, source=read))
    assert out.logits.shape == (2, 5, 61) and out.logits.std() > 0.1
    assert torch.equal(out.logits, model(Inputs(x, memory=memory, memory_segments=segments)).logits)
    assert apart(out.logits[1:], model(Inputs(x[1:], source=Inputs(source[1:, :4]))).logits) <= 2e-5
    weighed = model(Inputs(x, source=read), weights=True).aux
    assert weighed.source is not None and len(weighed.source.weights) == 3 and set(weighed.cross) == {0}


@pytest.mark.concept("T03.03", part="models/encoder_decoder.py")
def test_every_output_reads_the_whole_source_and_only_the_past():
    model, source = tiny(), tokens(2, 7)
    segments = segments_of([[7], [4]], 7)
    embedded = model.encoder.embed.weight.detach()[source].requires_grad_()
    written = model.decoder.embed.weight.detach()[tokens(2, 5, seed=1)].requires_grad_()
    logits = model(Inputs(embeds=written, source=Inputs(embeds=embedded, segments=segments))).logits
    for t in range(5):
        there, own = torch.autograd.grad(logits[:, t].square().sum(), [embedded, written], retain_graph=True)
        assert ((there.abs().sum(-1) > 0) == (segments >= 0)).all()
        assert (own[:, t + 1 :] == 0).all() and (own[:, : t + 1].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("chunks", [(1,) * 6, (4, 1, 1)], ids=str)
def test_cached_steps_equal_the_full_forward(chunks):
    model, x, read = tiny(), tokens(2, 6, seed=1), Inputs(tokens(2, 7), segments=segments_of([[7], [4]], 7))
    full, cache = model(Inputs(x, source=read)).logits, model.cache(rows=2, capacity=6)
    with torch.inference_mode():
        for i, (piece, expected) in enumerate(zip(x.split(chunks, 1), full.split(chunks, 1), strict=True)):
            assert apart(model(Inputs(piece, source=read if i == 0 else None, cache=cache)).logits, expected) <= 2e-5


@pytest.mark.parametrize("spec", [SPEC, APART], ids=["shared", "apart"])
@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0, max_tokens=9), Sampling(temperature=0.8, seed=3, max_tokens=9)], ids=["greedy", "drawn"]
)
def test_generation_equals_the_naive_one(spec, sampling):
    """Rows of other sources, prompts and lengths, a prompt longer than a chunk, ends that come early."""
    model = tiny(spec)
    sources = [tokens(1, n, seed=n, vocab=43)[0].tolist() for n in (7, 2, 5, 1)]
    prompts = [[3], [3, 9, 4], [3], [3, 5]]
    expected = generate_naive(model, prompts, sampling, sources=sources, stops=[7, 20])
    for settings in ({}, {"chunk": 2}, {"batch": 3}):
        found = generate(model, prompts, sampling, sources=sources, stops=[7, 20], **settings)
        assert [completion.ids for completion in found] == expected
    assert len({tuple(ids) for ids in expected}) == 4
    assert generate_naive(model, prompts, sampling, sources=sources[::-1], stops=[7, 20]) != expected


@pytest.mark.concept("T01.04", part="nn/cross.py")
def test_generation_reads_the_source_once():
    """The encoder runs once, and keys and values of its output are computed once, however many tokens are written."""
    model, calls = tiny(), []
    for name, module in (("encoder", model.encoder), ("k", model.decoder.layers[0].cross.memory.k)):
        module.register_forward_hook(lambda *given, name=name: calls.append(name))
    generate(model, [[3], [3, 4]], Sampling(temperature=0, max_tokens=8), sources=[[1, 2], [5]])
    assert calls == ["encoder", "k"]


def test_sources_that_are_missing_or_odd_are_refused():
    model, greedy = tiny(), Sampling(temperature=0, max_tokens=2)
    with pytest.raises(ConfigError, match="reads a source"):
        generate(model, [[3]], greedy)
    with pytest.raises(ConfigError, match="has no encoder"):
        generate(redraw(build(ENCODER.replace(head=LMHead()), device="cpu")), [[3]], greedy, sources=[[1]])
    with pytest.raises(ConfigError, match="2 prompts, but 1 sources"):
        generate(model, [[3], [3]], greedy, sources=[[1]])
    with pytest.raises(DataError, match=r"sources\[0\] is empty"):
        generate(model, [[3]], greedy, sources=[[]])
    with pytest.raises(DataError, match=r"sources\[0\] holds token 50, outside the model's vocabulary of 43"):
        generate(tiny(APART), [[3]], greedy, sources=[[50]])
    with pytest.raises(ConfigError, match="no encoder that could read a source"):
        model.decoder(Inputs(tokens(1, 2), source=Inputs(tokens(1, 2))))
    with pytest.raises(ValueError, match="a source of 1 rows"):
        Inputs(tokens(1, 2), source=Inputs(tokens(2, 2)))


def test_a_shared_table_is_one_tensor_with_the_sum_of_all_gradients():
    model = tiny()
    assert model.decoder.embed.weight is model.encoder.embed.weight
    assert "decoder.embed.weight" not in dict(model.named_parameters())
    x, read = tokens(2, 5, seed=1), Inputs(tokens(2, 7))
    model(Inputs(x, source=read)).logits.square().sum().backward()
    apart = build(SPEC.replace(shared=False), device="cpu").eval()
    apart.load_state_dict(model.state_dict())
    apart(Inputs(x, source=read)).logits.square().sum().backward()
    grads = apart.encoder.embed.weight.grad, apart.decoder.embed.weight.grad
    torch.testing.assert_close(model.encoder.embed.weight.grad, grads[0] + grads[1], rtol=1e-5, atol=1e-4)
    assert all(grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize("spec", [SPEC, APART], ids=["shared", "apart"])
def test_drawn_saved_and_read_again(spec, tmp_path):
    model = initialize(build(spec, device="cpu"), seed=3)
    twin = initialize(build(spec, device="cpu"), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    names = dict(model.named_parameters())
    assert not torch.equal(names["encoder.layers.0.mixer.inp.q.weight"][:20, :20], names["decoder.layers.0.mixer.inp.q.weight"][:20, :20])
    assert names["decoder.layers.0.cross.out.weight"].std() < 0.75 * names["decoder.layers.0.cross.inp.q.weight"].std()
    redraw(model)
    directory.write(tmp_path / "plain", model)
    again = directory.read(tmp_path / "plain")
    assert again.spec == spec
    assert (again.model.decoder.embed.weight is again.model.encoder.embed.weight) == spec.shared
    inputs = Inputs(tokens(1, 4), source=Inputs(tokens(1, 5, vocab=43)))
    assert torch.equal(again.model(inputs).logits, model(inputs).logits)


def test_an_adapter_is_a_pass_over_both_stacks(tmp_path):
    model = tiny()
    LoRA(rank=2).apply(model)
    initialize_adapter(model, seed=1)
    touched = {name.split(".lora.")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {"encoder.layers.2.ffn.out", "decoder.layers.0.cross.memory.k"} <= touched and not any("head" in name for name in touched)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    directory.write(tmp_path / "adapted", model)
    inputs = Inputs(tokens(1, 4), source=Inputs(tokens(1, 5)))
    assert torch.equal(directory.read(tmp_path / "adapted").model(inputs).logits, model.eval()(inputs).logits)


def test_commands_for_one_stack_say_so(tmp_path):
    """And how its texts are made from Python."""
    directory.write(tmp_path / "model", tiny())
    with pytest.raises(ConfigError, match=r"kind 'encoder_decoder'.* From Python: model = .*, sources=\[IDS\]\)"):
        load(tmp_path / "model")
    assert len(generate(directory.read(tmp_path / "model").model, [[3]], sources=[[5, 6, 7]])[0].ids) == 29  # up to the context
