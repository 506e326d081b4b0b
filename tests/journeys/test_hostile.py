"""What goes wrong at the command line gets one clear line on stderr, the right status, and leaves nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.journeys.test_main_job import SFT, write_gguf
from tests.recipes.toys import Trivium, bundle, write_rows

pytestmark = pytest.mark.slow


def left(folder: Path) -> list[str]:
    """What lies below `folder`, the cache aside."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "cache" not in path.parts and path.is_file())


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("verify nowhere", "unknown model 'nowhere'"),
        ("verify smolm2", "did you mean 'smollm2'?"),
        ("chat nowhere hello", "unknown model 'nowhere'"),
        ("eval diff a.json b.json", "a.json: cannot be read: No such file"),
        ("adapter merge nowhere --out x", "nowhere: is no adapter directory"),
        ("data inspect nowhere.jsonl --model {toy}", "nowhere.jsonl: no such file or folder"),
        ("sft --model {toy} --data nowhere.jsonl", "nowhere.jsonl: no such file or folder"),
        ("inspect {toy} nowhere", "unknown model 'nowhere'"),
        ("convert {toy} --out out --family bert", "bert"),
        ("convert {toy} --out out --dtype int3", "int3"),
    ],
)
def test_what_is_not_there(trivium: Trivium, toy: Path, tmp_path: Path, command: str, said: str):
    assert said in trivium.refused(*command.format(toy=toy).split())
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("sft --config nowhere.yaml", "nowhere.yaml: No such file"),
        ("sft --config bad.yaml", "bad.yaml:3: not valid YAML"),
        ("sft --config odd.yaml", "odd.yaml:2"),
        ("sft --data rows.jsonl --optim.lr fast", "optim.lr"),
        ("sft --data rows.jsonl --optim.kind adamx", "did you mean 'adamw'?"),
        ("sft --dta rows.jsonl", "did you mean '--data'?"),
        ("sft rows.jsonl", "'rows.jsonl' belongs to no option"),
        ("sft", "data"),
        ("eval run --task.kind perplexity", "task.data"),
        ("eval run --task.kind perplexity --task.data x --out result.txt", "out"),
        ("eval rum", 'Did you mean "run"?'),
        ("generate", "name a model"),
        ("generate {toy} a b", "put the text in quotes"),
        ("generate {toy} hello --temperature -1", "temperature"),
        ("generate {toy} hello --temperature", "--temperature needs a value"),
        ("chat {toy} hello --top-q 1", "did you mean '--top_"),
        ("data prepare --out x", "name the data"),
        ("data prepare rows.jsonl", "--out"),
        ("inspect", "MODEL"),
    ],
)
def test_what_cannot_be_meant(trivium: Trivium, toy: Path, tmp_path: Path, command: str, said: str):
    (tmp_path / "bad.yaml").write_text("optim:\n  lr: [1, 2\n")
    (tmp_path / "odd.yaml").write_text("data: [rows.jsonl]\noptin: {lr: 1}\n")
    before = left(tmp_path)
    assert said in trivium.refused(*command.format(toy=toy).split(), status=2)
    assert left(tmp_path) == before


ROWS = {
    "not JSON": ('{"messages": [', "rows.jsonl:3: not valid JSON"),
    "another role": ('{"messages": [{"role": "robot", "content": "hi"}]}', "rows.jsonl:3"),
    "no known columns": ('{"question": "?"}', "rows.jsonl:3"),
    "half a row": ('{"messages": [{"role": "user", "con', "rows.jsonl:3: not valid JSON"),
    "nothing to learn": ('{"messages": [{"role": "user", "content": "hi"}]}', "1 of 3 rows have no token to train on"),
    "too long": (json.dumps({"messages": [{"role": "assistant", "content": "b" * 500}]}), "1 of 3 rows are longer than 160 tokens"),
    "special tokens in content": ('{"messages": [{"role": "assistant", "content": "<|im_end|>"}]}', "rows.jsonl:3"),
}


@pytest.mark.parametrize("case", ROWS)
def test_bad_rows_stop_before_the_first_step(trivium: Trivium, toy: Path, tmp_path: Path, case: str):
    line, said = ROWS[case]
    rows = write_rows(tmp_path / "rows.jsonl", count=2)
    rows.write_text(rows.read_text() + line)
    assert said in trivium.refused("sft", "--model", toy, "--data", "rows.jsonl", "--out", "run", *SFT)
    assert said in trivium.refused("data", "prepare", "rows.jsonl", "--model", toy, "--length", "160", "--out", "bank")
    assert left(tmp_path) == ["rows.jsonl"]


