"""Pretraining at toy size: a model of one's own that others can load; interrupted equals uninterrupted; what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import trivium.train.loop as loop
from tests.tiny import tokens
from trivium.core import config as configs
from trivium.core.spec import validate
from trivium.io import files
from trivium.models.presets import llama
from trivium.recipes.from_scratch import FromScratch, from_scratch
from trivium.recipes.load import load
from trivium.recipes.pretrain import Pretrain, plan, pretrain
from trivium.text import bpe
from trivium.train import history
from trivium.train.loop import TrainConfig

TEXTS = ["def add(a, b):\n    return a + b\n" * 6, "for i in range(10):\n    print(i)\n" * 6, "x = [1, 2, 3]\n" * 12]
SHAPE = llama(dim=32, layers=2, heads=4, kv_heads=2, hidden=64, vocab=320, tied=True, context=128)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A tokenizer and text."""
    path = tmp_path_factory.mktemp("pretrain")
    (path / "tok").mkdir()
    bpe.train(TEXTS, size=300).tokenizer.save(path / "tok")
    for name in ("train", "held-out"):
        files.write_json(path / f"{name}.json", {})
        (path / f"{name}.jsonl").write_text("".join(f'{{"text": {files.json.dumps(text)}}}\n' for text in TEXTS))
    return path


def config(room, out, **changes) -> Pretrain:
    train = TrainConfig(rows=4, steps=6, validate_every=3, save_every=2, precision="fp32")
    data = (str(room / "train.jsonl"),)
    base = Pretrain(
        preset=None,
        model=SHAPE,
        tokenizer=str(room / "tok"),
        data=data,
        validation=data,
        out=str(out),
        length=32,
        train=train,
        samples=("def",),
    )
    return base.replace(**changes)


def test_a_new_model_learns_is_kept_and_loads_elsewhere(room, tmp_path):
    run = pretrain(config(room, tmp_path / "run"))
    rows = history.read(tmp_path / "run")
    assert 0 < run.metrics["mfu"] < 1 and run.path == tmp_path / "run" / "model" and rows[-1]["loss"] < rows[0]["loss"] - 0.1
    assert rows[5]["validation"]["loss"] < rows[2]["validation"]["loss"], "validated twice, better the second time"
    ours, best = load(run.path), load(tmp_path / "run" / "best")
    assert ours.family == "llama" and ours.lineage[-1]["step"] == "pretrain"
    x = tokens(1, 9, vocab=300)
    assert torch.equal(ours.model(x).logits, best.model(x).logits), "the last model was the best one"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(run.path)(x).logits
    torch.testing.assert_close(ours.model(x).logits, theirs, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(run.path)("def add").input_ids == ours.tokenizer.encode("def add")


@pytest.mark.slow
def test_interrupted_is_uninterrupted(room, tmp_path, monkeypatch):
    whole = pretrain(config(room, tmp_path / "whole"))
    real, calls = loop._Update.__call__, []

    def stop_in_the_fourth(self, step):
        calls.append(step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(loop._Update, "__call__", stop_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config(room, tmp_path / "stopped"))
    monkeypatch.undo()
    again = pretrain(config(room, tmp_path / "stopped"))
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [row["loss"] for row in history.read(tmp_path / "whole")] == [row["loss"] for row in history.read(tmp_path / "stopped")]


def test_what_cannot_be_is_refused_before_the_first_step(room, tmp_path):
    small = SHAPE.replace(vocab=100)
    for changes, message in (
        ({"preset": "llama-5m"}, "either a preset or a model"),
        ({"model": None}, "either a preset or a model"),
        ({"model": small}, "100 rows for a tokenizer of"),
        ({"preset": "llama-5b", "model": None}, "unknown preset 'llama-5b'; did you mean 'llama-5m'"),
        ({"tokenizer": str(tmp_path / "none")}, "none"),
        ({"data": (str(tmp_path / "none.jsonl"),)}, "none.jsonl"),
    ):
        with pytest.raises(ValueError, match=message):
            pretrain(config(room, tmp_path / "run", **changes))
    with pytest.raises(ValueError, match=r"model\.dim"):
        validate(Pretrain, {"tokenizer": "t", "data": ["d"], "model": {**SHAPE.to_dict(), "dim": 0}})
    assert plan(config(room, tmp_path / "run"))["steps"] == 6 and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.concept("X.22", part="recipes/from_scratch.py")
def test_from_scratch_at_toy_size(tmp_path, trivium):
    """Tokenizer, model, baselines, a completion and an adapter from Python files; a second run goes on from what is there, and one
    elsewhere gives the same."""
    source = tmp_path / "source"
    source.mkdir()
    for i in range(8):
        (source / f"m{i}.py").write_text(
            "".join(f'def f{j}(a, b):\n    """Scale by {i} and shift by {j}."""\n    return a * {i} + b - {j}\n\n\n' for j in range(40))
        )
    job = FromScratch(
        out=str(tmp_path / "out"),
        text=(str(source),),
        vocab=300,
        held_out=2,
        length=64,
        train=TrainConfig(rows=2, steps=3, validate_every=3),
        teach=TrainConfig(rows=2, steps=12),
    )
    facts = from_scratch(job)
    assert set(facts["bits per byte"]) == {"this model", "5-gram Kneser-Ney, same tokens", "lzma after reading the training text"}
    assert all(0 < value < 9 for value in facts["bits per byte"].values()) and facts["held-out bytes"] > 2000
    assert facts["bits per byte"]["5-gram Kneser-Ney, same tokens"] < 1, "the text repeats itself"
    taught = facts["docstrings"]
    assert taught["rows"] == 240 and taught["after"] < taught["before"] - 0.01 and Path(taught["adapter"]).is_dir()
    assert trivium.ok("demo", "--from-scratch", "--dry-run", "--vocab", "300", "--json").json["vocab"] == 300
    again = from_scratch(job)
    assert again["bits per byte"] == facts["bits per byte"] and again["completion"] == facts["completion"]
    assert again["docstrings"] == taught
    other = from_scratch(job.replace(out=str(tmp_path / "other")))
    assert other["bits per byte"] == facts["bits per byte"] and other["docstrings"] == {**taught, "adapter": other["docstrings"]["adapter"]}


def test_the_command_trains_and_says_where(room, tmp_path, trivium):
    job = config(room, tmp_path / "run")
    (tmp_path / "run.yaml").write_text(configs.dump(job))
    planned = trivium.ok("pretrain", "--config", "run.yaml", "--dry-run", "--json").json
    assert planned["size"]["steps"] == 6 and not (tmp_path / "run").exists()
    done = trivium.ok("pretrain", "--config", "run.yaml", "--train.steps", "2", "--json").json
    assert done["metrics"]["step"] == 2 and (tmp_path / "run" / "model" / "config.json").is_file()
    assert trivium.ok("generate", done["path"], "def add", "--max_tokens", "3").out.strip()
    assert "did you mean '--tokenizer'" in trivium.refused("pretrain", "--tokeniser", "x", status=2)
