"""The measured table of methods, at toy size: runs are made once and shared, tables and verdicts say what the lines hold."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from trivium.adapt.freeze import Freeze
from trivium.adapt.lora import LoRA
from trivium.adapt.passes import apply_passes
from trivium.core.errors import DataError, FileError
from trivium.lab.experiments import methods
from trivium.lab.experiments.methods import runs, tables
from trivium.lab.experiments.methods.runs import Preferring, Run, Teaching, complete, measured
from trivium.lab.experiments.methods.ways import MASKING, PREFERRING, RANKS, TEACHING, UNTAUGHT, Way
from trivium.models import presets
from trivium.models.transformer import build
from trivium.train.preference import DPO, KTO

WAYS = {
    UNTAUGHT: TEACHING[UNTAUGHT],
    "full": Way(1e-2, "", {"adapter": None}),
    "last": Way(1e-2, "", {"adapter": None, "passes": (Freeze(last=1, train=("final_norm",)),)}),
    "lora": Way(1e-2, "", {"adapter": LoRA(rank=2)}),
}
SMALL = {"precision": "fp32", "steps": 3, "general": 2, "most": 4}


def teaching(toy: Path) -> Teaching:
    return Teaching(model=str(toy), texts=12, test=3, length=256, **SMALL)


def write_pairs(path: Path) -> Path:
    rows = [
        {
            "instruction": f"Where is parcel {n}?",
            "input": "",
            "output": "?",
            "chosen": f"On day {n}, thank you.",
            "rejected": f"No idea {n}",
        }
        for n in range(24)
    ]
    rows.append({**rows[0], "rejected": rows[0]["chosen"]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
@pytest.mark.concept("X.66", part="lab/experiments/methods/runs.py")
def test_runs_are_made_once_and_hold_what_was_measured(toy, tmp_path):
    job, made = teaching(toy), []

    def do(run: Run, base: str) -> dict:
        made.append(run.name)
        return measured(run, base)

    wanted = [Run(name, way, 0, job) for name, way in WAYS.items()]
    lines = complete(wanted, tmp_path, do=do)
    assert complete(wanted, tmp_path, do=do) == lines and made == list(WAYS)
    found = {run.name: lines[run.id] for run in wanted}
    everything = found["full"]["parameters"]
    assert found["full"]["trained"] == everything > found["last"]["trained"] > found["lora"]["trained"] > 0
    assert "trained" not in found[UNTAUGHT] and len(found["lora"]["losses"]) == 3
    assert all(len(line["exact"]) == len(line["answer logprobs"]) == 3 for line in found.values())
    assert found["full"]["answer logprobs"] != found[UNTAUGHT]["answer logprobs"]
    assert found["full"]["general tokens"] == found[UNTAUGHT]["general tokens"]
    assert found["lora"]["peak MB"] is None or found["lora"]["peak MB"] > 1


def test_a_run_depends_on_its_settings_and_a_cut_off_line_does_not_count(toy, tmp_path):
    job = teaching(toy)
    ids = {Run("a", way, seed, job).id for way in WAYS.values() for seed in (0, 1)} | {Run("a", WAYS["lora"], 0, job.replace(steps=4)).id}
    assert len(ids) == 2 * len(WAYS) + 1
    ledger = tmp_path / "runs.jsonl"
    ledger.write_text('{"id": "one", "x": 1}\n{"id": "two", "x"')
    assert list(runs.read(ledger)) == ["one"]


def _hold(path: Path, ready: object, done: object) -> None:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ready.set()
        done.wait(20)
        with path.with_name("runs.jsonl").open("a") as ledger:
            ledger.write(json.dumps({"id": path.stem, "minutes": 0, "by": "another"}) + "\n")


def test_what_another_process_is_at_is_left_to_it(toy, tmp_path):
    job = teaching(toy)
    first, second = Run("a", WAYS["full"], 0, job), Run("b", WAYS["lora"], 0, job)
    context = multiprocessing.get_context("fork")
    ready, done, made = context.Event(), context.Event(), []
    other = context.Process(target=_hold, args=(tmp_path / f"{first.id}.lock", ready, done))
    other.start()
    assert ready.wait(20)

    def do(run: Run, base: str) -> dict:
        made.append(run.name)
        done.set()
        return {"id": run.id, "minutes": 0}

    lines = complete([first, second], tmp_path, do=do)
    other.join()
    assert made == ["b"] and lines[first.id]["by"] == "another"


@pytest.mark.slow
def test_pairs_are_learned_and_scored(toy, tmp_path):
    job = Preferring(
        model=str(toy), pairs=str(write_pairs(tmp_path / "pairs.jsonl")), rows=1, length=96, train=12, test=4, asked=2, **SMALL
    )
    adapter = LoRA(rank=2)
    ways = {
        UNTAUGHT: PREFERRING[UNTAUGHT],
        "dpo": Way(1e-2, "", {"adapter": adapter, "objective": DPO()}),
        "kto": Way(1e-2, "", {"adapter": adapter, "objective": KTO()}),
        "sft, then dpo": Way(1e-2, "", {"adapter": adapter, "objective": DPO()}, first=1.0),
    }
    wanted = [Run(name, way, seed, job) for seed in (0, 1) for name, way in ways.items() if seed == 0 or name != UNTAUGHT]
    found = complete(wanted, tmp_path / "ledger", do=measured)
    lines = {name: [found[run.id] for run in wanted if run.name == name] for name in ways}
    table = tables.preferring(lines, ways, seeds=2)
    assert table[0]["pairs told apart"]["value"] == 0 and table[0]["trained"] == 0
    assert len({str(row["log-probability per token of chosen"]) for row in table}) == len(ways)
    assert lines["dpo"][0]["trained"] == lines["kto"][0]["trained"] and lines["dpo"][0]["peak MB"] != 0
    train, held = job.split(0)
    assert {row["instruction"] for row in train}.isdisjoint(row["instruction"] for row in held) and job.split(1)[1] == held
    with pytest.raises(DataError, match="24 pairs are of use"):
        job.replace(train=30).split(0)


@pytest.mark.slow
def test_every_way_fits_the_model_that_is_measured():
    """SmolLM2-135M's shape, without storage: what each way trains."""
    spec = presets.llama(dim=576, layers=30, heads=9, kv_heads=3, hidden=1536, vocab=49152, tied=True)
    trained = {}
    for name, way in (TEACHING | RANKS | MASKING | PREFERRING).items():
        if name == UNTAUGHT:
            continue
        model = apply_passes(build(spec), way.changes.get("passes", ()))
        if way.changes["adapter"] is not None:
            way.changes["adapter"].apply(model)
        trained[name] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        json.dumps(way.to_dict())
    assert trained["full"] == 134_515_008 and trained["tied head alone"] == 49152 * 576
    assert trained["lora"] == trained["qlora"] == trained["dpo"] == trained["kto"] == 4_884_480
    assert trained["lora 4"] * 4 == trained["lora"] == trained["lora 64"] / 4
    assert abs(trained["mora"] / trained["lora"] - 1) < 0.02 and trained["dora"] > trained["lora"]
    assert trained["prompt"] == 16 * 576 and trained["prefix"] == 2 * 30 * 16 * 192  # 2 L n d_kv
    assert 0.02 < trained["bottleneck"] / trained["full"] < 0.04


