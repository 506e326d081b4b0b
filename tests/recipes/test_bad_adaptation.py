"""What cannot be learned from, or adapted, is one clear error before the first step, and leaves nothing behind."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.recipes.toys import Trivium, bundle
from trivium.recipes.sft import SFT, sft

USER, SAYS = ({"role": role, "content": "Where is my order?"} for role in ("user", "assistant"))
GOOD = {"messages": [USER, SAYS]}
PAIR = {"prompt": [USER], "chosen": [SAYS], "rejected": [{**SAYS, "content": "No idea."}]}
LONG = {**USER, "content": "where is my order and when does it come " * 60}

CASES = {  # command, its rows, what is said
    "a target that matches nothing": ("sft --adapter.targets [query]", [GOOD], "target 'query' matches no linear map of the model (there are: "),
    "ranks of a map that is not adapted": ("sft --adapter.targets [q] --adapter.ranks '{v: 3}'", [GOOD], "ranks: 'v' matches none of the adapted"),
    "a rank above the layer's size": ("sft --adapter.rank 49", [GOOD], "rank 49 is above the size of layers.0."),
    "a square above it": ("sft --adapter.kind mora --adapter.rank 49", [GOOD], "rank 49 is above the size of layers.0."),
    "more layers than there are": ("sft --adapter.kind llama_adapter --adapter.layers 3", [GOOD], "3 layers are to be adapted, the model has 2"),
    "nothing to freeze": ("sft --adapter null --passes '[{kind: freeze, last: 9}]'", [GOOD], "the last 9 layers are to be trained, the model has 2"),
    "an empty answer": ("sft", [GOOD, {"messages": [USER, {**SAYS, "content": ""}]}], "1 of 2 rows have no token to train on"),
    "no answer": ("sft", [GOOD, {"messages": [USER]}], "1 of 2 rows have no token to train on"),
    "a prompt that fills the row": ("sft --length 64", [GOOD, {"messages": [LONG, SAYS]}], "1 of 2 rows are longer than 64 tokens"),
    "a row that fills the context": ("sft --length 2048", [{"messages": [LONG, SAYS]}], "the longest row has"),
    "a pair without a side": ("prefer", [PAIR, {"prompt": "q", "chosen": "a"}], "rows.jsonl:2: it has no 'rejected'"),
    "a pair without the other": ("prefer", [PAIR, {"prompt": "q", "rejected": "a"}], "rows.jsonl:2: it has no 'chosen'"),
    "a pair with an empty side": ("prefer", [PAIR, {"prompt": "q", "chosen": "a", "rejected": ""}], "1 of 2 rows have no token to train on"),
    "a pair of the same answers": ("prefer", [PAIR, {"prompt": "q", "chosen": "a", "rejected": "a"}], "1 of 2 rows have the same answer"),
    "a pair's prompt fills its side": ("prefer --length 64", [PAIR, {**PAIR, "prompt": [LONG]}], "its prompt alone fills"),
    "a pair fills the context": ("prefer --length 2048", [{**PAIR, "prompt": [LONG]}], "the longest side has"),
    "an answer without a label": ("prefer --method kto", [{"prompt": "q", "completion": "a"}], "not training on labels"),
    "one prompt for all answers": ("prefer --method kto", [{"prompt": "q", "completion": "a", "label": True}] * 2, "have the same prompt"),
    "no adapter to switch off": ("prefer --adapter null --reference adapter", [PAIR], "without an adapter there is none to switch off"),
    "an objective for something else": ("prefer --method next_token", [PAIR], "'next_token' does not learn from preferences"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_clear_error_before_the_first_step(trivium: Trivium, toy: Path, tmp_path: Path, case: str):
    command, rows, said = CASES[case]
    name, *options = shlex.split(command)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused = trivium.refused(name, "--model", toy, "--data", "rows.jsonl", "--out", "run", "--train.precision", "fp32", *options)
    assert said in refused
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_belongs_to_other_weights(trivium: Trivium, toy: Path, tmp_path: Path):
    """An adapter of another base, and a reference that was computed of one, are told by their hashes."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD) + "\n")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    done = sft(SFT(model=str(toy), data=("rows.jsonl",), out="run", train={"steps": 1, "rows": 1, "precision": "fp32"}))
    other = bundle(seed=9).save(tmp_path / "other")
    assert "was trained on other base weights" in trivium.refused("chat", other, "hi", "--adapter", done.path)
    assert "was trained on other base weights" in trivium.refused("adapter", "convert", done.path, "--base", other, "--out", "x")
    assert "was trained on other base weights" in trivium.refused("adapter", "merge", done.path, "--base", other, "--out", "x")
    full = shlex.split("--data pairs.jsonl --adapter null --train.steps 1 --train.precision fp32 --reference_file kept.safetensors")
    trivium.ok("prefer", "--model", toy, *full, "--out", "first")
    said = trivium.refused("prefer", "--model", other, *full, "--out", "second")
    assert "of other weights" in said and "remove it, or name another" in said
    assert not (tmp_path / "second").exists() and not (tmp_path / "x").exists()
