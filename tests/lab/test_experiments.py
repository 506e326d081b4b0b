"""Experiments: all are registered with rows that exist and a question; each settled claim's file names its command; one runs."""

from __future__ import annotations

import json
import sys

import pytest

from trivium.lab import concepts
from trivium.lab.experiments import experiments, run, small


def test_every_experiment_measures_rows_that_exist():
    known = {row.id: row for row in concepts.rows()}
    for name, each in experiments.items():
        assert each.concepts and set(each.concepts) <= known.keys(), name
        assert each.question.endswith("?")


def test_every_claim_names_its_command_and_its_rows():
    for path in concepts.CLAIMS.glob("*.json"):
        claim = json.loads(path.read_text(encoding="utf-8"))
        assert claim["command"].startswith("python -m trivium.lab.experiments ") or claim["command"].startswith("trivium "), path
        name = claim["command"].rsplit(" ", 1)[-1]
        if name in experiments:
            assert tuple(claim["concepts"]) == experiments.get(name).concepts, path
        assert claim["numbers"] and claim["verdict"] and claim["date"]


@pytest.mark.parametrize(("effort", "written"), [("0.5", False), ("1", True)])
def test_the_command_runs_an_experiment_and_writes_what_it_found(effort, written, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "CLAIMS", tmp_path / "claims")
    monkeypatch.setattr(sys, "argv", ["x", "attention-scale", "--effort", effort])
    run.main()
    out = capsys.readouterr().out
    assert "Holds: scaled variance" in out
    assert [path.name for path in tmp_path.glob("claims/*")] == (["attention-scale.json"] if written else [])
    if written:
        claim = json.loads((tmp_path / "claims" / "attention-scale.json").read_text())
        assert claim["concepts"] == ["T01.01"] and claim["command"].endswith("attention-scale") and claim["gpu"] is False


def test_statistics_of_experiments():
    gap = small.paired([1.0, 2.0, 3.0], [1.5, 2.4, 3.6])
    assert gap["mean"] == pytest.approx(0.5) and gap["low"] < 0.5 < gap["high"]
    assert gap["high"] - gap["mean"] == pytest.approx(0.1 / 3**0.5 * 4.3027, rel=1e-3)  # t of 2 degrees of freedom
    for freedom, quantile in ((1, 12.706), (9, 2.262), (10, 2.2281), (15, 2.1314), (30, 2.0423)):
        assert small.student(freedom) == pytest.approx(quantile, abs=5e-4)
    assert small.exponent([10, 100, 1000], [5, 500, 50_000]) == pytest.approx(2)
