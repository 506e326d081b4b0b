"""Preference learning from rows to a saved adapter or model, resumed bit for bit; what is refused before the first step."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import torch

from tests.recipes import toys
from trivium.adapt.lora import LoRA
from trivium.core.errors import ConfigError, DataError, FileError, TriviumError
from trivium.data.batches import Batches
from trivium.recipes import needs
from trivium.recipes import prefer as recipe
from trivium.recipes.load import Bundle, load
from trivium.recipes.prefer import Prefer, doubts, prefer
from trivium.train import history
from trivium.train.loop import Interrupted, TrainConfig
from trivium.train.objectives import NextToken
from trivium.train.preference import DPO, IPO, KTO, ORPO, Hinge, RobustDPO, SimPO
from trivium.train.rewards import BradleyTerry

METHODS = [DPO(), DPO(label_smoothing=0.1, per_token=True), RobustDPO(), Hinge(), IPO(), SimPO(), ORPO(), KTO()]
TRAIN = TrainConfig(steps=4, rows=2, precision="fp32", track=(), seed=1)


@cache
def made(seed: int) -> Bundle:
    return toys.bundle(seed=seed)


def bundle(seed: int = 0) -> Bundle:
    """The toy, fresh."""
    return replace(made(seed), model=copy.deepcopy(made(seed).model))


def write(path: Path, *, count: int = 10, first: int = 0) -> Path:
    """Polite answers are chosen."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Where is parcel {n}?"}],
            "chosen": [{"role": "assistant", "content": f"It comes on day {n}, thank you."}],
            "rejected": [{"role": "assistant", "content": f"No idea{'!' * (n % 5)}"}],
        }
        for n in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this machine's rates are kept, measured once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def config(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Prefer:
    """Without the forecast, which costs more than the run; `test_what_is_planned` has it."""
    monkeypatch.setenv("TRIVIUM_HOME", str(home))
    monkeypatch.setattr(recipe, "foresee", lambda *_, **__: None)
    monkeypatch.setattr(recipe, "announce", lambda _: None)
    return Prefer(
        model="toy",
        data=(str(write(tmp_path / "pairs.jsonl")),),
        validation=(str(write(tmp_path / "held-out.jsonl", count=3, first=30)),),
        out=str(tmp_path / "run"),
        adapter=LoRA(rank=4, alpha=8.0),
        length=96,
        optim={"kind": "adamw", "lr": 1e-2},
        train=TRAIN,
    )


def rows_of(config: Prefer) -> list[dict[str, Any]]:
    """Metrics without times."""
    return [{name: value for name, value in row.items() if name not in history.TIMED} for row in history.read(Path(config.out))]


@pytest.mark.parametrize(
    ("objective", "adapter"),
    [*((objective, LoRA(rank=4, alpha=8.0)) for objective in METHODS), (DPO(), None), (ORPO(), None), (KTO(), None)],
    ids=lambda part: f"{part.kind}" if part is not None else "full",
)
def test_every_method_learns(objective, adapter, config):
    config = config.replace(objective=objective, adapter=adapter, optim={"kind": "adamw", "lr": 1e-2 if adapter else 2e-3})
    config = config.replace(train=TRAIN.replace(steps=8, rows=5))
    run = prefer(config, bundle=bundle())
    rows = rows_of(config)
    loss = [row["loss"] + row.get("odds", 0) for row in rows]
    assert len(rows) == 8 and loss[-1] < loss[0]
    told = rows[-1]["validation"]
    assert told.keys() >= {"loss", "chosen_reward", "accuracy", "chosen_logprob", "chosen_length"}
    assert isinstance(objective, KTO) or (told["accuracy"] == 1 and told["margin"] > 0)
    if not isinstance(objective, SimPO | ORPO):
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-4)  # the model is its own reference at first
    again = load(run.path) if adapter is None else peft_load(run.path)
    tokens = torch.arange(3, 40)[None]
    torch.testing.assert_close(again(tokens) if adapter else again.model(tokens).logits, run.model(tokens).logits, rtol=1e-5, atol=1e-5)


def peft_load(path: Path):
    """The adapter on the toy, by our own reader."""
    base = bundle().save(path.parent / "base")
    found = load(base, adapter=path, accept=True)
    return lambda tokens: found.model(tokens).logits


