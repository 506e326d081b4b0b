"""The table of what works is generated from marks and result files, and the committed copy is that one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trivium.adapt.passes import Pass
from trivium.core.errors import ConfigError, DataError
from trivium.core.spec import Part
from trivium.lab import concepts
from trivium.train.objectives import Objective

ROOT = Path(__file__).parents[2]


def checkout(tmp_path: Path, source: str) -> Path:
    (tmp_path / "tests" / "nn").mkdir(parents=True)
    (tmp_path / "tests" / "nn" / "test_a.py").write_text(source)
    (tmp_path / "README.md").write_text(f"# T\n\n{concepts.BEGIN}\nold\n{concepts.END}\nrest\n")
    return tmp_path


def test_committed_table_is_the_generated_one():
    assert concepts.STATUS.read_text(encoding="utf-8") == concepts.status_text(ROOT), "run 'make concepts'"


def test_readme_table_is_the_generated_one():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == concepts.readme_text(ROOT), "run 'make concepts'"


def test_rows_are_well_formed():
    rows = concepts.rows()
    assert len(rows) == len({row.id for row in rows}) == 313
    assert {row.tier for row in rows} == {"A", "B", "C"}
    assert all(row.measured for row in rows if row.gpu)


SOURCE = """
import pytest
pytestmark = [pytest.mark.slow, pytest.mark.concept("T01.03", part="core/seed.py")]

@pytest.mark.concept("T01.01", "T01.02", part="core/spec.py")
def test_one(): ...

class TestMany:
    @pytest.mark.concept("T01.06", part="core/log.py")
    @pytest.mark.parametrize("x", [1])
    def test_two(self, x): ...

@pytest.mark.skip
@pytest.mark.concept("T01.04", part="core/spec.py")
def test_three(): ...

@pytest.mark.concept("T01.01", part="core/log.py")
def test_four(): ...
"""


def claim(folder: Path, *ids: str, gpu: bool) -> None:
    folder.mkdir(exist_ok=True)
    body = {"concepts": ids, "command": "c", "seeds": [0], "machine": "m", "gpu": gpu, "date": "d", "numbers": {}, "verdict": "holds"}
    (folder / f"{'-'.join(ids)}-{gpu}.json").write_text(json.dumps(body))


def test_marks_are_read_without_importing(tmp_path):
    found = concepts.collect(checkout(tmp_path, SOURCE))
    assert found["T01.01"]["part"] == "core/spec.py" and found["T01.01"]["test"] == "tests/nn/test_a.py::test_one"
    assert found["T01.06"]["test"] == "tests/nn/test_a.py::TestMany::test_two"
    assert found["T01.03"]["test"] == "tests/nn/test_a.py"
    assert list(found) == ["T01.01", "T01.02", "T01.03", "T01.06"]


def test_status_counts_the_halves_that_a_row_asks_for(tmp_path, monkeypatch):
    monkeypatch.setattr(concepts, "CLAIMS", tmp_path / "claims")
    root = checkout(tmp_path, '@pytest.mark.concept("T01.02", "T01.06", "T17.01", part="core/spec.py")\ndef test_x(): ...')

    def statuses() -> list[str]:
        return [entry["status"] for entry in concepts.collect(root).values()]

    assert statuses() == [concepts.WORKS, concepts.CHECKED, concepts.CHECKED]
    claim(tmp_path / "claims", "T01.06", "T17.01", gpu=False)
    assert statuses() == [concepts.WORKS, concepts.WORKS, concepts.NO_GPU]
    claim(tmp_path / "claims", "T17.01", gpu=True)
    assert statuses() == [concepts.WORKS, concepts.WORKS, concepts.WORKS]
    (tmp_path / "claims" / "bad.json").write_text('{"concepts": []}')
    with pytest.raises(DataError, match=r"bad\.json: a claim's result needs command"):
        statuses()


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ('concept("T01.1", part="core/spec.py")', "unknown concept 'T01.1'; did you mean 'T01.01'"),
        ('concept("T01.01", part="core/nothing.py")', r"core/nothing\.py.* is no file"),
        ('concept("T01.01")', "literals only"),
        ('concept(NAME, part="core/spec.py")', "literals only"),
        ("concept", "literals only"),
        ('concept(part="core/spec.py")', "literals only"),
    ],
)
def test_wrong_marks_name_the_test(mark, message, tmp_path):
    with pytest.raises(ConfigError, match=rf"tests/nn/test_a\.py::test_x.*{message}"):
        concepts.collect(checkout(tmp_path, f"@pytest.mark.{mark}\ndef test_x(): ..."))


def test_write_replaces_only_what_is_between_the_markers(tmp_path, monkeypatch):
    monkeypatch.setattr(concepts, "STATUS", tmp_path / "status.json")
    root = checkout(tmp_path, '@pytest.mark.concept("T01.02", part="core/spec.py")\ndef test_x(): ...')
    assert len(concepts.write(root)) == 2 and concepts.write(root) == []
    text = (root / "README.md").read_text()
    assert text.startswith("# T\n") and text.endswith("rest\n") and "old" not in text
    assert "| T01.02 | Multi-head attention | works | `core/spec.py` |" in text and "312 not yet" in text
    (root / "README.md").write_text("# T\n")
    with pytest.raises(DataError, match=r"README\.md: needs one line"):
        concepts.write(root)


def test_table_is_searched_by_id_and_by_words():
    assert [row["id"] for row in concepts.table("t01.0")] == [f"T01.0{i}" for i in range(1, 10)]
    assert [row["name"] for row in concepts.table("multi-query")] == ["Multi-query attention (MQA)"]
    assert len(concepts.table()) == 313 and list(concepts.table()[0]) == ["id", "name", "tier", "status", "part", "test", "lines"]
    with pytest.raises(ConfigError, match="unknown concept"):
        concepts.table("perpetual motion")


CODE = '''"""A module's docstring,

