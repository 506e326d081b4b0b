"""Heads against their formulas and against transformers; what those that read whole documents must keep; embeddings with types."""

from __future__ import annotations

import json

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers

from tests.assets import asset
from tests.models.test_count import BATCHES, counted, ours
from tests.parity import hf
from tests.tiny import DIM, VOCAB, apart, host, segments_of, tiny, tokens
from trivium.adapt.lora import LoRA, initialize_adapter
from trivium.adapt.passes import Pass, apply_passes
from trivium.core.errors import ConfigError
from trivium.core.spec import validate
from trivium.infer.generate import generate
from trivium.io import directory
from trivium.models.transformer import Transformer, build, initialize, with_head
from trivium.nn.embeddings import Tokens
from trivium.nn.heads import Head, LMHead, MaskedLMHead, MultiToken, NoHead
from trivium.nn.heads_task import Classifier, Project, Reward, Span, Tagger
from trivium.nn.inputs import Inputs
from trivium.nn.norms import Layer
from trivium.nn.positions_absolute import Learned

FORMS = {
    "classifier-last": Classifier(labels=3, pool="last", bias=False),
    "classifier-mean": Classifier(labels=4, pool="mean"),
    "project-first": Project(inner=True),
    "project-last": Project(pool="last", size=9, bias=True),
}
READERS = {name: member.tiny() for name, member in Head.registry.items() if member.tiny().reads == "documents"} | FORMS
every_reader = pytest.mark.parametrize("part", READERS.values(), ids=READERS)
LENGTHS = [[5, 3, 4], [-2, 6, 1], [11, -1], [12]]