def test_dpo_starts_at_log_2_and_both_references_agree(config):
    """The adapter off, or its log-probabilities kept on disk: the same run, but for rounding."""
    runs = []
    for reference in ("adapter", "cached"):
        chosen = config.replace(reference=reference, out=f"{config.out}-{reference}")
        prefer(chosen, bundle=bundle())
        runs.append(rows_of(chosen))
    assert runs[0][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for a, b in zip(*runs, strict=True):
        for name in ("loss", "margin", "chosen_logprob", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name
    assert not (Path(f"{config.out}-adapter") / "reference.safetensors").exists()
    kept = sorted(path.name for path in Path(f"{config.out}-cached").glob("*.safetensors"))
    assert kept == ["reference-validation.safetensors", "reference.safetensors"]


@pytest.mark.parametrize(
    ("objective", "adapter"), [(DPO(), LoRA(rank=4, dropout=0.1)), (IPO(), None), (KTO(), LoRA(rank=4)), (ORPO(), None)], ids=str
)
def test_a_run_that_was_stopped_ends_with_the_same_bits(objective, adapter, config, monkeypatch):
    config = config.replace(objective=objective, adapter=adapter, train=TRAIN.replace(steps=5, save_every=2), validation=())
    whole = prefer(config, bundle=bundle())
    second = config.replace(out=f"{config.out}-2")
    batch = Batches.batch

    def stopping(self: Batches, i: int):
        if i == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(self, i)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "batch", stopping)
        with pytest.raises(Interrupted):
            prefer(second, bundle=bundle())
    assert len(rows_of(second)) == 4
    resumed = prefer(second, bundle=bundle())
    assert rows_of(second) == rows_of(config)
    ours, theirs = dict(whole.model.named_parameters()), dict(resumed.model.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ConfigError, match="belongs to another run"):
        prefer(second.replace(objective=Hinge()), bundle=bundle())


def test_a_cached_reference_is_used_again_and_only_where_it_belongs(config, tmp_path, monkeypatch):
    config = config.replace(adapter=None, reference_file=str(tmp_path / "shared.safetensors"), validation=(), train=TRAIN.replace(steps=1))
    prefer(config, bundle=bundle())
    kept = Path(config.reference_file)
    found = safetensors.numpy.load_file(kept)["reference"]
    assert found.shape == (20,) and (found < -1).all()
    with monkeypatch.context() as patch:
        patch.setattr("trivium.train.reference.logprobs_of", lambda *_, **__: pytest.fail("it was there already"))
        prefer(config.replace(out=f"{config.out}-2", objective=IPO()), bundle=bundle())
    other = config.replace(out=str(tmp_path / "other"))
    with pytest.raises(FileError, match="of other weights .*remove it, or name another with --reference_file"):
        prefer(other, bundle=bundle(seed=1))
    with pytest.raises(FileError, match="of other rows"):
        prefer(other.replace(data=(str(write(tmp_path / "others.jsonl", first=1)),)), bundle=bundle())
    bent = found.copy()
    bent[3] += 1
    with safetensors.safe_open(kept, "np") as file:
        about = file.metadata()
    kept.write_bytes(safetensors.numpy.save({"reference": bent}, metadata=about))
    with pytest.raises(FileError, match="is damaged; remove it"):
        prefer(other, bundle=bundle())
    kept.write_bytes(b"nothing")
    with pytest.raises(FileError, match="cannot be read .*; remove it"):
        prefer(other, bundle=bundle())
    assert not (tmp_path / "other").exists()  # none of them came to a first step


@pytest.mark.parametrize(("objective", "adapter"), [(DPO(), None), (KTO(), LoRA(rank=4, alpha=8.0))], ids=["cached", "labels"])
def test_sets_are_mixed_by_weight(objective, adapter, config, tmp_path, capsys):
    polite, counted = config.data[0], str(write(tmp_path / "more.jsonl", count=20, first=50))
    config = config.replace(objective=objective, adapter=adapter, data=(f"{polite}:3", f"{counted}:1"), train=TRAIN.replace(steps=8))
    prefer(config, bundle=bundle())
    found = [row["loss"] for row in history.read(Path(config.out))]
    assert "mixture" in capsys.readouterr().err and len(found) == 8
    kept = {path.name for path in Path(config.out).glob("reference*")}
    assert kept == ({"reference.safetensors", "reference-1.safetensors", "reference-validation.safetensors"} if adapter is None else set())
    even = config.replace(data=(f"{polite}:1", f"{counted}:1"), out=str(tmp_path / "even"))
    prefer(even, bundle=bundle())
    assert [row["loss"] for row in history.read(Path(even.out))] != found
    with pytest.raises(ConfigError, match="has no weight"):
        prefer(config.replace(data=(f"{polite}:3", counted)), bundle=bundle())


@pytest.mark.parametrize(
    ("objective", "adapter"),
    [(DPO(), LoRA(rank=4)), (IPO(), None), (KTO(), None), (ORPO(), None)],
    ids=["adapter", "cached", "kto", "orpo"],
)
def test_what_is_planned(objective, adapter, config, monkeypatch):
    """The very step, on tensors that hold nothing; a reference that is yet to be computed is stood in for."""
    monkeypatch.setattr(recipe, "foresee", needs.foresee)
    found = recipe.plan(config.replace(objective=objective, adapter=adapter), bundle=bundle())
    assert found["needs"]["steps"] == 4 and found["needs"]["peak"] > 0
    assert found["needs"]["memory"].keys() >= {"weights", "activations", "optimizer"}
    assert found["data"]["liked" if isinstance(objective, KTO) else "pairs"] == 10


def test_several_micro_batches_are_one(config):
    """Pairs whole in each, so that they add up."""
    runs = []
    for micro in (None, 1):
        chosen = config.replace(out=f"{config.out}-{micro}", train=TRAIN.replace(rows=4, micro=micro, steps=2), validation=())
        prefer(chosen, bundle=bundle())
        runs.append(rows_of(chosen))
    for a, b in zip(*runs, strict=True):
        assert a.keys() == b.keys() and all(a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5) for name in a)


