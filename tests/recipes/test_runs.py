"""`trivium runs`: found, compared, drawn."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from trivium.recipes import runs


@pytest.fixture
def two(tmp_path):
    for name, lr, losses in (("a", 0.1, (3.0, 2.0)), ("b/c", 0.2, (3.0, 1.5, 1.0))):
        path = tmp_path / "runs" / name
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(f"model: m\nout: {name}\noptim:\n  kind: adamw\n  lr: {lr}\n")
        rows = [{"step": i + 1, "loss": loss, "seconds": 30.0, "validation": {"loss": loss + 1}} for i, loss in enumerate(losses)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "runs"


def test_list_and_compare(trivium, two):
    found = trivium.ok("runs", two, "--json").json
    assert [(row["steps"], row["loss"], row["best validation"], row["minutes"]) for row in found] == [
        (2, 2.0, 3.0, 1.0),
        (3, 1.0, 2.0, 1.5),
    ]
    shown = trivium.ok("runs", two).out
    assert str(two / "a") in shown and "best validation" in shown
    rows = {row.pop("what"): list(row.values()) for row in trivium.ok("runs", two / "a", two / "b" / "c", "--json").json}
    assert rows == {"optim.lr": [0.1, 0.2], "steps": [2, 3], "loss": [2.0, 1.0], "best validation": [3.0, 2.0], "minutes": [1.0, 1.5]}


def test_draw(trivium, two, tmp_path):
    trivium.ok("runs", two, "--plot", "curves.svg", "--metric", "validation.loss")
    tree = ElementTree.parse(tmp_path / "curves.svg").getroot()
    lines = [element for element in tree.iter() if element.tag.endswith("polyline")]
    assert [len(line.get("points").split()) for line in lines] == [2, 3]
    with pytest.raises(ValueError, match="none of these runs has a metric 'perplexity'"):
        runs.plot([two / "a"], tmp_path / "x.svg", metric="perplexity")


def test_what_is_no_run(trivium, two):
    assert "is no folder of runs" in trivium.refused("runs", two / "none")
    assert "holds no run" in trivium.refused("runs", two / "a", two)
    assert trivium.ok("runs", two / "a" / "..", "--json").json
