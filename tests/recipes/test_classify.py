"""`classify`: what is trained, what is saved, what others read of it, what is measured, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from tests.parity import hf
from tests.recipes.toys import Trivium, bundle
from trivium.adapt.adapter import Adapter
from trivium.checks.metrics import Term
from trivium.core.errors import ConfigError, TriviumError
from trivium.core.spec import validate
from trivium.data.batches import ordered
from trivium.data.classes import prepare_classes
from trivium.evaluate import results
from trivium.evaluate.classes import Classification, scores
from trivium.evaluate.task import Sample
from trivium.nn.heads_task import Classifier
from trivium.recipes.classify import Classify, classify, names_of, plan, predict, with_class_head
from trivium.recipes.load import load
from trivium.train.classes import Classes

WORDS = {
    "spam": ("prize", "free", "loan", "win"),
    "ham": ("lunch", "report", "train", "home"),
    "news": ("vote", "storm", "court", "market"),
}
TEXTS = [f"{start} the {word} {end}" for start in ("Now", "See", "About") for end in ("today", "again") for word in sum(WORDS.values(), ())]

HELD = TEXTS[4::5]


def label_of(text: str) -> str:
    return next(name for name, words in WORDS.items() if text.split()[2] in words)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": label_of(text)}) + "\n" for text in texts))
    return path


@pytest.fixture
def rows(tmp_path: Path) -> tuple[Path, Path]:
    """Training rows and held-out ones, other sentences with the same words."""
    return write(tmp_path / "train.jsonl", [text for text in TEXTS if text not in HELD]), write(tmp_path / "test.jsonl", HELD)


def config(model: Path, tmp_path: Path, rows: tuple[Path, Path], *, lr: float = 5e-4, **more: object) -> Classify:
    train = {"steps": 2, "rows": 4, "precision": "fp32", "track": []} | more.pop("train", {})
    given = {"model": str(model), "data": [str(rows[0])], "validation": [str(rows[1])], "out": str(tmp_path / "run"), "length": 32}
    return validate(Classify, {**given, "train": train, "optim": {"kind": "adamw", "lr": lr}, **more})


@pytest.mark.parametrize("tune", ["head", "last", "all"])
def test_what_is_tuned_moves_and_transformers_agrees(toy: Path, tmp_path: Path, rows, tune: str):
    run = classify(config(toy, tmp_path, rows, tune=tune, lr=1e-2))
    before, after = dict(load(toy).model.named_parameters()), load(run.path)
    assert after.spec.head == Classifier(labels=3, pool="last", bias=False) and names_of(after) == ("ham", "news", "spam")
    for name, parameter in after.model.named_parameters():
        free = {"head": ("head.",), "last": ("head.", "layers.1.", "final_norm."), "all": ("",)}[tune]
        if not name.startswith("head."):
            assert torch.equal(parameter, before[name]) != name.startswith(free), name
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(run.path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.path, padding_side="right")
    texts = TEXTS[:5] + ["A much longer text about the market, and nothing else at all"]
    with torch.no_grad():
        chances = theirs(**tokenizer(texts, return_tensors="pt", padding=True)).logits.softmax(-1)
    assert theirs.config.id2label == {0: "ham", 1: "news", 2: "spam"}
    for one, row in zip(predict(run.path, texts), chances.tolist(), strict=True):
        assert one.probabilities == pytest.approx(dict(zip(("ham", "news", "spam"), row, strict=True)), abs=1e-5)
        assert one.label == max(one.probabilities, key=one.probabilities.__getitem__) and one.probability == max(one.probabilities.values())


def test_texts_that_end_as_rows_are_padded_are_read_alike(toy: Path, tmp_path: Path):
    """Many chat models pad with what ends a turn, which transformers' classifiers do not read."""
    given = load(toy)
    stop = min(given.prompt.stops)
    given.tokenizer.pad = stop
    given.rest = {**given.rest, "pad_token_id": stop}
    data = tmp_path / "talks.jsonl"
    said = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}] for text in TEXTS[:8]]
    data.write_text("".join(json.dumps({"messages": talk, "label": label_of(talk[0]["content"])}) + "\n" for talk in said))
    run = classify(config(toy, tmp_path, (data, data), validation=[]), bundle=given)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(run.path).eval()
    ids = [load(run.path).prompt.rows(talk)[0].ids for talk in said[:3]]
    batch = transformers.AutoTokenizer.from_pretrained(run.path, padding_side="right").pad({"input_ids": ids}, return_tensors="pt")
    with torch.no_grad():
        chances = theirs(**batch).logits.softmax(-1)
    ours = [list(one.probabilities.values()) for one in predict(run.path, said[:3])]
    torch.testing.assert_close(chances, torch.tensor(ours), rtol=1e-4, atol=1e-5)
    assert theirs.config.pad_token_id not in given.prompt.stops


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt", "bottleneck"])
def test_an_adapter_beside_the_head(toy: Path, tmp_path: Path, rows, kind: str):
    """Prompt and prefix methods with a head for classes are P-tuning v2's."""
    asked = config(toy, tmp_path, rows, adapter=Adapter.registry.get(kind).tiny().to_dict())
    run = classify(asked)
    after, texts = load(run.path), TEXTS[:4]
    trained = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert "head.out.weight" in trained and len(trained) > 1
    expected = predict(after, texts)
    bare = load(toy).model
    assert all(torch.equal(after.model.get_parameter(name), bare.get_parameter(name)) for name in ("embed.weight", "final_norm.weight"))
    assert expected == predict(run.path, texts)
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    samples = [json.loads(line) for line in (tmp_path / "run" / "result.samples.jsonl").read_text().splitlines()]
    again = predict(run.path, [json.loads(line)["text"] for line in rows[1].read_text().splitlines()])
    assert [sample["shown"]["predicted"] for sample in samples] == [one.label for one in again]
    assert found["metrics"]["accuracy"]["rows"] == len(samples)