@pytest.mark.parametrize(
    ("changes", "row", "message"),
    [
        ({"objective": NextToken()}, None, "'next_token' does not learn from preferences .these do: dpo, hinge, ipo, kto"),
        ({"objective": BradleyTerry()}, None, "trains a reward model"),
        ({"adapter": None, "reference": "adapter"}, None, "without an adapter there is none to switch off"),
        ({"objective": KTO(), "train": TRAIN.replace(micro=1)}, None, "cannot be taken apart"),
        ({}, {"prompt": "q", "chosen": "a"}, "pairs.jsonl:11: it has no 'rejected'"),
        ({}, {"prompt": "q", "chosen": "a", "rejected": "a"}, "the same answer as chosen and as rejected.*pairs.jsonl:11"),
        ({}, {"prompt": "q", "chosen": "a", "rejected": ""}, "no token to train on.*pairs.jsonl:11"),
        ({}, {"prompt": "q " * 200, "chosen": "a", "rejected": "b"}, r"its prompt alone fills \d+ tokens"),
        ({"length": 600}, {"prompt": "q " * 250, "chosen": "a", "rejected": "b"}, "the longest side has"),
        ({"data": ("nowhere.jsonl",)}, None, "nowhere.jsonl"),
    ],
)
def test_one_clear_error_before_the_first_step(changes, row, message, config):
    if row is not None:
        with Path(config.data[0]).open("a") as file:
            file.write(json.dumps(row) + "\n")
    with pytest.raises(TriviumError, match=message):
        prefer(config.replace(**changes), bundle=bundle())
    assert not Path(config.out).exists()


def test_rows_that_are_allowed_are_left_out_and_said(config, capsys):
    with Path(config.data[0]).open("a") as file:
        file.write(json.dumps({"prompt": "q", "chosen": "a", "rejected": "a"}) + "\n")
    with pytest.raises(DataError):
        prefer(config, bundle=bundle())
    prefer(config.replace(max_same=1), bundle=bundle())
    said = capsys.readouterr().err
    assert "1: " in said and "pairs.jsonl:11" in said and "It comes on day 0" in said


def test_doubts_about_a_run():
    """What fell, and what length explains; and nothing where nothing did."""
    good = {"chosen_logprob": -20.0, "chosen_length": 10.0, "accuracy_longer": 0.9, "accuracy_shorter": 0.8}
    assert doubts([]) == doubts([good]) == doubts([good] * 30) == []
    (fell,) = doubts([good] * 20 + [{**good, "chosen_logprob": -25.0}] * 3)
    assert "became less likely: -2.000 nats per token at first, -2.500 at the end" in fell
    (length,) = doubts([good] * 20 + [{**good, "accuracy_shorter": 0.3}] * 3)
    assert "length may be what is learned: at the end 90% of the pairs" in length and "30% of those where it is the shorter" in length
    assert doubts([good, {name: value for name, value in good.items() if name != "accuracy_shorter"}]) == []