of three lines."""

# a comment
import os  # code, and a comment


class A:
    """One line."""

    text = """two lines
    of code"""

    def f(self, x):
        \"\"\"A docstring
        of two lines.\"\"\"
        return (x +
                os.sep)
'''


def test_lines_of_code(tmp_path, monkeypatch):
    """Neither blank lines, nor comments, nor docstrings; every line of what goes over several."""
    (tmp_path / "a.py").write_text(CODE.replace('\\"', '"'))
    (tmp_path / "b.cpp").write_text("// a comment\n\nint x = 1;  // code\n")
    monkeypatch.setattr(concepts, "PACKAGE", tmp_path)
    assert concepts.lines("a.py") == 7 and concepts.lines("a.py", "A") == 6 and concepts.lines("b.cpp") == 1
    monkeypatch.undo()
    assert all(row["lines"] == concepts.lines(row["part"]) > 0 for row in concepts.table("T06") if row["part"])


def test_a_method_stands_in_one_place():
    """Each way to adapt a model has a file of its own, and each objective a class."""
    files = {kind: member.__module__ for kind, member in Pass.registry.items() if member.__module__.startswith("trivium.adapt.")}
    assert len(files) > 9 and len(set(files.values())) == len(files)
    losses = [member for _, member in Objective.registry.items() if member.__module__.startswith("trivium.")]
    assert len({member.__qualname__ for member in losses}) == len(losses)
    methods = {
        row["id"]: row["part"]
        for row in concepts.table()
        if row["id"] in ("T06.03", "T06.04", "T06.05", "T06.06", "T06.07", "T06.08", "X.64", "X.65")
    }
    assert len(set(methods.values())) == len(methods) == 8, methods


def test_every_exemption_is_in_the_table():
    """Whatever part says that it does not keep something shows a form of itself that does not."""
    table = concepts.exempt()
    listed = {(row["part"], row["kind"]) for row in table}
    for root in (root for root in concepts.below(Part) if "registry" in vars(root)):
        for kind, member in root.registry.items():
            if any("exempt" in vars(base) for base in member.__mro__ if base is not Part) and member.__module__.startswith("trivium."):
                shown = member.exempted()
                assert (root.registry.what, kind) in listed or shown is None, kind
                assert shown is None or shown.exempt, kind
    assert {
        ("ffn", "moe"),
        ("mixer", "cross"),
        ("rope scaling", "dynamic"),
        ("rope scaling", "longrope"),
        ("objective", "next_token"),
    } <= listed
    assert all(row["contract"] and row["reason"] for row in table)
