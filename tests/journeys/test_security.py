"""Promises of SECURITY.md that belong to the whole library: no code from models, one renderer, known doors to the network, no tokens shown."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch

import trivium as tv
from trivium import cli
from trivium.core.errors import TriviumError

PACKAGE = Path(tv.__file__).parent
SECRET = "hf_thisMustNeverBeShown"

UNSAFE = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "code"}
RUNS = {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
NETWORK = {"socket", "ssl", "http", "urllib", "ftplib", "smtplib", "requests", "httpx", "aiohttp", "urllib3", "huggingface_hub"}


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> set[str]:
    """The top packages that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found


def test_the_library_has_no_way_to_run_files():
    for name, tree in trees():
        assert not imported(tree) & UNSAFE, name
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.keyword) and node.arg == "trust_remote_code"), name
            if isinstance(node, ast.Call):
                called, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert called not in RUNS and options.get("allow_pickle", "False") == "False", f"{name}:{node.lineno}: {called}"


def test_templates_are_rendered_in_one_place():
    """Besides the renderer, our own report's template, and `verify`, which compares with jinja2 on a conversation of ours."""
    assert [name for name, tree in trees() if "jinja2" in imported(tree)] == ["recipes/report.py", "recipes/verify.py", "text/template.py"]


def test_only_pulling_and_pushing_reach_the_network():
    assert {name for name, tree in trees() if imported(tree) & NETWORK} == {"io/pull.py", "recipes/push.py"}


def test_code_beside_a_model_is_never_run(toy, tmp_path):
    model, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(toy, model)
    evil = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    for name in ("modeling_toy.py", "configuration_toy.py", "tokenization_toy.py", "__init__.py", "setup.py", "conftest.py"):
        (model / name).write_text(evil)
    torch.save({"weight": _Touches(str(mark))}, model / "pytorch_model.bin")
    config = json.loads((model / "config.json").read_text())
    (model / "trivium.json").unlink()
    (model / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling_toy.Toy"}}))
    with pytest.raises(TriviumError, match="auto_map"):
        tv.load(model)
    assert tv.load(model, allow_unknown=["auto_map"]).chat("hi").ids
    (model / "model.safetensors").unlink()
    with pytest.raises(TriviumError, match="pickles"):
        tv.load(model, allow_unknown=["auto_map"])
    assert not mark.exists()
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert mark.exists(), "the trap itself must work"


class _Touches:
    """Unpickling this makes a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.slow
def test_access_tokens_are_never_shown(toy, tmp_path, monkeypatch, capsys):
    """Not by commands that succeed, that fail, or that are debugged; and in no file that they leave."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://someone:{SECRET}@127.0.0.1:9/simple")  # where nobody listens
    assert huggingface_hub.get_token() == SECRET
    monkeypatch.setenv("TRIVIUM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    model = str(toy)
    for words, status in [
        (["doctor", "--quick", "--json"], 0),
        (["inspect", model], 0),
        (["sft", "--model", model, "--data", "rows.jsonl", "--out", "run", "--train.steps", "1"], 0),
        (["eval", "run", "--model", model, "--task.kind", "generate", "--task.data", "rows.jsonl", "--out", "result.json"], 0),
        (["pull", "someone/private-model"], 1),
        (["pull", "package:private-model==1.0"], 1),
    ]:
        assert cli.main(words) == status, words
        shown = capsys.readouterr()
        assert SECRET not in shown.out + shown.err
    with pytest.raises(TriviumError) as error:
        cli.main(["pull", "someone/private-model", "--debug"])
    chain = error.value
    while chain is not None:
        assert SECRET not in f"{chain!s} {chain!r}"
        chain = chain.__cause__ or chain.__context__
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(left) > 5 and not [path for path in left if SECRET.encode() in path.read_bytes()]