@pytest.mark.concept("X.62", part="recipes/classify.py")
def test_classes_are_learned_and_measured(toy: Path, tmp_path: Path, rows):
    """Held-out rows from chance to all right; every figure of the result is that of its samples, counted here by hand."""
    run = classify(config(toy, tmp_path, rows, tune="all", lr=3e-3, train={"steps": 45, "rows": 8}))
    result, samples = results.load(tmp_path / "run" / "result.json")
    pairs = [(sample.shown["label"], sample.shown["predicted"]) for sample in samples]
    names = result.report["names"]
    table = np.array([[pairs.count((a, b)) for b in names] for a in names])
    assert np.array_equal(result.report["confusion"], table) and table.sum() == len(HELD)
    accuracy = table.trace() / table.sum()
    assert run.metrics["accuracy"] == result.metrics["accuracy"].value == pytest.approx(accuracy) and accuracy > 0.95
    assert run.metrics["validation.accuracy"] == pytest.approx(accuracy)
    assert result.metrics["accuracy"].low <= accuracy <= result.metrics["accuracy"].high


def test_figures_are_those_of_a_confusion_table():
    """By hand, for 3 classes of which one is never right; macro F1's interval holds it."""
    task = Classification(data=("x",), names=("a", "b", "c"))
    golds, picks = [0] * 6 + [1] * 5 + [2] * 4, [0, 0, 0, 0, 1, 2, 1, 1, 1, 0, 0, 0, 1, 1, 0]
    samples = [
        Sample(str(i), (), {"accuracy": Term(float(g == p), 1.0), **task.terms(g, p)}, {"label": "abc"[g], "predicted": "abc"[p]})
        for i, (g, p) in enumerate(zip(golds, picks, strict=True))
    ]
    report, found = task.report(samples), results.summarize(samples, task.metrics())
    assert report["confusion"] == [[4, 1, 1], [2, 3, 0], [2, 2, 0]]
    f1 = [2 * 4 / (6 + 8), 2 * 3 / (5 + 6), 0.0]
    assert [found[f"f1 {name}"].value for name in "abc"] == pytest.approx(f1) and found["accuracy"].value == pytest.approx(7 / 15)
    macro = report["macro_f1"]
    assert macro["value"] == pytest.approx(sum(f1) / 3) and macro["low"] < macro["value"] < macro["high"]
    assert report["by_class"]["b"] == {"precision": 0.5, "recall": 0.6, "rows": 5}


