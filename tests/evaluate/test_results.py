"""Result files: what they record, that they read back, and what a comparison of two says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.evaluate import subject as ours
from tests.evaluate import toys
from trivium.checks import bootstrap
from trivium.core.errors import ConfigError, DataError, FileError
from trivium.core.spec import validate
from trivium.evaluate import results
from trivium.evaluate.choices import Choices
from trivium.evaluate.perplexity import Perplexity
from trivium.evaluate.task import Task


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in toys.questions(20)))
    return path


def measured(task, path, *, seed=0, weights="w"):
    result, samples = results.measure(task, ours.subject(seed), model="toy", weights=weights, command=["trivium", "eval"])
    return results.save(path, result, samples), samples


def test_a_result_says_what_was_measured_on_what(data, tmp_path):
    task = Choices(data=(str(data),), limit=15)
    result, samples = measured(task, tmp_path / "out" / "a.json", weights="abc")
    assert results.load(tmp_path / "out" / "a.json") == (result, samples)
    raw = json.loads((tmp_path / "out" / "a.json").read_text())
    assert raw["format"] == 1
    assert validate(Task, raw["task"]) == task
    assert raw["hashes"]["weights"] == "abc" and len(raw["hashes"]["tokenizer"]) == 64 == len(raw["hashes"]["data/questions.jsonl"])
    assert raw["first_prompt"] == ours.tokenizer().encode(toys.questions(1)[0]["question"] + "\nAnswer:")
    assert raw["versions"]["torch"] and raw["machine"]["threads"] >= 1 and raw["command"] == ["trivium", "eval"]
    assert raw["metrics"]["acc"]["rows"] == 15 and list(raw["metrics"]) == ["acc", "acc_norm", "acc_bytes"]
    assert raw["metrics"]["acc"]["low"] <= raw["metrics"]["acc"]["value"] <= raw["metrics"]["acc"]["high"]
    assert raw["report"]["gap"]["pairs"]
    assert raw["samples"] == "a.samples.jsonl"
    assert len((tmp_path / "out" / "a.samples.jsonl").read_text().splitlines()) == 15


def test_one_row_has_a_value_and_no_interval(data, tmp_path):
    result, _ = measured(Choices(data=(str(data),), limit=1), tmp_path / "a.json")
    assert result.metrics["acc"].low is None and result.metrics["acc"].value in (0, 1)


def test_diff_says_what_changed_how_much_and_which_rows_flipped(data, tmp_path):
    task = Choices(data=(str(data),))
    _, left = measured(task, tmp_path / "a.json", seed=0, weights="one")
    _, right = measured(task.replace(delimiter=""), tmp_path / "b.json", seed=1, weights="two")
    found = results.diff(tmp_path / "a.json", tmp_path / "b.json")
    assert found.settings == [("task.delimiter", " ", ""), ("hashes.weights", "one", "two")]
    a, b = (np.array([sample.terms["acc"].numerator for sample in side]) for side in (left, right))
    assert found.metrics["acc"] == bootstrap.paired(np.stack([a, np.ones(20)], 1), np.stack([b, np.ones(20)], 1), bootstrap.ratio)
    assert found.metrics["acc"].value == pytest.approx(b.mean() - a.mean())
    assert [flip.key for flip in found.flips] == [sample.key for sample, x, y in zip(left, a, b, strict=True) if x != y] != []
    assert {(flip.a, flip.b) for flip in found.flips} <= {(0, 1), (1, 0)}
    assert found.flips[0].shown_a["picks"] != found.flips[0].shown_b["picks"]


def test_diff_with_itself_is_empty(data, tmp_path):
    measured(Choices(data=(str(data),)), tmp_path / "a.json")
    found = results.diff(tmp_path / "a.json", tmp_path / "a.json")
    assert found.settings == [] and found.flips == [] and found.rows == 20
    assert all((one.low, one.value, one.high) == (0, 0, 0) for one in found.metrics.values())


def test_diff_pairs_rows_by_content(data, tmp_path):
    """The same questions in another order, some of them twice, some missing."""
    lines = data.read_text().splitlines(keepends=True)
    other = tmp_path / "other.jsonl"
    other.write_text("".join([*reversed(lines[5:]), lines[7], lines[7]]))
    data.write_text("".join([*lines, lines[7]]))
    measured(Choices(data=(str(data),)), tmp_path / "a.json")
    measured(Choices(data=(str(other),)), tmp_path / "b.json")
    found = results.diff(tmp_path / "a.json", tmp_path / "b.json")
    assert (found.rows, found.only_a, found.only_b) == (16, 5, 1)
    assert found.metrics["acc"].value == 0 and found.flips == []


def test_diff_of_perplexities_resamples_e_to_the_ratio(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in toys.texts()))
    task = Perplexity(data=(str(path),))
    one, _ = measured(task, tmp_path / "a.json")
    two, _ = measured(task.replace(context=16, stride=4), tmp_path / "b.json")
    found = results.diff(tmp_path / "a.json", tmp_path / "b.json")
    difference = two.metrics["perplexity"].value - one.metrics["perplexity"].value
    assert found.metrics["perplexity"].value == pytest.approx(difference)
    assert found.flips == []
    assert [row[0] for row in found.settings] == ["task.context", "task.stride"]


def test_results_that_have_nothing_in_common(data, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in toys.texts()))
    measured(Choices(data=(str(data),)), tmp_path / "a.json")
    measured(Perplexity(data=(str(path),)), tmp_path / "b.json")
    with pytest.raises(DataError, match="share 0 rows and 0 metrics"):
        results.diff(tmp_path / "a.json", tmp_path / "b.json")


def test_damaged_results_are_named(data, tmp_path):
    measured(Choices(data=(str(data),), limit=3), tmp_path / "a.json")
    samples = tmp_path / "a.samples.jsonl"
    whole = samples.read_text()
    samples.write_text(whole.replace('"terms"', '"term"', 1))
    with pytest.raises(FileError, match=r"a\.samples\.jsonl:1: is no sample"):
        results.load(tmp_path / "a.json")
    samples.unlink()
    with pytest.raises(DataError, match=r"a\.samples\.jsonl: no such file"):
        results.load(tmp_path / "a.json")
    raw = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps({**raw, "metric": {}}))
    with pytest.raises(ConfigError, match="did you mean 'metrics'"):
        results.load(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps({**raw, "format": 2}))
    with pytest.raises(ConfigError, match="format"):
        results.load(tmp_path / "a.json")
    with pytest.raises(FileError, match=r"ends in \.json"):
        results.save(tmp_path / "a.txt", validate(results.Result, raw), [])


def test_a_task_without_rows_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows to measure on"):
        results.measure(Choices(data=(str(tmp_path / "empty.jsonl"),)), ours.subject(), model="toy", weights="w", command=[])
