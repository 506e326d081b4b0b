"""What the pages say is true: every command runs, every block of Python too, and what is named is there.

README's commands and code run on a toy model in place of the real one. CONTRIBUTING's files are written into a copy of the
tree, where its linters and tests must take them as they stand.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from trivium import cli

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
every_page = pytest.mark.parametrize("page", PAGES)
OURS = ("trivium/", "tests/", "benchmarks/", "docs/")  # where a path in backticks must exist


@cache
def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def fenced(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text(page), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    lines = [line for block in fenced(page, "sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def inline(page: str) -> list[str]:
    """What stands in single backticks, outside of fenced blocks."""
    prose = re.sub(r"^```.*?^```$", "", text(page), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader of README works: the rows that it says to save are there."""
    path = tmp_path_factory.mktemp("reader")
    saved = re.findall(r"`(\w+\.jsonl)`:\n\n```jsonl\n(.*?)^```$", text("README.md"), re.MULTILINE | re.DOTALL)
    assert [name for name, _ in saved] == ["rows.jsonl", "test.jsonl"]
    for name, rows in saved:
        (path / name).write_text(rows, encoding="utf-8")
    return path


@pytest.mark.slow
def test_commands_run(folder, toy, trivium, monkeypatch):
    monkeypatch.chdir(folder)
    seen = set()
    for words in commands("README.md"):
        if words[0] == "make":
            continue
        assert words[0] == "trivium", words
        seen.add(found.name if (found := cli.find(words[1:])) else None)
        done = trivium.ok(*(toy if word == "smollm2" else word for word in words[1:]))
        assert done.out, shlex.join(words)
    assert {"pull", "verify", "chat", "sft", "eval run", "eval diff", "adapter merge", "convert"} <= seen


@pytest.mark.slow
def test_python_runs(folder, toy, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    for block in fenced("README.md", "python"):
        exec(compile(block.replace('"smollm2"', repr(str(toy))), "README.md", "exec"), names)
    assert names["logits"].shape == (*names["tokens"].shape, 448)
    assert (names["run"].path / "adapter_model.safetensors").is_file() and names["run"].metrics["loss"] > 0
    assert capsys.readouterr().out.count("\n") >= 2


def test_transcript_has_its_place():
    assert re.search(r"^<!-- demo transcript -->\n(.*\n)*?<!-- demo transcript: end -->$", text("README.md"), re.MULTILINE)


@every_page
def test_targets_of_make_exist(page):
    known = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = [words[1] for words in [*commands(page), *map(str.split, inline(page))] if words[0] == "make" and len(words) > 1]
    assert set(named) <= set(known)
    assert page != "README.md" or {"demo", "test"} <= set(named)


@every_page
def test_links_and_paths_lead_somewhere(page):
    made = {block.partition("\n")[0].removeprefix("# ") for block in fenced("CONTRIBUTING.md", "python")}
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text(page)) if "://" not in link]
    paths = [code.partition("::")[0] for code in inline(page) if code.startswith(OURS) and " " not in code]
    missing = [name for name in [*links, *paths] if not (ROOT / name).exists() and name not in made]
    assert not missing


@every_page
def test_tests_that_are_named_exist(page):
    for code in inline(page):
        file, _, name = code.partition("::")
        if name:
            assert re.search(rf"^ *def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), code


@cache
def options(name: str) -> frozenset[str]:
    """The options that a command's help lists."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main([*name.split(), "--help"]) == 0
    return frozenset(found.replace("-", "_") for found in re.findall(r"--([a-z][\w.-]*)", out.getvalue()))


@every_page
def test_commands_and_options_that_are_named_exist(page):
    for code in inline(page):
        words = code.split()
        if words[0] == "trivium" and len(words) > 1:
            found = cli.find(words[1:])
            assert found or words[1] in (*cli.GROUPS, "--help"), code
        elif words[0].startswith("--"):
            found = None
        else:
            continue
        listed = options(found.name) if found else frozenset().union(*(options(command.name) for command in cli.COMMANDS))
        known = {"help"} | {option.partition(".")[0] for option in listed}
        for word in words:
            if word.startswith("--"):
                assert word[2:].partition(".")[0].replace("-", "_") in known, code


def test_floors_are_those_of_the_tree():
    table = re.findall(r"^\| \d+ \| ([^|]+) \|", text("README.md"), re.MULTILINE)
    named = [name for cell in table for name in re.findall(r"`(\w+)/`", cell)]
    assert len(named) == len(set(named)), "a folder stands on two floors"
    assert set(named) == {path.parent.name for path in (ROOT / "trivium").glob("*/__init__.py")}, "README's table of floors"


# CONTRIBUTING's files


@pytest.fixture(scope="module")
def contributed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A copy of the tree with every file of CONTRIBUTING written where its first line says; and their names."""
    copy = tmp_path_factory.mktemp("contributed")
    for name in ("trivium", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    names = []
    for block in fenced("CONTRIBUTING.md", "python"):
        first, _, body = block.partition("\n")
        name = first.removeprefix("# ")
        assert not (copy / name).exists(), f"{name} is there already: the example needs another one"
        (copy / name).write_text(body, encoding="utf-8")
        names.append(name)
    return copy, names


def run_in(copy: Path, *arguments: str) -> str:
    """The output of a Python module in `copy`; what pytest told this process stays here."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHONPATH"))}
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_contributed_files_pass_the_tests(contributed):
    copy, names = contributed
    tests = [name for name in names if name.startswith("tests/")]
    assert len(tests) == 3
    chosen = "norm-scale or next_token_z or test_scale_norm or seed_oss"
    shared = ["tests/contracts/test_parts.py", "tests/train/test_parts.py"]
    out = run_in(copy, "pytest", "-v", "-p", "no:cacheprovider", "-k", chosen, *tests, *shared)
    passed = [line for line in out.splitlines() if "PASSED" in line]
    for name, least in {**dict.fromkeys(tests, 1), "norm-scale]": 12, "[next_token_z]": 2}.items():
        assert sum(name in line for line in passed) >= least, f"{name}\n{out}"


@pytest.mark.slow
def test_contributed_files_are_in_house_style(contributed):
    copy, names = contributed
    run_in(copy, "ruff", "check", *names)
    run_in(copy, "ruff", "format", "--check", *names)
    run_in(
        copy,
        "pyrefly",
        "check",
        "--summary=none",
        f"--python-interpreter-path={sys.executable}",
        *(name for name in names if name.startswith("trivium/")),
    )
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache", "--no-logo"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_contributed_parts_are_found_by_name(contributed):
    """By configs and options, without any list to add them to."""
    copy, _ = contributed
    flags = next(code for code in inline("CONTRIBUTING.md") if code.startswith("--objective")).split()
    program = (
        "from trivium.cli.options import resolve; from trivium.recipes.sft import SFT; from trivium.core.spec import validate; "
        "from trivium.nn.norms import Norm; from trivium.io.hf import families; "
        f"print(resolve(SFT, (), ['--data', 'x', *{flags}], aliases={{}}).objective.share, validate(Norm, 'scale').eps, 'seed_oss' in families)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True)
    assert done.stdout == "0.001 1e-05 True\n", done.stderr