def test_packed_texts_are_scored_as_alone():
    """The loss of texts in one row, with attention and positions of their own, is that of each by itself."""
    found = with_class_head(bundle(), ("ham", "news", "spam"), seed=0)
    rows = [{"text": text, "label": label_of(text)} for text in TEXTS[:9]]
    terms, banks = [], []
    for packing in ("none", "best_fit"):
        bank = prepare_classes(rows, found.prompt, names=("ham", "news", "spam"), length=64, packing=packing)
        parts = [Classes().terms(found.model, batch) for batch in ordered(bank, rows=4)]
        terms.append({name: sum(float(part[name].detach()) for part in parts) for name in parts[0]})
        banks.append(len(bank.bins))
    assert banks[1] < banks[0] == 9 and terms[0] == pytest.approx(terms[1], rel=1e-5)
    alone = scores(found.model, [bank.row(row)[0].tolist() for row in range(9)], classes=3)
    labels = torch.tensor(bank.values["class"]).long()
    assert float(torch.nn.functional.cross_entropy(alone, labels, reduction="sum")) == pytest.approx(terms[1]["loss"], rel=1e-5)


def test_a_finished_run_is_gone_on_with_and_another_is_not(toy: Path, tmp_path: Path, rows):
    asked = config(toy, tmp_path, rows)
    first = classify(asked)
    weights = {name: parameter.clone() for name, parameter in first.model.named_parameters()}
    again = classify(asked)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in again.model.named_parameters())
    with pytest.raises(ConfigError, match="belongs to another run"):
        classify(asked.replace(tune="head"))


def test_a_classifier_goes_on_with_its_own_classes_or_gets_others(toy: Path, tmp_path: Path, rows):
    first = classify(config(toy, tmp_path, rows, names=["spam", "ham", "news"]))
    assert names_of(load(first.path)) == ("spam", "ham", "news")
    again = classify(config(first.path, tmp_path, rows, out=str(tmp_path / "again"), tune="head", lr=1e-9))
    close = dict(rtol=0, atol=1e-6)
    torch.testing.assert_close(load(again.path).model.head.out.weight, load(first.path).model.head.out.weight, **close)
    other = classify(config(first.path, tmp_path, rows, out=str(tmp_path / "other"), names=["ham", "news", "spam", "other"]))
    assert load(other.path).spec.head.labels == 4


def bert(path: Path) -> Path:
    """A tiny BERT as it comes from pretraining, with a pooler and no classes."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word for text in TEXTS for word in text.split()})]
    engine = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="[UNK]"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.decoder = decoders.WordPiece()
    engine.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=engine, **special).save_pretrained(path)
    shape = {"vocab_size": len(vocab), "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**shape, max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = transformers.BertModel(config).eval()
    hf.redraw(model, seed=0)
    model.save_pretrained(path)
    return path


def test_an_encoder_keeps_its_pooler(tmp_path: Path, rows):
    path = bert(tmp_path / "bert")
    run = classify(config(path, tmp_path, rows, tune="head", lr=1e-2, train={"steps": 1}))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(run.path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.path)
    assert type(theirs).__name__ == "BertForSequenceClassification"
    with torch.no_grad():
        chances = theirs(**tokenizer(TEXTS[:6], return_tensors="pt", padding=True)).logits.softmax(-1)
    for one, row in zip(predict(run.path, TEXTS[:6]), chances.tolist(), strict=True):
        assert list(one.probabilities.values()) == pytest.approx(row, abs=1e-5)
    before, after = load(path).model, load(run.path).model
    assert (after.head.pooler.dense.weight - before.head.pooler.dense.weight).abs().max() < 0.011, "moved by one step, not drawn anew"
    assert after.spec.head.pool == "first" and not after.spec.causal
    long = TEXTS[0].split() * 9
    (cut,) = predict(run.path, [" ".join(long)], length=32)
    ids = [2, *(tokenizer.convert_tokens_to_ids(long))[:30], 3]
    with torch.no_grad():
        assert list(cut.probabilities.values()) == pytest.approx(theirs(torch.tensor([ids])).logits.softmax(-1)[0].tolist(), abs=1e-5)
    with pytest.raises(TriviumError, match="the longest text has 38 tokens, beyond the 32"):
        predict(run.path, [" ".join(long)])


def test_conversations_and_tables(toy: Path, tmp_path: Path):
    """Messages are read as they are served; a table's cells may hold commas and line breaks."""
    talks, table = tmp_path / "talks.jsonl", tmp_path / "table.csv"
    said = [{"role": "user", "content": "Hello"}]
    talks.write_text("".join(json.dumps({"messages": said, "label": n % 2}) + "\n" for n in range(4)))
    run = classify(config(toy, tmp_path, (talks, talks), names=["no", "yes"]))
    bundle = load(run.path)
    (found,) = predict(bundle, [said])
    logits = bundle.model(torch.tensor([bundle.prompt.generation(said)])).logits
    assert list(found.probabilities.values()) == pytest.approx(logits.softmax(-1)[0].tolist(), abs=1e-5)
    table.write_text('text,label\n"a, b",yes\n"two\nlines",no\nplain,1\n')
    planned = plan(config(toy, tmp_path, (table, table), names=["no", "yes"]))
    assert planned["data"] == {"no": 1, "yes": 2} and planned["needs"]["trained"] < planned["needs"]["parameters"]


