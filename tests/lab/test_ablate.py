"""Ablations at toy size: what is varied, budgets that match, one order of data, paired statistics, going on after a stop."""

from __future__ import annotations

import json

import numpy as np
import pytest

from trivium.checks.bootstrap import crossed
from trivium.core import config as configs
from trivium.core.errors import ConfigError, DataError
from trivium.lab import ablate as lab
from trivium.lab.ablate import Ablate, ablate, plan, rows_of
from trivium.models.presets import llama
from trivium.nn.norms import Layer
from trivium.recipes.pretrain import pretrain
from trivium.text import bpe
from trivium.train import history
from trivium.train.loop import TrainConfig

TEXTS = [f"def f{i}(a, b):\n    return a * {i} + b\n" * 4 for i in range(12)]
SHAPE = llama(dim=32, layers=2, heads=4, kv_heads=2, hidden=64, vocab=320, tied=True)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    path = tmp_path_factory.mktemp("ablate")
    (path / "tok").mkdir()
    bpe.train(TEXTS, size=300).tokenizer.save(path / "tok")
    for name, texts in (("train", TEXTS[:8]), ("held-out", TEXTS[8:])):
        (path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (path / "base.yaml").write_text(configs.dump(SHAPE))
    return path


def job(room, out, *vary: str, **changes) -> Ablate:
    values = {
        "base": str(room / "base.yaml"),
        "vary": vary or ("blocks.*.mixer.position=rope,none",),
        "seeds": 2,
        "amount": 600,
        "tokenizer": str(room / "tok"),
        "data": (str(room / "train.jsonl"),),
        "validation": (str(room / "held-out.jsonl"),),
        "length": 32,
        "train": TrainConfig(rows=4, precision="fp32", track=()),
        "out": str(out),
    }
    return Ablate(**{**values, **changes})


@pytest.mark.slow
def test_variants_differ_in_what_was_asked_and_nothing_else(room, tmp_path):
    first, second = plan(job(room, tmp_path))
    assert (first.name, second.name) == ("position=rope", "position=none") and first.changes == ()
    assert second.changes and all(path.startswith("model.blocks.layer.mixer.position") for path, *_ in second.changes)
    assert first.config.model.blocks["layer"].mixer.position is not None and second.config.model.blocks["layer"].mixer.position is None
    grid = plan(job(room, tmp_path, "blocks.*.norm=rms,layer", "optim.lr=1e-3,2e-3", "layers=2*layer,[layer]"))
    assert len(grid) == 8 and grid[0].name == "norm=rms, lr=1e-3, layers=2*layer"
    assert isinstance(grid[-1].config.model.blocks["layer"].norm, Layer) and grid[-1].config.optim.lr == 2e-3
    assert len(grid[-1].config.model.layers) == 1 and grid[-1].facts["parameters"] < grid[0].facts["parameters"]


@pytest.mark.slow
def test_budgets_match(room, tmp_path, monkeypatch):
    vary = "layers=[layer, layer, layer, layer],[layer]"
    deep, flat = plan(job(room, tmp_path, vary, amount=4000))
    assert deep.steps == flat.steps and deep.facts["tokens"] == flat.facts["tokens"] == pytest.approx(4000, rel=0.1)
    deep, flat = plan(job(room, tmp_path, vary, budget="flops", amount=1e10))
    assert deep.facts["flops"] == pytest.approx(1e10, rel=0.05) == flat.facts["flops"] and flat.steps > 1.3 * deep.steps
    assert all(each.steps > 1 for each in plan(job(room, tmp_path, vary, budget="minutes", amount=0.05)))
    monkeypatch.setattr(lab, "_pace", lambda config, bundle, data: 0.01 * len(config.model.layers))
    deep, flat = plan(job(room, tmp_path, vary, budget="minutes", amount=0.1))
    assert (deep.steps, flat.steps) == (150, 600)


@pytest.mark.slow
def test_a_table_with_intervals_and_a_curve_and_going_on(room, tmp_path, monkeypatch):
    config = job(room, tmp_path / "out", "blocks.*.mixer.position=rope,none", amount=1200)
    ran = []

    def stops_after_three(run):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(run.out)
        return pretrain(run)

    monkeypatch.setattr(lab, "pretrain", stops_after_three)
    with pytest.raises(KeyboardInterrupt):
        ablate(config)
    monkeypatch.setattr(lab, "pretrain", pretrain)
    first, second = ablate(config)
    assert second.loss.value == pytest.approx(np.mean(second.by_seed)) and second.difference.value == pytest.approx(
        second.loss.value - first.loss.value
    )
    assert first.difference is None and len(set(first.by_seed)) == 2, "seeds differ"
    folders = [tmp_path / "out" / "runs" / f"position={kind}" / f"seed-{seed}" for kind in ("rope", "none") for seed in (0, 1)]
    assert all(len(history.read(folder)) == first.variant.steps for folder in folders), "no run was made twice"
    saved = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert [variant["variant"] for variant in saved["variants"]] == ["position=rope", "position=none"]
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert len(table) == 4 and all(len(line.split("|")) == len(table[0].split("|")) for line in table)
    assert (tmp_path / "out" / "curves.svg").read_text().count("<polyline") == 2
    assert list(rows_of([first, second])[1])[:5] == ["variant", "loss", "bits per byte", "against the first", "p"]


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("blocks.*.mixer.position", "PATH=VALUE"),
        ("blocks.*.mixer.position=rope", "two values or more"),
        ("blocks.other.mixer.position=rope,none", "nothing at blocks.other"),
        ("blocks.*.mixer.posture=rope,none", "nothing at blocks"),
        ("blocks.*.mixer.position=rope,rop", "rop"),
        ("blocks.*.mixer.heads=4,5", "multiple of kv_heads"),
        ("blocks.*.norm=rms,rms", "are the same"),
    ],
)
def test_what_cannot_be_varied_is_one_clear_error(vary, message, room, tmp_path):
    with pytest.raises(ConfigError, match=message):
        plan(job(room, tmp_path, vary))


