"""A plan is what the real step takes to the byte, what cannot fit is refused, and what is proposed is less."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import segments_of, tokens
from trivium.adapt.adapter import adapters
from trivium.adapt.lora import LoRA, initialize_adapter
from trivium.adapt.nf4 import Nf4
from trivium.adapt.passes import Pass, apply_passes
from trivium.cli import main
from trivium.core.device import dtype
from trivium.core.errors import TriviumError
from trivium.data.batch import Batch
from trivium.data.prepare import prepare
from trivium.io import directory
from trivium.kernels import native
from trivium.models.checkpointing import Recompute
from trivium.models.ledger import Ledger
from trivium.models.presets import llama
from trivium.models.transformer import build, initialize
from trivium.optim.masters import Masters
from trivium.optim.optimizers import AdamW
from trivium.recipes import needs as room
from trivium.recipes import plan as recipe
from trivium.recipes import sft
from trivium.recipes.load import Bundle
from trivium.recipes.needs import Training, needs
from trivium.train.loop import TrainConfig
from trivium.train.objectives import NextToken

SPEC = llama(dim=32, layers=2, heads=4, kv_heads=2, hidden=40, vocab=61)
SEGMENTS = segments_of([[30, 18], [-2, 46], [20, 20, 8], [48]], 48)
TARGETS = torch.zeros_like(SEGMENTS, dtype=torch.bool)
TARGETS[:, 1:] = (SEGMENTS[:, 1:] == SEGMENTS[:, :-1]) & (SEGMENTS[:, 1:] >= 0)
BATCH = Batch(tokens(4, 48), SEGMENTS, TARGETS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose rates are known."""
    monkeypatch.setenv("TRIVIUM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(room, "examine", lambda **_: {"matmul": {"fp32 TFLOP/s": 0.5, "bf16 TFLOP/s": 1.0}})
    return tmp_path / "home"


def training(*passes: Pass, out: Path = Path("runs"), **changes) -> Training:
    config = TrainConfig(**{"steps": 10, "rows": 4, "precision": "bf16", "save_every": 2, **changes})
    return Training(SPEC, passes, BATCH, 10, 10 * int((SEGMENTS >= 0).sum()), NextToken(), AdamW(lr=1e-3), config, out)


def held(job: Training) -> int:
    """Bytes of tensors at the worst moment of the second of two real steps."""
    precision = dtype(job.train.precision)
    model = apply_passes(initialize(build(job.spec, device="cpu", dtype=precision), seed=0), job.passes).train()
    for name in adapters(model):
        initialize_adapter(model, name, seed=0)
    model.recompute = job.train.recompute
    ledger = Ledger()
    ledger.note(model.parameters(), "parameters")
    masters = Masters(model, job.optim, dtype=precision)
    ledger.note(masters.tensors.values(), "masters")
    micros = job.batch.split(4 // (job.train.micro or 4))
    with ledger:
        for _ in range(2):
            ledger.mark()
            for micro in micros:
                term = torch.stack(list(job.objective.terms(model, micro).values())).sum()
                term.backward()
                masters.accumulate()
                del term
            masters.clip(job.train.clip)
            masters.step(1.0)
    return ledger.peak.total()


JOBS = {
    "full": training(),
    "fp32": training(precision="fp32"),
    "lora": training(LoRA(rank=4)),
    "lora with dropout": training(LoRA(rank=4, dropout=0.1, targets=("q", "v")), precision="fp32"),
    "recompute": training(recompute=Recompute(every=2)),
    "mixers again": training(recompute=Recompute(only="mixer"), precision="fp32"),
    "micro": training(micro=1),
}


@pytest.mark.slow
@pytest.mark.concept("X.39", part="recipes/needs.py")
@pytest.mark.parametrize("name", [*JOBS, "full on torch"])
def test_tensors_are_planned_to_the_byte(name):
    job = JOBS[name.removesuffix(" on torch")]
    with native.switched_off() if "torch" in name else nullcontext():
        planned, found = needs(job), held(job)
    own = sum(value for kind, value in planned.memory.items() if kind not in ("allocator", "process"))
    if job.train.micro is None:
        assert own == found
    else:  # the first two micro-batches stand for all
        assert own == pytest.approx(found, rel=0.05)
    assert planned.memory["process"] > 2**27


def test_kinds_are_told_apart():
    full, lora = needs(JOBS["full"]), needs(JOBS["lora"])
    assert full.parameters == full.trained == full.memory["weights"] // 2 == full.memory["masters"] // 4
    assert full.memory["optimizer"] == pytest.approx(8 * full.parameters, rel=0.01)
    assert lora.memory["weights"] == 2 * lora.parameters and lora.memory["masters"] == 4 * lora.trained
    assert full.checkpoint == pytest.approx(12 * full.parameters, rel=0.01)
    assert full.disk == 3 * full.checkpoint  # two stay while one is written
    assert full.flops > lora.flops > 0.6 * full.flops


@pytest.mark.slow
def test_less_is_planned_for_what_takes_less():
    peaks = {name: sum(v for k, v in needs(job).memory.items() if k not in ("allocator", "process")) for name, job in JOBS.items()}
    assert peaks["recompute"] < peaks["full"] and peaks["micro"] < peaks["full"] and peaks["lora"] < peaks["full"] < peaks["fp32"]


@pytest.mark.slow
@pytest.mark.concept("X.39", part="recipes/needs.py")
def test_what_cannot_fit_is_refused_with_what_would(monkeypatch):
    job = training(precision="fp32")
    planned = needs(job)
    assert planned.require_fits() is planned
    options = [option for option, _ in job.cheaper()]
    assert options[0] == "--train.micro 1" and options[-2].endswith("--adapter.rank 16")
    monkeypatch.setattr(room, "resident", lambda: 0)
    planned = needs(job)
    monkeypatch.setattr(room, "available_memory", lambda: planned.peak - 1)
    with pytest.raises(TriviumError, match=r"needs .* free. What would fit: --train.micro 1 \(needs"):
        planned.require_fits()
    monkeypatch.setattr(room, "available_memory", lambda: 1000)
    with pytest.raises(TriviumError, match="smaller model"):
        planned.require_fits()


def test_a_full_disk_is_foreseen(monkeypatch):
    planned = needs(training())
    monkeypatch.setattr(room, "free_disk", lambda _: planned.disk - 1)
    with pytest.raises(TriviumError, match="checkpoints"):
        planned.require_fits()


def test_rates_are_measured_once(cache, monkeypatch):
    first = room.machine_rates()
    monkeypatch.setattr(room, "examine", lambda **_: pytest.fail("measured again"))
    assert room.machine_rates() == first and first["bf16"] == 1e12
    known = json.loads((cache / "machine.json").read_text())
    known[0]["identity"]["cpu"] = "another"
    (cache / "machine.json").write_text(json.dumps(known))
    monkeypatch.setattr(room, "examine", lambda **_: {"matmul": {"fp32 TFLOP/s": 3.0, "bf16 TFLOP/s": 4.0}})
    assert room.machine_rates()["fp32"] == 3e12
    assert len(json.loads((cache / "machine.json").read_text())) == 2


def test_measuring_copies_takes_little_memory():
    """What the process held at its worst is forgotten before, as Linux can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not forget a process's peak")
    before = room.resident()
    assert room._copied() > 1e8
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None and int(peak[1]) * 1024 - before < 40 << 20


def test_time_grows_with_work():
    job = training()
    once, thrice = needs(job), needs(Training(**{**vars(job), "tokens": 3 * job.tokens}))
    assert thrice.seconds == pytest.approx(3 * once.seconds, rel=1e-6) and thrice.flops == pytest.approx(3 * once.flops, rel=1e-6)
    assert once.seconds > once.flops / 1e12


class Letters:
    """The least of a prompt contract that plain text needs."""

    stops = (0,)

    def text(self, text):
        from trivium.text.prompt import Row

        ids = [1 + ord(letter) % 50 for letter in text]
        return Row(ids, [True] * len(ids))

    def digest(self):
        return "letters"


def test_the_heaviest_batch_holds_the_longest_rows():
    bank = prepare([{"text": "ab" * n} for n in (2, 3, 20, 4, 25, 5, 6)], Letters(), length=50, packing="none")
    batch = room.heaviest(bank, rows=2)
    assert batch.tokens.shape == (2, 50)
    assert sorted((batch.segments >= 0).sum(1).tolist()) == [40, 50]
    assert room.heaviest(bank, rows=9).tokens.shape == (9, 50)
    found = room.foresee(recipe.Ask(train=TrainConfig(rows=2)), build(SPEC, device="cpu"), bank)
    assert found.training.steps == 4 and found.training.tokens == pytest.approx(np.sum(bank.index["length"]) * 8 / 7, abs=1)


@pytest.mark.slow
def test_the_command(monkeypatch, capsys):
    def load(_name, *, dtype, extend):
        assert extend is None
        model = initialize(build(SPEC, device="cpu", dtype=room.dtype(dtype)), seed=0)
        return Bundle(model=model, tokenizer=None, prompt=None, path=Path("none"))

    monkeypatch.setattr(sft, "load", load)
    assert main(["plan", "--model", "x", "--length", "32", "--train.rows", "2", "--train.steps", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 3 and found["tokens"] == 3 * 2 * 32 and found["peak"] == sum(found["memory"].values())
    assert found["parameters"] > found["trained"] > 0
    assert main(["plan", "--model", "x", "--length", "32"]) == 0
    assert "memory at the worst moment" in capsys.readouterr().out
    monkeypatch.setattr(room, "available_memory", lambda: 1 << 20)
    assert main(["plan", "--model", "x", "--length", "32"]) == 1
    assert "free" in capsys.readouterr().err


def test_serving_takes_weights_and_cache():
    model = build(SPEC, device="cpu")
    found = recipe.serving(model, rows=2, context=7, precision="fp32")
    assert found["cache"] == model.cache(rows=2, capacity=7).bytes
    assert found["weights"] == sum(p.nbytes for p in model.parameters())
    assert recipe.serving(model, rows=2, context=7, precision="bf16")["cache"] * 2 == found["cache"]


@pytest.mark.parametrize("passes", [(), (LoRA(rank=2),)], ids=["full", "adapter"])
def test_a_running_mean_is_counted(passes: tuple[Pass, ...]):
    """In fp32, for what is trained alone; a checkpoint holds it as well."""
    plain, mean = needs(training(*passes)), needs(training(*passes, ema=0.9))
    assert mean.memory["average"] == 4 * mean.trained and "average" not in plain.memory
    assert mean.checkpoint == plain.checkpoint + 4 * mean.trained


@pytest.mark.skipif(not room.resident(), reason="this system does not say what a process holds")
def test_weights_of_a_mapped_file_are_held_once_they_were_read(tmp_path):
    model = initialize(build(llama(dim=256, layers=4, heads=4, kv_heads=4, hidden=1024, vocab=512), device="cpu"), seed=0)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert room.held_of(model.parameters()) == size > 15e6
    directory.write(tmp_path / "model", model)
    mapped = directory.read(tmp_path / "model").model
    before = room.held_of(mapped.parameters())
    assert before < 0.2 * size
    assert all(parameter.isfinite().all() for parameter in mapped.parameters())
    assert room.held_of(mapped.parameters()) == pytest.approx(size, rel=0.02)
    Nf4().apply(mapped)  # lets go of each full weight
    assert room.held_of(mapped.parameters()) < 0.3 * size
