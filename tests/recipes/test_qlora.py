"""QLoRA as a recipe: `sft` on a 4-bit base, its plan, its saving and loading, what it refuses, and merging."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.recipes.test_plan import BATCH, SPEC, cache, held, training  # noqa: F401 - a fixture
from tests.recipes.toys import Trivium, write_rows
from trivium.adapt.adapter import Adapter
from trivium.adapt.lora import LoRA
from trivium.adapt.nf4 import Nf4, memory
from trivium.core.errors import ConfigError
from trivium.core.spec import validate
from trivium.io import peft
from trivium.models import count
from trivium.models.transformer import build, initialize
from trivium.optim.eight_bit import AdamW8bit
from trivium.recipes.load import load
from trivium.recipes.needs import Training, needs
from trivium.recipes.plan import Ask, plan
from trivium.recipes.sft import SFT, sft

IDS = torch.arange(3, 23)[None]


def config(toy: Path, tmp_path: Path, **more: object) -> SFT:
    rows = write_rows(tmp_path / "rows.jsonl", count=6)
    given = {"model": str(toy), "data": [str(rows)], "out": str(tmp_path / "run"), "length": 256, "passes": ["nf4"]}
    return validate(SFT, {**given, "train": {"steps": 2, "rows": 1, "precision": "fp32"}, **more})


@pytest.mark.slow
@pytest.mark.concept("T06.04", part="recipes/load.py")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["lora", "dora", "prefix"])
def test_train_save_load(toy: Path, tmp_path: Path, kind, precision):
    """What is loaded from the adapter's directory is what was trained: the base is quantized again, from weights in the same dtype."""
    asked = config(
        toy, tmp_path, adapter=Adapter.registry.get(kind).tiny().to_dict(), train={"steps": 2, "rows": 1, "precision": precision},
        optim={"kind": "adamw8bit", "lr": 0.01, "smallest": 64},
    )  # fmt: skip
    run = sft(asked)
    again = load(run.path)
    assert [step.kind for step in again.passes] == ["nf4", kind] and memory(again.model) == memory(run.model)
    assert again.model.dtype is run.model.dtype and torch.equal(again.model(IDS).logits, run.model(IDS).logits)
    assert not torch.equal(load(toy, dtype=precision).model(IDS).logits, again.model(IDS).logits)
    record = peft.read_record(run.path)
    assert record is not None and record.passes == (Nf4(),) and record.dtype == {"fp32": "float32", "bf16": "bfloat16"}[precision]
    wider = load(run.path, dtype="fp32")
    assert wider.model.dtype is torch.float32
    assert (wider.model(IDS).logits - run.model(IDS).logits).abs().mean() < 0.05


def test_the_command(toy: Path, tmp_path: Path, trivium: Trivium):
    rows = write_rows(tmp_path / "rows.jsonl", count=6)
    words = [
        "--passes",
        "nf4",
        "--optim.kind",
        "adamw8bit",
        "--optim.lr",
        "5e-4",
        "--model",
        toy,
        "--data",
        rows,
        "--length",
        "256",
        "--train.steps",
        "2",
    ]
    path = trivium.ok("sft", *words, "--out", "run").out.strip()
    assert trivium.ok("chat", path, "Hello", "--max_tokens", "3").status == 0
    assert "nothing to train" in trivium.refused("sft", *words, "--out", "other", "--adapter", "null")


def test_a_base_that_was_prepared_otherwise(toy: Path, tmp_path: Path):
    run = sft(config(toy, tmp_path))
    base = load(toy)
    Nf4(block=128).apply(base.model)
    base.save(tmp_path / "other", family="trivium")
    with pytest.raises(ConfigError, match="was trained on a base with the passes nf4"):
        load(tmp_path / "other", adapter=run.path, accept=True)


JOBS = {
    "qlora": training(Nf4(), LoRA(rank=4)),
    "fp32, single": training(Nf4(block=32, double=False), LoRA(rank=4), precision="fp32"),
    "with dropout": training(Nf4(), LoRA(rank=4, dropout=0.1)),
}


@pytest.mark.slow
@pytest.mark.concept("T06.04", part="recipes/needs.py")
@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("optim", [None, AdamW8bit(lr=1e-3, smallest=64)], ids=["adamw", "adamw8bit"])
def test_memory_is_planned_to_the_byte(name, optim):
    job = JOBS[name] if optim is None else Training(**{**vars(JOBS[name]), "optim": optim})
    found, planned = held(job), needs(job)
    own = sum(value for kind, value in planned.memory.items() if kind not in ("allocator", "process"))
    assert own == found


@pytest.mark.slow
@pytest.mark.concept("T06.04", part="recipes/needs.py")
def test_weights_and_states_as_planned_are_those_that_are_held():
    plain, quantized = needs(training(LoRA(rank=4))), needs(JOBS["qlora"])
    assert quantized.parameters == plain.parameters and quantized.trained == plain.trained
    assert quantized.flops == plain.flops and quantized.memory["weights"] < plain.memory["weights"]
    model = Nf4().apply(initialize(build(SPEC, device="cpu", dtype=torch.bfloat16), seed=0))
    with_adapter = count.bytes_of(LoRA(rank=4).apply(model).parameters())
    assert quantized.memory["weights"] == with_adapter
    small = needs(Training(**{**vars(JOBS["qlora"]), "optim": AdamW8bit(lr=1e-3, smallest=64)}))
    assert small.checkpoint < quantized.checkpoint


def test_the_plan_of_a_run_is_that_of_its_quantized_base(toy: Path):
    found = {passes: plan(Ask(model=str(toy), length=64, passes=passes)) for passes in ((), (Nf4(),))}  # type: ignore[arg-type]
    assert found[()].parameters == found[(Nf4(),)].parameters and found[(Nf4(),)].memory["weights"] < found[()].memory["weights"]


@pytest.mark.slow
def test_less_memory_is_proposed():
    options = [option for option, _ in training().cheaper()]
    assert options[-1].endswith("--adapter.rank 16 --passes nf4") and options[-2].endswith("--adapter.rank 16")
    jobs = dict(training(LoRA(rank=16)).cheaper())
    option, job = list(jobs.items())[-1]
    assert option.endswith("--passes nf4") and [step.kind for step in job.passes] == ["nf4", "lora"]
    assert not any("nf4" in option for option, _ in JOBS["qlora"].cheaper())
    assert len(BATCH.tokens) == 4 and json.dumps(needs(job).memory)