@pytest.mark.parametrize(
    "lines, more, message",
    [
        (['{"text": "a", "label": "x"}'] * 3, {}, "holds only 'x'"),
        (['{"text": "a", "label": "x"}'] * 3, {"names": ["x", "y"]}, "all of one class; these have none: y"),
        (['{"text": " ", "label": "x"}', '{"text": "b", "label": "y"}'], {}, r"train.jsonl:1: its 'text' is empty"),
        (['{"text": "a", "label": "x"}', '{"label": "y"}'], {}, r"train.jsonl:2: it has no 'text'"),
        (['{"text": "a", "label": "x"}', '{"text": "b"}'], {}, r"train.jsonl:2: it has no 'label'"),
        (['{"text": "a", "label": 0.5}'], {}, "neither a word nor a whole number"),
        (['{"text": "a", "label": "x"}', '{"text": "b", "label": "z"}'], {"names": ["x", "y"]}, r"train.jsonl:2: unknown label 'z'"),
        (['{"text": "a", "label": 0}', '{"text": "b", "label": 2}'], {"names": ["x", "y"]}, r"train.jsonl:2: unknown label '2'"),
        (['{"text": "a", "label": "x"}', '{"text": "b", "label": "y"}'], {"names": ["x", "x"]}, "each named once"),
        (['{"text": "a", "label": "x"}', '{"text": "b", "label": "y"}'], {"objective": {"kind": "next_token"}}, "trains no classifier"),
        ([json.dumps({"text": "word " * 40, "label": label}) for label in "xy"], {}, "2 of 2 rows are longer than 32 tokens"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_learned(toy: Path, tmp_path: Path, lines, more, message):
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(TriviumError, match=message):
        classify(config(toy, tmp_path, (tmp_path / "train.jsonl", tmp_path / "train.jsonl"), **more))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command(toy: Path, trivium: Trivium, rows):
    flags = ("--train.steps", "2", "--train.rows", "4", "--length", "32", "--out", "runs/a")
    planned = trivium.ok("classify", "train", "--model", toy, "--data", rows[0], *flags, "--dry-run", "--json").json
    assert sum(planned["data"].values()) == len(TEXTS) - len(HELD) and planned["config"]["tune"] == "last"
    done = trivium.ok("classify", "train", "--model", toy, "--data", rows[0], "--validation", rows[1], *flags, "--json").json
    assert done["path"] == "runs/a/model" and 0 <= done["metrics"]["accuracy"] <= 1
    said = trivium.ok("classify", "predict", done["path"], "See the prize", "--json").json
    assert sum(said["probabilities"].values()) == pytest.approx(1)
    listed = trivium.ok("classify", "predict", done["path"], "--data", rows[1], "--json").json
    assert [one["label"] for one in listed] == [one.label for one in predict("runs/a/model", HELD)]
    measured = trivium.ok("classify", "predict", done["path"], "--data", rows[1], "--out", "again.json", "--json").json
    assert measured["metrics"]["accuracy"]["value"] == done["metrics"]["accuracy"]
    assert "unknown label 'odd'" in trivium.refused("classify", "predict", done["path"], "--data", odd(rows[1]), "--out", "odd.json")
    assert "not one for classes" in trivium.refused("classify", "predict", toy, "See the prize")
    assert "is empty" in trivium.refused("classify", "predict", done["path"], " ")
    assert "give a text, or rows" in trivium.refused("classify", "predict", done["path"], status=2)


def odd(path: Path) -> Path:
    path.write_text(path.read_text() + '{"text": "a", "label": "odd"}\n')
    return path


def test_rows_with_labels_are_not_trained_on_as_text(toy: Path, tmp_path: Path, rows, trivium: Trivium):
    error = trivium.refused("sft", "--model", toy, "--data", rows[0])
    assert "training of classifiers" in error