def documents(segments: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """The row and the places of each document, in order."""
    return [
        (row, (segments[row] == document).nonzero()[:, 0])
        for row in range(len(segments))
        for document in segments[row].unique().tolist()
        if document >= 0
    ]


def test_these_heads_are_there():
    kinds = {"lm", "masked_lm", "multi_token", "none", "classifier", "tagger", "span", "reward", "project"}
    assert kinds <= set(Head.registry.names()) and set(READERS) - set(FORMS) == {"classifier", "project"}


@every_reader
@pytest.mark.parametrize("causal", [True, False])
def test_each_document_of_a_packed_row_gives_its_own_result(part, causal):
    """And its own gradients: a result and its gradients are those of the document alone."""
    model, x = tiny(host(part, causal=causal)), tokens(4, 12)
    segments = segments_of(LENGTHS, 12)
    together = model(Inputs(x, segments=segments)).logits
    places = documents(segments)
    assert len(together) == len(places) == 7
    weight = torch.randn(together.shape)
    (together * weight).sum().backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    for number, (row, at) in enumerate(places):
        alone = model(x[row, at][None]).logits
        assert apart(together[number], alone[0]) <= 1e-5
        (alone[0] * weight[number]).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert apart(packed[name], parameter.grad) <= 1e-4


@every_reader
def test_documents_are_read_whatever_is_kept(part):
    model, x = tiny(host(part)), tokens(3, 7)
    full = model(x)
    assert len(full.logits) == 3 and full.logits.std() > 0.05
    assert torch.equal(model(x, keep="last").logits, full.logits) and torch.equal(model(x, keep=x > 5).logits, full.logits)
    assert model(x, keep="none").logits is None and torch.equal(model(x, keep="none").hidden, full.hidden)


@every_reader
def test_readers_are_drawn_replayed_and_counted(part):
    spec = host(part)
    assert validate(Transformer, json.loads(spec.canonical())) == spec
    drawn = initialize(build(spec, device="cpu"), seed=3)
    assert drawn(tokens(1, 4)).logits.isfinite().all() and not list(build(spec).buffers())
    model, measured = tiny(spec), tiny(spec)
    segments = segments_of(BATCHES["packed"], 12)
    found = ours(measured, segments)
    assert (found.forward, found.backward) == counted(measured, segments)
    LoRA(rank=2).apply(model)
    initialize_adapter(model, seed=1)
    replayed = [validate(Pass, json.loads(step.canonical())) for step in model.passes]
    twin = apply_passes(build(spec), replayed)
    assert not any(twin.load_state_dict(model.state_dict(), assign=True))
    assert torch.equal(twin.eval()(tokens(1, 6)).logits, model(tokens(1, 6)).logits)


@pytest.mark.parametrize("how", ["first", "last", "mean"])
def test_pooling_is_what_it_says(how):
    model, x = tiny(host(Project(pool=how))), tokens(4, 12)
    segments = segments_of(LENGTHS, 12)
    out = model(Inputs(x, segments=segments))
    for pooled, (row, at) in zip(out.logits, documents(segments), strict=True):
        states = out.hidden[row, at]
        assert apart(pooled, {"first": states[0], "last": states[-1], "mean": states.mean(0)}[how]) <= 1e-5
    whole = model(x)
    assert apart(whole.logits, {"first": whole.hidden[:, 0], "last": whole.hidden[:, -1], "mean": whole.hidden.mean(1)}[how]) <= 1e-5


def test_a_projection_has_length_one():
    model, x = tiny(host(Project(pool="mean", size=9, normalize=True))), tokens(3, 7)
    out = model(x)
    plain = out.hidden.mean(1) @ model.head.out.weight.T
    assert apart(out.logits, plain / plain.norm(dim=-1, keepdim=True)) <= 1e-5


def test_what_a_language_heads_settings_do():
    x = tokens(2, 5)
    for tied in (True, False):
        model = tiny(host(LMHead(tied=tied, bias=True, scale=0.3, softcap=2.0)))
        out = model(x)
        table, bias = (model.embed.weight, model.head.bias) if tied else (model.head.out.weight, model.head.out.bias)
        assert apart(out.logits, 2 * torch.tanh((0.3 * out.hidden @ table.T + bias) / 2)) <= 1e-5
    assert tiny(host(LMHead())).head.table(model.embed) is not None
    for head in (
        LMHead(bias=True),
        LMHead(tied=True, bias=True),
        LMHead(scale=2.0),
        LMHead(softcap=1.0),
        MaskedLMHead(),
        MultiToken(count=2),
    ):
        assert build(host(head)).head.table(model.embed) is None, "it does more than one product"


@pytest.mark.parametrize("tied", [True, False])
def test_a_masked_heads_formula(tied):
    model, x = tiny(host(MaskedLMHead(norm=Layer(eps=1e-3), tied=tied), causal=False)), tokens(2, 5)
    out, head = model(x), model.head
    inner = F.gelu(F.linear(out.hidden, head.transform.dense.weight, head.transform.dense.bias))
    inner = F.layer_norm(inner, (DIM,), head.transform.norm.weight, head.transform.norm.bias, 1e-3)
    table, bias = (model.embed.weight, head.bias) if tied else (head.out.weight, head.out.bias)
    assert apart(out.logits, inner @ table.T + bias) <= 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_multi_token_heads_share_the_state_and_the_table(tied):
    """The first of them is the plain head; each further one changes nothing but its own logits."""
    model, x = tiny(host(MultiToken(count=3, tied=tied))), tokens(2, 5)
    out = model(x)
    table = model.embed.weight if tied else model.head.out.weight
    assert out.logits.shape == (2, 5, 3, VOCAB)
    assert apart(out.logits[:, :, 0], out.hidden @ table.T) <= 1e-5
    for k, ahead in enumerate(model.head.ahead, start=1):
        assert apart(out.logits[:, :, k], (out.hidden + F.silu(out.hidden @ ahead.weight.T)) @ table.T) <= 1e-5
    assert apart(model(x, keep="last").logits, out.logits[:, -1]) <= 1e-5


def test_tags_spans_and_rewards_are_of_each_position():
    x, segments = tokens(2, 5), segments_of([[5], [3]], 5)
    for head, shape in ((Tagger(labels=7), (7,)), (Span(), (2,)), (Reward(), ())):
        model = tiny(host(head))
        out = model(Inputs(x, segments=segments))
        weight, bias = model.head.out.weight, model.head.out.bias
        expected = F.linear(out.hidden, weight, bias)
        assert apart(out.logits, expected if shape else expected[..., 0]) <= 1e-5
        last = model(Inputs(x, segments=segments), keep="last").logits
        assert last.shape == (2, *shape)
        assert apart(last, out.logits[[0, 1], [4, 2]]) <= 1e-5


def test_no_head_gives_no_logits():
    model = tiny(host(NoHead()))
    out = model(tokens(2, 5))
    assert out.logits is None and out.hidden.shape == (2, 5, DIM) and not list(model.head.parameters())


@pytest.mark.concept("T03.02", part="infer/generate.py")
def test_what_is_no_causal_language_model_cannot_generate():
    with pytest.raises(ConfigError, match=r"causal: False, head: masked_lm\) cannot generate"):
        generate(tiny(host(MaskedLMHead(), causal=False)), [[1]])
    with pytest.raises(ConfigError, match=r"causal: True, head: classifier\) cannot generate"):
        generate(tiny(host(Classifier(labels=3))), [[1]])


def test_dropout_of_heads_is_for_training_alone():
    for head in (Classifier(labels=3, dropout=0.5), Tagger(labels=3, dropout=0.5)):
        model, x = tiny(host(head)), tokens(2, 6)
        still = model(x).logits
        assert torch.equal(model(x).logits, still) and not torch.equal(model.train()(x).logits, still)


@pytest.mark.concept("T03.02", part="nn/heads_task.py")
@pytest.mark.parametrize(
    "head", [MaskedLMHead(), Tagger(labels=3), Span(), Classifier(labels=3, inner=True), Project(pool="mean")], ids=str
)
def test_every_output_of_an_encoder_depends_on_every_token_of_its_document(head):
    model = tiny(host(head, causal=False).replace(embed=Tokens(types=2, norm=Layer())))
    segments = segments_of([[4, 3], [-1, 5]], 7)
    embeds = torch.randn(2, 7, DIM, requires_grad=True, generator=torch.Generator().manual_seed(0))
    logits = model(Inputs(embeds=embeds, segments=segments)).logits
    weight = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(1))
    outputs = logits if head.reads == "documents" else logits[segments >= 0]
    places = documents(segments)
    owners = range(3) if head.reads == "documents" else [n for n, (_, at) in enumerate(places) for _ in at]
    assert len(outputs) == len(owners)
    for output, owner in zip(outputs, owners, strict=True):
        (grad,) = torch.autograd.grad((output * weight).sum(), embeds, retain_graph=True)
        row, at = places[owner]
        seen = torch.zeros(2, 7, dtype=torch.bool)
        seen[row, at] = True
        assert ((grad.abs().amax(-1) > 0) == seen).all()