def test_bad_budgets_and_bases(room, tmp_path):
    with pytest.raises(ConfigError, match="less than one step"):
        plan(job(room, tmp_path, amount=10))
    with pytest.raises(ConfigError, match="unknown preset"):
        plan(job(room, tmp_path, base="llama-9q"))
    with pytest.raises(ConfigError, match="held-out text"):
        job(room, tmp_path).replace(validation=())


@pytest.mark.slow
def test_the_command_line(room, tmp_path, trivium):
    options = [
        "--base", room / "base.yaml", "--vary", "blocks.*.ffn.gated=true,false", "--tokenizer", room / "tok", "--data", room / "train.jsonl",
        "--validation", room / "held-out.jsonl", "--length", "32", "--train.rows", "4", "--train.track", "[]", "--seeds", "1", "--amount", "300",
    ]  # fmt: skip
    dry = trivium.ok("ablate", *options, "--dry-run", "--json").json
    assert [row["variant"] for row in dry] == ["gated=true", "gated=false"] and dry[0]["parameters"] > dry[1]["parameters"]
    done = trivium.ok("ablate", *options)
    assert "gated=false" in done.out and "model.blocks.layer.ffn.gated" in done.err
    assert "vary" in trivium.refused("ablate", *options[4:], status=2)


def test_crossed_draws_runs_and_rows():
    """With one run it is the bootstrap over rows; a difference that is the same everywhere has no spread; a known spread is found."""
    random = np.random.default_rng(0)
    values, weights = random.normal(3, 1, (4, 200)), np.ones(200)
    a, b = crossed(values, weights), crossed(values + 0.5, weights)
    assert a.value == pytest.approx(values.mean()) and (b - a).interval().low == pytest.approx(0.5) and (b - a).p() < 0.01
    runs = random.normal(0, 1, (400, 1)) + np.zeros((1, 50))
    spread = crossed(runs, np.ones(50)).draws.std()
    assert spread == pytest.approx(runs.std() / 20, rel=0.1)
    assert (a - a).p() == 1.0
    with pytest.raises(DataError):
        crossed(values, np.ones(3))