def test_an_empty_file_is_no_data(trivium: Trivium, toy: Path, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text("\n")
    for command in (("sft", "--model", toy, "--data", "rows.jsonl"), ("data", "inspect", "rows.jsonl", "--model", toy)):
        assert "no rows" in trivium.refused(*command)
    task = ("--task.kind", "generate", "--task.data", "rows.jsonl")
    assert "no rows" in trivium.refused("eval", "run", "--model", toy, *task, "--out", "result.json")
    assert left(tmp_path) == ["rows.jsonl"]


def test_a_prompt_longer_than_the_context(trivium: Trivium, toy: Path):
    for command in ("chat", "generate"):
        assert "the context of 256 leaves no room" in trivium.refused(command, toy, "hello " * 300)


def test_text_that_is_not_text(trivium: Trivium, toy: Path):
    assert "half a surrogate" in trivium.refused("generate", toy, "\udcff")


def full_after(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """The disk is full from the given write on: of files that are hashed on their way, and of checkpoints."""
    from trivium.io.files import HashingWriter

    write, os_write, done = HashingWriter.write, os.write, []

    def check() -> None:
        done.append(1)
        if len(done) > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(HashingWriter, "write", lambda self, data: (check(), write(self, data))[1])
    monkeypatch.setattr(os, "write", lambda descriptor, data: (check(), os_write(descriptor, data))[1])


@pytest.mark.parametrize("writes", [0, 1, 2, 20])
def test_a_full_disk(trivium: Trivium, toy: Path, tmp_path: Path, monkeypatch, writes: int):
    rows = write_rows(tmp_path / "rows.jsonl")
    trivium.ok("sft", "--model", toy, "--data", rows, "--out", "run", *SFT)
    before = left(tmp_path)
    full_after(monkeypatch, writes)
    for command in (
        ("convert", toy, "--out", "copy"),
        ("adapter", "merge", "run/adapter", "--out", "merged"),
        ("sft", "--model", toy, "--data", rows, "--out", "more", *SFT, "--train.save_every", "2"),
    ):
        done = trivium(*command)
        if writes < 20:
            assert done.status == 1 and done.out == "", done
        if done.status:
            assert "No space left on device" in done.err and "Traceback" not in done.err
    monkeypatch.undo()
    os.chdir(tmp_path)
    whole = [name for name in left(tmp_path) if not name.startswith("more/")]
    assert not [name for name in whole if ".partial" in name or ".old-" in name]
    if writes == 0:
        assert whole == before and not (tmp_path / "more" / "adapter").exists()
    # The run goes on where it was, once there is room.
    trivium.ok("sft", "--model", toy, "--data", rows, "--out", tmp_path / "more", *SFT, "--train.save_every", "2")
    one, other = ((tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("run", "more"))
    assert one == other


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_gguf(trivium: Trivium, toy: Path, tmp_path: Path, keep: float):
    path = write_gguf(tmp_path / "toy.gguf", toy)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    for command in (("verify", path), ("convert", path, "--out", "model"), ("data", "inspect", path.with_suffix(".txt"), "--model", path)):
        path.with_suffix(".txt").write_text("a text")
        assert "toy.gguf" in trivium.refused(*command)
    assert left(tmp_path) == ["toy.gguf", "toy.txt"]


def test_truncated_weights(trivium: Trivium, toy: Path, tmp_path: Path):
    shutil.copytree(toy, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in trivium.refused("chat", "model", "hello")
    (tmp_path / "model" / "trivium.json").unlink()
    assert "model.safetensors" in trivium.refused("chat", "model", "hello")


def test_an_adapter_of_another_base(trivium: Trivium, toy: Path, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl")
    trivium.ok("sft", "--model", toy, "--data", rows, "--out", "run", *SFT)
    bundle(seed=9).save(tmp_path / "other")
    said = trivium.refused("adapter", "merge", "run/adapter", "--base", "other", "--out", "merged")
    assert "was trained on other base weights" in said and not (tmp_path / "merged").exists()
    assert "was trained on other base weights" in trivium.refused("chat", "other", "hi", "--adapter", "run/adapter")
    trivium.ok("adapter", "merge", "run/adapter", "--base", "other", "--accept", "--out", "merged")


def test_a_merge_above_its_tolerance_writes_nothing(trivium: Trivium, toy: Path, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl")
    trivium.ok("convert", toy, "--dtype", "bf16", "--out", "base")
    trivium.ok("sft", "--model", "base", "--data", rows, "--out", "run", *SFT)
    done = trivium("adapter", "merge", "run/adapter", "--out", "merged", "--tolerance", "1e-9")
    assert done.status == 1 and "more than 1e-09: merge in float32 (--dtype fp32)" in done.err
    assert not (tmp_path / "merged").exists()


def test_a_folder_of_another_run(trivium: Trivium, toy: Path, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl")
    trivium.ok("sft", "--model", toy, "--data", rows, "--out", "run", *SFT)
    before = {name: (tmp_path / name).read_bytes() for name in left(tmp_path)}
    said = trivium("sft", "--model", toy, "--data", rows, "--out", "run", *SFT, "--optim.lr", "1")
    assert said.status == 1 and "belongs to another run" in said.err and "optim.lr: was 0.005, is now 1.0" in said.err
    assert {name: (tmp_path / name).read_bytes() for name in left(tmp_path)} == before


def test_a_failed_check_is_status_1(trivium: Trivium, toy: Path, monkeypatch):
    from trivium.recipes import verify

    monkeypatch.setattr(verify, "_distance", lambda a, b: 1)
    done = trivium("verify", toy, "--json")
    assert done.status == 1 and [check["pass"] for check in done.json].count(False) == 2