@pytest.mark.concept("T03.02", part="nn/embeddings.py")
def test_an_embedding_with_types_is_bertss():
    config = transformers.BertConfig(vocab_size=61, hidden_size=24, max_position_embeddings=12, type_vocab_size=3, layer_norm_eps=0.01)
    theirs = transformers.models.bert.modeling_bert.BertEmbeddings(config).eval()
    hf.redraw(theirs, seed=0)
    ours = tiny(host(Tokens(types=3, positions=Learned(size=9, offset=3), norm=Layer(eps=0.01))))
    names = {"weight": "word_embeddings.weight", "positions.weight": "position_embeddings.weight"}
    names |= {"types.weight": "token_type_embeddings.weight", "norm.weight": "LayerNorm.weight", "norm.bias": "LayerNorm.bias"}
    ours.embed.load_state_dict({mine: theirs.state_dict()[name] for mine, name in names.items()})
    seen = []
    ours.embed.register_forward_hook(lambda *given: seen.append(given[-1]))
    x, types = tokens(2, 9), tokens(2, 9, vocab=3)
    ours(Inputs(x, types=types))
    ours(x)
    ours(Inputs(x[:, :5], segments=segments_of([[5], [-2, 3]], 5)))
    places = torch.arange(3, 12)[None]
    assert apart(seen[0], theirs(input_ids=x, token_type_ids=types, position_ids=places)) <= 1e-5
    assert apart(seen[1], theirs(input_ids=x, position_ids=places)) <= 1e-5
    assert apart(seen[2][1, 2:], theirs(input_ids=x[1:, 2:5], position_ids=places[:, :3])[0]) <= 1e-5
    with pytest.raises(ConfigError, match="does not tell types of token apart"):
        tiny(host(LMHead()))(Inputs(x, types=types))
    with pytest.raises(ValueError, match=r"types must be \[2, 9\]"):
        Inputs(x, types=types[:, :4])