def test_pairs_must_be_named(monkeypatch):
    monkeypatch.delenv(methods.PAIRS, raising=False)
    with pytest.raises(FileError, match="TRIVIUM_PAIRS: not set"):
        methods.preferring_job(1.0)


def line(right: list[int], nats: float, *, general: float = -3.0) -> dict:
    return {
        "exact": right,
        "fields": [2 * one for one in right],
        "fields wanted": [2] * len(right),
        "answer logprobs": [-nats * 10] * len(right),
        "answer tokens": [10] * len(right),
        "general logprobs": [general * 100] * 2,
        "general tokens": [100] * 2,
        "trained": 10,
        "parameters": 100,
        "tokens per second": 50.0,
        "peak MB": 7.0,
    }


@pytest.mark.slow
def test_verdicts_say_what_the_lines_hold(monkeypatch):
    """Full learns most and forgets most; LoRA is far below it, the bottleneck equal; DoRA is better than LoRA at each rank."""
    all_right, half = [1] * 40, [1, 0] * 20
    by_way = {UNTAUGHT: [line([0] * 40, 2.0)]}
    for name in (*TEACHING, *RANKS):
        if name != UNTAUGHT:
            by_way[name] = [line(half, 1.0, general=-3.1)] * 3
    by_way["full"] = [line(all_right, 0.5, general=-3.5)] * 3
    by_way["bottleneck"] = [line(all_right, 0.5)] * 3
    for name in ("dora", "dora 4", "dora 64"):
        by_way[name] = [line(half, 0.9)] * 3
    monkeypatch.setattr(methods, "ran", lambda *_, **__: by_way)
    first, second = methods.fine_tuning(1.0), methods.adapter_ranks(1.0)
    assert "lora within 1 point of full does not hold" in first.verdict and "bottleneck within 1 point of full holds" in first.verdict
    assert first.numbers["table"][1]["exact match"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert "'DoRA consistently outperforms LoRA' holds" in second.verdict
    assert "'LoRA learns less' holds" in second.verdict and "'and forgets less' holds" in second.verdict
    assert np.isclose(second.numbers["lora less full, nats per token of general text"]["value"], -0.4)
    assert tables.markdown(first.numbers["table"]).count("\n") == len(TEACHING) + 1
