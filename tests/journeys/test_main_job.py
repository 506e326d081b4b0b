"""What a user does: a model comes in, is verified, learns, proves it and goes out, all through the command line."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.recipes.toys import Trivium, write_rows
from trivium.infer.sampling import Sampling
from trivium.recipes.load import load
from trivium.train import history

pytestmark = pytest.mark.slow

SFT = ("--length", "160", "--train.rows", "2", "--train.steps", "6", "--optim.lr", "5e-3", "--adapter.rank", "4")


def eval_run(model: Path, data: Path, out: str) -> tuple[str, ...]:
    task = ("--task.kind", "generate", "--task.scorer", "json", "--task.data", str(data), "--task.sampling.max_tokens", "12")
    return ("eval", "run", "--model", str(model), *task, "--out", out)


@pytest.mark.concept("X.88", part="io/directory.py")
def test_a_model_comes_in_learns_and_goes_out(trivium: Trivium, toy: Path, tmp_path: Path):
    rows, test = write_rows(tmp_path / "rows.jsonl"), write_rows(tmp_path / "test.jsonl", "test", count=6)

    base = tmp_path / "base"
    assert trivium.ok("pull", toy, "--out", base).out == f"{base}\n"
    assert "already" in trivium.ok("pull", toy, "--out", base).err

    checks = trivium.ok("verify", base, "--json").json
    assert all(set(check) == {"check", "against", "difference", "tolerance", "unit", "pass"} and check["pass"] for check in checks)
    assert {"bytes read by safetensors", "jinja2 and tokenizers", "the full forward"} <= {check["against"] for check in checks}

    shown = trivium.ok("data", "inspect", rows, "--model", base, "--rows", "1").out
    assert '⟦{"type":' in shown and "<|im_end|>⟧" in shown and "JSON: " in shown.split("⟦")[0]

    run = ("sft", "--model", str(base), "--data", str(rows), "--out", "run", *SFT)
    done = trivium.ok(*run, "--json").json
    assert done["path"] == "run/adapter" and done["metrics"]["step"] == 6
    losses = [row["loss"] for row in history.read(tmp_path / "run")]
    assert losses[-1] < losses[0]

    trivium.ok(*eval_run(base, test, "before.json"))
    after = trivium.ok(*eval_run(Path("run/adapter"), test, "after.json"), "--json").json
    assert after["metrics"]["exact_match"]["rows"] == 6 and len(after["first_prompt"]) > 20
    compared = trivium.ok("eval", "diff", "before.json", "after.json", "--json").json
    assert compared["rows"] == 6 and "hashes.weights" in [setting[0] for setting in compared["settings"]]
    assert "changed sides" in trivium.ok("eval", "diff", "before.json", "after.json").out

    merged = trivium.ok("adapter", "merge", "run/adapter", "--out", "merged", "--json").json
    assert merged["maps"] == 14 and 0 < merged["max_logit_difference"] < 1e-4 and abs(merged["mean_kl"]) < 1e-6
    assert all(check["pass"] for check in trivium.ok("verify", "merged", "--json").json)

    ids = load("merged").prompt.generation([{"role": "user", "content": "JSON: Order. 3 red chairs."}])
    with torch.inference_mode():
        taught = load("run/adapter").model(torch.tensor([ids])).logits
        untaught = load(base).model(torch.tensor([ids])).logits
        ours = load("merged").model(torch.tensor([ids])).logits
        theirs = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)(torch.tensor([ids])).logits
    for logits in (taught, theirs):
        torch.testing.assert_close(logits, ours, atol=1e-4, rtol=0)
    assert (taught - untaught).abs().max() > 0.01, "training changed nothing, so merging proves nothing"
    asked = [{"role": "user", "content": "JSON: Order. 3 red chairs."}]
    assert AutoTokenizer.from_pretrained("merged").apply_chat_template(asked, add_generation_prompt=True)["input_ids"] == ids

    trivium.ok("convert", "merged", "--dtype", "bf16", "--out", "small")
    assert load("small").model.dtype == torch.bfloat16
    assert [step["step"] for step in load("small").lineage] == ["convert", "merge", "convert"]

    said = trivium.ok("chat", "merged", "--max_tokens", "9", stdin="JSON: Order. 3 red chairs.\n")
    assert said.out == load("run/adapter").chat("JSON: Order. 3 red chairs.", sampling=Sampling(temperature=0, max_tokens=9)).text + "\n"
    assert "9 written" in said.err and "tokens/s" in said.err
    text = trivium.ok("generate", "merged", "--max-tokens", "5", "--json", stdin="New order").json
    assert len(text["ids"]) == 5 and text["finish_reason"] == "length"


def test_ctrl_c_saves_and_the_same_command_goes_on_bit_for_bit(trivium: Trivium, toy: Path, tmp_path: Path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl")
    common = ("sft", "--model", str(toy), "--data", str(rows), "--validation", str(rows), *SFT)
    trivium.ok(*common, "--out", "whole")

    append = history.History.append

    def stop_after_three(self: history.History, row) -> None:
        append(self, row)
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(history.History, "append", stop_after_three)
    stopped = trivium(*common, "--out", "parts")
    assert stopped.status == 130 and stopped.out == ""
    assert "interrupted after step 3, which is saved in parts/checkpoint-3; run the same again to go on" in stopped.err
    assert not (tmp_path / "parts" / "adapter").exists()
    monkeypatch.setattr(history.History, "append", append)

    resumed = trivium.ok("sft", "--config", "parts/config.yaml")
    assert "going on from parts/checkpoint-3" in resumed.err
    adapter = "adapter/adapter_model.safetensors"
    assert (tmp_path / "parts" / adapter).read_bytes() == (tmp_path / "whole" / adapter).read_bytes()
    one, other = (
        [{key: value for key, value in row.items() if key not in history.TIMED} for row in history.read(tmp_path / run)]
        for run in ("whole", "parts")
    )
    assert one == other and len(one) == 6 and "validation" in one[-1]


def test_prepared_data_trains_as_the_rows_do(trivium: Trivium, toy: Path, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl")
    dry = trivium.ok("data", "prepare", rows, "--model", toy, "--length", "160", "--out", "bank", "--dry-run", "--json").json
    assert dry["path"] is None and not (tmp_path / "bank").exists()
    made = trivium.ok("data", "prepare", rows, "--model", toy, "--length", "160", "--out", "bank", "--json").json
    assert made["path"] == "bank" and made["fingerprint"] == dry["fingerprint"]
    trivium.ok("sft", "--model", toy, "--data", rows, "--out", "a", *SFT)
    trivium.ok("sft", "--model", toy, "--data", "bank", "--out", "b", *SFT)
    a, b = ((tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in "ab")
    assert a == b
    assert "prepared for rows of 160 tokens, not 99" in trivium.refused("sft", "--model", toy, "--data", "bank", "--length", "99")


def test_a_gguf_file_comes_in_and_is_verified_against_the_gguf_package(trivium: Trivium, toy: Path, tmp_path: Path):
    path = write_gguf(tmp_path / "toy.gguf", toy)
    trivium.ok("convert", path, "--out", "model")
    assert "already" in trivium.ok("convert", path, "--out", "model").err
    rows = {check["against"]: check for check in trivium.ok("verify", "model", "--json").json}
    assert rows["gguf package, dequantized"]["difference"] == 0
    assert trivium.ok("inspect", "model", "--json").json["lineage"][0]["file"] == "toy.gguf"
    one = trivium.ok("chat", path, "Hello", "--max_tokens", "4", "--json").json
    assert one == trivium.ok("chat", "model", "Hello", "--max_tokens", "4", "--json").json


def write_gguf(path: Path, directory: Path) -> Path:
    """The toy as llama.cpp's converter would write it."""
    from transformers import LlamaForCausalLM

    from tests.io.gguf.files import write_llama

    said = json.loads((directory / "tokenizer.json").read_text())
    vocab = sorted(said["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["content"] for token in said["added_tokens"]}
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [token for token, _ in vocab],
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token, _ in vocab],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in said["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": (directory / "chat_template.jinja").read_text(),
    }
    return write_llama(path, LlamaForCausalLM.from_pretrained(directory), metadata=metadata, tensors={})