def test_types_are_given_with_each_cached_step():
    model, x, types = tiny(host(Tokens(types=2, norm=Layer()))), tokens(2, 8), tokens(2, 8, vocab=2)
    cache = model.cache(rows=2, capacity=8)
    with torch.inference_mode():
        pieces = [model(Inputs(x[:, a:b], types=types[:, a:b], cache=cache)).logits for a, b in ((0, 5), (5, 6), (6, 8))]
    assert apart(torch.cat(pieces, 1), model(Inputs(x, types=types)).logits) <= 2e-5
    assert not torch.allclose(model(x).logits, model(Inputs(x, types=types)).logits)


CAUSAL = {
    "gpt2": (
        transformers.GPT2ForSequenceClassification,
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=20, layer_norm_epsilon=0.01),
    ),
    "llama": (
        transformers.LlamaForSequenceClassification,
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            rms_norm_eps=0.01,
        ),
    ),
}  # fmt: skip


@pytest.mark.concept("X.62", part="nn/heads_task.py")
@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_model_with_a_classifier_is_transformers(name, tmp_path):
    """A language model read from its files, its head replaced; rows of other lengths, padded on the right and on the left."""
    classifier, language, config = CAUSAL[name]
    config.num_labels, config.pad_token_id = 5, 60
    theirs = classifier._from_config(config, attn_implementation="eager").eval()
    hf.redraw(theirs, seed=0)
    base = language._from_config(config, attn_implementation="eager")
    body = base.base_model_prefix
    setattr(base, body, getattr(theirs, body))
    base.tie_weights()
    model = with_head(directory.read(hf.save(base, tmp_path)).model, Classifier(labels=5, pool="last", bias=False), seed=1)
    assert model.spec.head == Classifier(labels=5, pool="last", bias=False)
    model.head.load_state_dict({"out.weight": theirs.score.weight})
    x = tokens(3, 9, vocab=60)
    for lengths in ([[9], [4], [7]], [[9], [-5, 4], [-2, 7]]):
        segments = segments_of(lengths, 9)
        there = segments >= 0
        given = x.masked_fill(~there, 60)
        places = (there.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            expected = theirs(input_ids=given, attention_mask=there.long(), position_ids=places).logits
            found = model(Inputs(given, segments=segments)).logits
        assert expected.std() > 0.5
        assert apart(found, expected) <= 1e-5
    directory.write(tmp_path / "ours", model)
    assert torch.equal(directory.read(tmp_path / "ours").model(Inputs(given, segments=segments)).logits, found)


def test_a_new_head_is_drawn_and_the_rest_stays():
    model = tiny(host(LMHead()))
    before = {name: p.clone() for name, p in model.named_parameters() if not name.startswith("head")}
    model = with_head(model, Classifier(labels=3, inner=True), seed=1)
    after = dict(model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (after["head.out.bias"] == 0).all() and 0 < after["head.pooler.dense.weight"].std() < 0.05
    assert not torch.equal(with_head(model, Classifier(labels=3), seed=2).head.out.weight, after["head.out.weight"])
    LoRA(rank=2).apply(model)
    with pytest.raises(ConfigError, match="before passes"):
        with_head(model, LMHead(), seed=1)


@pytest.mark.concept("T03.02", part="io/hf/bert.py")
def test_a_real_encoder_embeds_sentences_as_transformers_does():
    path = asset("minilm")
    theirs = transformers.BertModel.from_pretrained(path, attn_implementation="eager").eval()
    model = directory.read(path).model
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_padding()
    sentences = ["A cat sits on the mat.", "On the mat there is a cat.", "The stock market fell sharply on Monday morning."]
    rows = [tokenizer.encode(text).ids for text in sentences]
    width = max(map(len, rows))
    there = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    x = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    inputs = Inputs(x, segments=there.long() - 1)
    with torch.inference_mode():
        out, expected = model(inputs), theirs(input_ids=x, attention_mask=there.long())
        assert apart(out.logits, expected.pooler_output) <= 1e-5
        assert apart(out.hidden[there], expected.last_hidden_state[there]) <= 1e-4
        found = with_head(model, Project(pool="mean", normalize=True), seed=0)(inputs).logits
    mean = (expected.last_hidden_state * there[..., None]).sum(1) / there.sum(1, keepdim=True)
    assert apart(found, F.normalize(mean, dim=-1)) <= 1e-5
    likeness = found @ found.T
    assert likeness[0, 1] > 0.8 > 0.3 > likeness[0, 2]
