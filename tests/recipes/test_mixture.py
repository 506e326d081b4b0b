"""Data sets mixed by weight: how they are named, what a run takes of them, and that a stop changes nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.data.fakes import FakePrompt
from tests.recipes.toys import Trivium, write_rows
from trivium.core.errors import ConfigError
from trivium.core.spec import validate
from trivium.data.batches import Batches
from trivium.data.order import Mixture
from trivium.data.prepare import prepare
from trivium.recipes.data import bank
from trivium.recipes.load import load
from trivium.recipes.mixture import mixture
from trivium.recipes.pretrain import Pretrain, pretrain
from trivium.recipes.pretrain import plan as pretrain_plan
from trivium.recipes.sft import SFT, plan, prepared, sft


def test_names_and_weights(tmp_path: Path):
    assert mixture(["a.jsonl", "b.jsonl"]) == [(("a.jsonl", "b.jsonl"), 1)]
    assert mixture(["a.jsonl:2", "d/*.jsonl:13"]) == [(("a.jsonl",), 2), (("d/*.jsonl",), 13)]
    odd = tmp_path / "a:2"
    odd.write_text("")
    assert mixture([str(odd)]) == [((str(odd),), 1)] and mixture([f"{odd}:3"]) == [((str(odd),), 3)]
    with pytest.raises(ConfigError, match="b.jsonl has no weight"):
        mixture(["a.jsonl:2", "b.jsonl"])
    with pytest.raises(ConfigError, match="a whole number from 1"):
        mixture(["a.jsonl:0", "b.jsonl:1"])


@pytest.mark.parametrize("rates", [[1], [1, 1], [3, 7], [5, 1, 2], [1, 100, 33, 7]])
def test_turns_are_those_that_are_dealt(rates: list[int]):
    mixed = Mixture(rates)
    dealt = [0] * len(rates)
    for slot in range(150):
        assert mixed.turns(slot) == dealt
        dealt[mixed.turn(slot)[0]] += 1


def test_what_a_run_takes_of_each_set():
    """Counted bin by bin; shares of tokens come out as the weights ask, though the sets' bins are not equally full."""
    words = [[f"{'x' * (3 + n % 5)} {n}" for n in range(count)] for count in (40, 17)]
    sets = [prepare([{"text": text} for text in texts], FakePrompt(), length=size) for texts, size in zip(words, (40, 40), strict=True)]
    batches = Batches([(sets[0], 3), (sets[1], 1)], seed=2, rows=4)
    steps = 100
    seen = [bin_ for i in range(steps) for bin_ in batches.bins(i)]
    for number, one in enumerate(sets):
        own = [bin_ for which, bin_ in seen if which == number]
        assert batches.dealt(steps)[number] == len(own)
        for what in ("length", "supervised"):
            assert batches.held(number, len(own), what=what) == sum(int(one.index[what][one.bins[bin_]].sum()) for bin_ in own)
    tokens = [batches.held(number, count) for number, count in enumerate(batches.dealt(steps))]
    assert tokens[0] / sum(tokens) == pytest.approx(0.75, abs=0.02)


def config(toy: Path, tmp_path: Path, **more: object) -> SFT:
    first, second = write_rows(tmp_path / "a.jsonl", count=8), write_rows(tmp_path / "b.jsonl", "test", count=5)
    return validate(SFT, {"model": str(toy), "data": [f"{first}:2", f"{second}:1"], "out": str(tmp_path / "run"), "length": 160,
                          "train": {"steps": 6, "rows": 2, "precision": "fp32", "save_every": 3}, "adapter": {"rank": 2}, **more})  # fmt: skip


@pytest.mark.slow
def test_sft_takes_what_was_planned(toy: Path, tmp_path: Path, capsys):
    asked = config(toy, tmp_path)
    sets, _ = prepared(asked, load(toy))
    assert [(list(one.facts.sources), weight) for one, weight in sets] == [
        ([str(tmp_path / "a.jsonl")], 2),
        ([str(tmp_path / "b.jsonl")], 1),
    ]
    said = capsys.readouterr().err
    batches = Batches(sets, seed=0, rows=2)
    share = [batches.held(number, bins) for number, bins in enumerate(batches.dealt(6))]
    assert "mixture" in said and f"{share[0] / sum(share):.1%}" in said
    planned = plan(asked)
    assert planned["size"]["steps"] == planned["needs"]["steps"] == 6 and len(planned["data"]) == 2
    expected = sum(len(one.tokens) / len(one.bins) * bins for (one, _), bins in zip(sets, batches.dealt(6), strict=True))
    assert planned["size"]["tokens"] == planned["needs"]["tokens"] == round(expected)
    whole = sft(asked)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [int((batches.batch(i).segments >= 0).sum()) for i in range(6)]
    other = sft(asked.replace(data=tuple(path.replace(":2", ":1") for path in asked.data), out=str(tmp_path / "equal")))
    pairs = zip(whole.model.parameters(), other.model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs), "another weight is another run"
    with pytest.raises(ConfigError, match="belongs to another run"):
        sft(asked.replace(data=tuple(path.replace(":2", ":1") for path in asked.data)))


def test_epochs_count_every_set(toy: Path, tmp_path: Path):
    asked = config(toy, tmp_path, train={"epochs": 2, "rows": 2, "precision": "fp32"})
    sets, _ = prepared(asked, load(toy))
    bins = sum(len(one.bins) for one, _ in sets)
    size = plan(asked)["size"]
    assert size["steps"] == math.ceil(2 * bins / 2) and size["epochs"] == pytest.approx(size["steps"] * 2 / bins, abs=1e-3)


def test_prepared_folders_are_mixed_too(toy: Path, tmp_path: Path):
    asked, bundle = config(toy, tmp_path), load(toy)
    folders = []
    for path in asked.data:
        folder = tmp_path / f"prepared-{len(folders)}"
        bank([path.split(":")[0]], bundle.prompt, length=160).save(folder)
        folders.append(f"{folder}:{path.split(':')[1]}")
    sets, _ = prepared(asked.replace(data=tuple(folders)), bundle)
    assert [(one.fingerprint, weight) for one, weight in sets] == [(one.fingerprint, weight) for one, weight in prepared(asked, bundle)[0]]


def test_pretraining_mixes_as_well(toy: Path, tmp_path: Path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} word and another {name}\n" * 60)
    asked = Pretrain(
        tokenizer=str(toy), preset="tiny-llama", data=(f"{tmp_path}/a.txt:3", f"{tmp_path}/b.txt:1"), out=str(tmp_path / "run"), length=32,
        train={"steps": 3, "rows": 4, "precision": "fp32"},
    )  # fmt: skip
    found = pretrain_plan(asked)
    run = pretrain(asked)
    assert "mixture" in capsys.readouterr().err and run.metrics["step"] == found["steps"] == 3


def test_the_command_takes_a_list(toy: Path, trivium: Trivium):
    write_rows(Path("a.jsonl"), count=6), write_rows(Path("b.jsonl"), "test", count=3)
    found = trivium.ok("sft", "--model", toy, "--data", "[a.jsonl:2, b.jsonl:1]", "--length", "200", "--dry-run", "--json").json
    assert found["config"]["data"] == ["a.jsonl:2", "b.jsonl:1"] and len(found["data"]) == 2
    assert "has no weight" in trivium.refused("sft", "--model", toy, "--data", "[a.jsonl:2, b.jsonl]", "--length", "200")
    Path("empty.jsonl").touch()
    assert "empty.jsonl: no rows" in trivium.refused("sft", "--model", toy, "--data", "[a.jsonl:2, empty.jsonl:1]", "--length", "200")