def test_other_rows_at_the_end_are_no_fall():
    """Where the reference's numbers of the same rows are known, they are what is compared with."""
    first = {"chosen_logprob": -20.0, "chosen_length": 10.0, "chosen_gain": 0.0}
    assert doubts([first] * 20 + [{**first, "chosen_logprob": -25.0}] * 3) == []
    (fell,) = doubts([first] * 20 + [{**first, "chosen_logprob": -20.0, "chosen_gain": -5.0}] * 3)
    assert "-1.500 nats per token at first, -2.000 at the end" in fell
    assert doubts([{"chosen_gain": 0.0}, first]) == []  # no answer that was liked in the first update


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_that_makes_the_chosen_less_likely_says_so(config, capsys):
    """Rejected answers that say the chosen one over and over: pushing them down pulls the chosen one along."""
    rows = [{"prompt": f"Where is parcel {n}?", "chosen": f" day {n}", "rejected": 4 * f" day {n}"} for n in range(12)]
    config = config.replace(
        data=(str(written(Path(config.data[0]), rows)),), validation=(), adapter=None, objective=DPO(beta=0.05),
        optim={"kind": "adamw", "lr": 3e-3}, train=TRAIN.replace(steps=12, rows=6),
    )  # fmt: skip
    prefer(config, bundle=bundle())
    assert "the chosen answers became less likely" in capsys.readouterr().err
    assert rows_of(config)[-1]["chosen_gain"] < 0 < rows_of(config)[-1]["margin"]
    calm = config.replace(out=f"{config.out}-calm", objective=ORPO(weight=0.01))
    prefer(calm, bundle=bundle())
    assert "became less likely" not in capsys.readouterr().err


def test_a_run_that_learns_length_says_so(config, capsys):
    """Sides of the same words, four of five chosen because they are longer: the fifth is told wrong."""
    words = ["It", "comes", "on", "day", "one", "or", "two", "or", "three", "thank", "you"]
    rows = []
    for n in range(20):
        long, short = (" ".join(words[(n + at) % len(words)] for at in range(size)) for size in (9, 3))
        sides = (long, short) if n % 5 else (short, long)
        rows.append({"prompt": f"Where is parcel {n}?", "chosen": f" {sides[0]}", "rejected": f" {sides[1]}"})
    config = config.replace(
        data=(str(written(Path(config.data[0]), rows)),), validation=(), adapter=None, objective=DPO(beta=0.1),
        optim={"kind": "adamw", "lr": 1e-3}, train=TRAIN.replace(steps=10, rows=10),
    )  # fmt: skip
    prefer(config, bundle=bundle())
    said = capsys.readouterr().err
    assert "length may be what is learned" in said and "take simpo or dpo with objective.per_token" in said
    assert "so length alone tells them apart" not in said  # of the rows, four in five are no law
    prefer(
        config.replace(data=(str(written(Path(config.data[0]), rows[1:5])),), train=TRAIN.replace(steps=1), out=f"{config.out}-all"),
        bundle=bundle(),
    )
    assert (
        "training data: the chosen answer is the longer one in 100% of the pairs, so length alone tells them apart"
        in capsys.readouterr().err
    )


# The command


@pytest.mark.slow
def test_the_command(trivium, toy, tmp_path):
    write(tmp_path / "pairs.jsonl")
    flags = ["--model", toy, "--data", "pairs.jsonl", "--length", "96", "--train.steps", "2", "--train.rows", "2", "--out", "run"]
    planned = trivium.ok("prefer", "--method", "ipo", "--beta", "0.2", *flags, "--adapter", "null", "--dry_run", "--json").json
    assert planned["config"]["objective"] == {"kind": "ipo", "beta": 0.2, "per_token": True}
    assert planned["data"]["pairs"] == 10 and planned["needs"]["steps"] == 2 and planned["needs"]["peak"] > 0
    assert not Path("run").exists()
    done = trivium.ok("prefer", "--method", "ipo", *flags, "--json").json
    assert Path(done["path"]) == Path("run/adapter") and done["metrics"]["step"] == 2 and "margin" in done["metrics"]
    assert "adapter_config.json" in {path.name for path in Path("run/adapter").iterdir()}
    assert trivium.ok("prefer", "--config", "run/config.yaml").out == "run/adapter\n"  # finished: found as it is
    assert "did you mean 'simpo'" in trivium.refused("prefer", "--method", "simp", *flags, status=2)
    Path("bad.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "a"}\n')
    refused = trivium.refused("prefer", *flags, "--data", "bad.jsonl")
    assert "1 of 1 rows have the same answer as chosen and as rejected" in refused and "--max-same 1" in refused
