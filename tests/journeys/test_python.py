"""The Python side of the main job: load, chat, generate, train, save."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import trivium as tv
from tests.recipes.toys import write_rows
from trivium.adapt.lora import LoRA
from trivium.infer.sampling import Sampling
from trivium.recipes.sft import SFT
from trivium.train.loop import TrainConfig


def test_from_load_to_save(toy: Path, tmp_path: Path):
    bundle = tv.load(toy)
    assert isinstance(bundle, tv.Bundle) and bundle.spec == bundle.model.spec and bundle.passes == ()
    ids = torch.tensor([bundle.tokenizer.encode("New order")])
    assert bundle.model(ids).logits.shape == (1, ids.shape[1], bundle.spec.vocab)
    few = Sampling(temperature=0, max_tokens=5)
    assert bundle.generate("New order", sampling=few).ids == bundle.generate("New order", sampling=few).ids
    said = bundle.chat("New order", sampling=few)
    assert said == bundle.chat([{"role": "user", "content": "New order"}], sampling=few)
    assert "".join(event.text for event in bundle.stream("New order", sampling=few)) == said.text

    rows = write_rows(tmp_path / "rows.jsonl")
    run = tv.sft(
        SFT(
            model=str(toy),
            data=(str(rows),),
            out=str(tmp_path / "run"),
            length=160,
            adapter=LoRA(rank=4),
            train=TrainConfig(steps=2, rows=2, precision="fp32"),
        )
    )
    assert isinstance(run, tv.Run) and run.metrics["step"] == 2 and run.path == tmp_path / "run" / "adapter"
    again = tv.load(run.path)  # names its base
    assert [step.kind for step in again.passes] == ["lora"] and torch.equal(again.model(ids).logits, run.model(ids).logits)
    assert torch.equal(tv.load(toy, adapter=run.path).model(ids).logits, run.model(ids).logits)

    saved = bundle.since("test").save(tmp_path / "saved")
    copy = tv.load(saved)
    assert torch.equal(copy.model(ids).logits, bundle.model(ids).logits) and copy.lineage[-1]["step"] == "test"
    assert copy.weights() == bundle.weights() and copy.prompt.digest() == bundle.prompt.digest()


def test_every_parameter_can_be_trained(toy: Path, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl")
    run = tv.sft(
        SFT(
            model=str(toy),
            data=(str(rows),),
            out=str(tmp_path / "run"),
            length=160,
            adapter=None,
            train=TrainConfig(steps=2, rows=2, precision="fp32"),
        )
    )
    again, base = tv.load(run.path), tv.load(toy)
    names = [name for name, parameter in base.model.named_parameters() if torch.equal(parameter, again.model.get_parameter(name))]
    assert run.path == tmp_path / "run" / "model" and names == [] and again.lineage[-1]["step"] == "sft"


def test_an_edited_model_waits_to_be_accepted(toy: Path, tmp_path: Path):
    path = tmp_path / "edited"
    shutil.copytree(toy, path)
    (path / "chat_template.jinja").write_text((path / "chat_template.jinja").read_text() + " ")
    with pytest.raises(tv.TriviumError, match=r"chat_template\.jinja was edited"):
        tv.load(path)
    assert tv.load(path, accept=True).prompt.template.endswith(" ")
    assert tv.load(path).prompt.template.endswith(" ")
