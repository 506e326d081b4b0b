"""The commands that have no journey of their own: conversations, inspection, dry runs, and what they print where."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.recipes.toys import Trivium, bundle, write_rows
from trivium.cli.options import model_and_text, sampled, separate
from trivium.infer.sampling import Sampling
from trivium.recipes.load import load

FEW = ("--max_tokens", "6")


class Terminal(io.StringIO):
    """Someone who types these lines, then Ctrl-D."""

    def isatty(self) -> bool:
        return True


def converse(trivium: Trivium, monkeypatch: pytest.MonkeyPatch, *tokens: str | Path, typed: str):
    """`tokens` run by someone at a terminal; stdout is redirected."""
    from trivium import cli

    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    trivium.capsys.readouterr()
    status = cli.main([str(token) for token in tokens])
    return status, *trivium.capsys.readouterr()


def test_a_conversation_is_remembered_until_reset(trivium: Trivium, toy: Path, monkeypatch):
    status, out, err = converse(trivium, monkeypatch, "chat", toy, *FEW, typed="Hello\n\nAgain\n/reset\nHello\n/nope\n")
    model, few = load(toy), Sampling(temperature=0, max_tokens=6)
    first = model.chat("Hello", sampling=few).text
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first}, {"role": "user", "content": "Again"}]
    second = model.chat(said, sampling=few).text
    assert status == 0 and out == f"{first}\n{second}\n{first}\n"
    assert err.count("> ") == 7 and "forgotten" in err and "there is no /nope" in err and err.count("6 written") == 3


def test_the_system_message_stays(trivium: Trivium, toy: Path, monkeypatch):
    status, out, _ = converse(trivium, monkeypatch, "chat", toy, "--system", "Be brief.", *FEW, typed="/reset\nHello\n")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert status == 0 and out == f"{load(toy).chat(messages, sampling=Sampling(temperature=0, max_tokens=6)).text}\n"


def test_ctrl_c_stops_the_answer_and_not_the_conversation(trivium: Trivium, toy: Path, monkeypatch):
    from trivium.recipes import chat

    ask, seen = chat.Answer.__iter__, []

    def impatient(self: chat.Answer):
        for number, piece in enumerate(ask(self)):
            if not seen and number == 2:
                seen.append(self)
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(chat.Answer, "__iter__", impatient)
    status, _, err = converse(trivium, monkeypatch, "chat", toy, *FEW, typed="Hello\nAgain\n")
    assert status == 0 and "ended by Ctrl-C" in err and "6 written" in err
    seen.clear()
    once = trivium("chat", toy, "Hello", *FEW)
    assert once.status == 130 and "ended by Ctrl-C" in once.err and once.out.endswith("\n")


def test_what_does_not_fit_is_not_remembered(trivium: Trivium, toy: Path, monkeypatch):
    status, out, err = converse(trivium, monkeypatch, "chat", toy, *FEW, typed=f"{'hello ' * 300}\nHello\n")
    assert status == 0 and "leaves no room for an answer" in err and "/reset makes room" in err
    assert out == f"{load(toy).chat('Hello', sampling=Sampling(temperature=0, max_tokens=6)).text}\n"


def test_one_answer(trivium: Trivium, toy: Path):
    few = Sampling(temperature=0, max_tokens=6)
    expected = load(toy).chat("Hello", sampling=few)
    assert trivium.ok("chat", toy, "Hello", *FEW).out == f"{expected.text}\n"
    assert trivium.ok("chat", *FEW, toy, stdin="Hello\n").out == f"{expected.text}\n"
    assert trivium.ok("chat", toy, "-", *FEW, stdin="Hello\n").out == f"{expected.text}\n"
    done = trivium.ok("chat", toy, "Hello", *FEW, "--json", "--logprobs", "2").json
    assert done["ids"] == expected.ids and done["text"] == expected.text and done["finish_reason"] == "length"
    assert len(done["logprobs"]) == 6 and all(len(top) == 2 for top in done["top"])
    assert done["prompt_tokens"] == len(load(toy).prompt.generation([{"role": "user", "content": "Hello"}]))
    assert "the message is empty" in trivium.refused("chat", toy, "--json", stdin="\n", status=2)


def test_text_goes_to_stdout_and_numbers_to_stderr(trivium: Trivium, toy: Path):
    done = trivium.ok("generate", toy, "New order", "--max-tokens", "8")
    expected = load(toy).generate("New order", sampling=Sampling(temperature=0, max_tokens=8))
    assert done.out == f"{expected.text}\n" and "8 written" in done.err and "ended by length" in done.err
    assert trivium.ok("generate", toy, stdin="New order\n").out == trivium.ok("generate", toy, "New order").out
    warm = ("--temperature", "1.5", "--top_p", "0.9", "--seed")
    one, two, three = (trivium.ok("generate", toy, "New order", *warm, seed, *FEW).out for seed in ("1", "1", "2"))
    assert one == two != three


def test_stop_is_taken_as_typed(trivium: Trivium, toy: Path):
    text = trivium.ok("generate", toy, "New order", "--max-tokens", "40").out
    stop = text[len(text) // 2 :][:2]
    stopped = trivium.ok("generate", toy, "New order", "--max-tokens", "40", "--stop", "User: #", "--stop", stop, "--json").json
    assert stopped["text"] == text[: text.index(stop)] and stopped["finish_reason"] == "stop"


def test_inspect_tells_and_compares(trivium: Trivium, toy: Path, tmp_path: Path):
    found = trivium.ok("inspect", toy, "--json").json
    # by hand: 448 x 48 embedding; per layer q and out 48 x 48, k and v 24 x 48, three maps 64 x 48, two norms of 48; a last norm
    assert found["parameters"] == 448 * 48 + 2 * (2 * 48 * 48 + 2 * 24 * 48 + 3 * 64 * 48 + 2 * 48) + 48
    assert found["cache_bytes_per_token"] == 2 * 2 * 3 * 8 * 4 and found["weight_bytes"] == 4 * found["parameters"]
    assert sum(row["parameters"] for row in found["layers"]) == found["parameters"]
    assert len(found["layers"]) == 5 and found["spec"]["dim"] == 48 and found["prompt"]["stop_tokens"] == ["<|im_end|>"]
    assert "384 bytes of cache per token" in trivium.ok("inspect", toy).out

    bundle(seed=1, context=128).save(tmp_path / "other")
    rows = {row["what"]: (row["a"], row["b"]) for row in trivium.ok("inspect", toy, "other", "--json").json}
    assert rows["spec.context"] == (256, 128) and "hashes.weights" in rows and "hashes.tokenizer" not in rows
    assert trivium.ok("inspect", toy, toy).out == "nothing differs\n" and trivium.ok("inspect", toy, toy, "--json").json == []


def test_inspect_accepts_an_edit(trivium: Trivium, toy: Path, tmp_path: Path):
    shutil.copytree(toy, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}))
    said = trivium.refused("inspect", "model")
    assert "config.json was edited" in said and "position.base: 10000.0, now 50000.0" in said and "inspect --accept" in said
    assert trivium.ok("inspect", "model", "--accept", "--json").json["spec"]["blocks"]["layer"]["mixer"]["position"]["base"] == 5e4
    assert trivium.ok("inspect", "model").out


def test_dry_runs_write_nothing(trivium: Trivium, toy: Path, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl")
    tokens = ("sft", "--model", toy, "--data", rows, "--learning-rate", "2e-5", "--lora_r", "4", "--length", "160", "--train.epochs", "2")
    planned = trivium.ok(*tokens, "--dry-run", "--json").json
    assert planned["config"]["optim"]["lr"] == 2e-5 and planned["config"]["adapter"]["rank"] == 4
    assert planned["size"]["steps"] == 2 * planned["data"]["bins"] and planned["size"]["tokens"] == 2 * planned["data"]["tokens"]
    shown = trivium.ok(*tokens, "--dry_run")
    assert "what is learned in the first row" in shown.err
    (tmp_path / "again.yaml").write_text(shown.out)  # the resolved config is itself a config
    assert trivium.ok("sft", "--config", "again.yaml", "--dry-run").out == shown.out
    task = ("--task.kind", "perplexity", "--task.data", rows, "--task.column", "messages")
    assert "12 rows" in trivium.ok("eval", "run", "--model", toy, *task, "--dry-run").err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["again.yaml", "rows.jsonl"]
    assert "matches no linear map" in trivium.refused(*tokens, "--dry-run", "--adapter.targets", "[w_q]")


def test_perplexity_and_choices_are_tables(trivium: Trivium, toy: Path, tmp_path: Path):
    (tmp_path / "text.jsonl").write_text('{"text": "New order"}\n{"text": "New contact"}\n')
    shown = trivium.ok("eval", "run", "--model", toy, "--task.kind", "perplexity", "--task.data", "text.jsonl", "--out", "p.json").out
    assert shown.startswith("metric") and "perplexity" in shown and "bits_per_byte" in shown
    (tmp_path / "ask.jsonl").write_text(2 * '{"question": "2+2?", "choices": ["3", "4"], "answer": 1}\n')
    tokens = ("--task.kind", "choices", "--task.data", "ask.jsonl", "--limit", "1", "--out", "c.json")
    assert trivium.ok("eval", "run", "--model", toy, *tokens, "--json").json["metrics"]["acc"]["rows"] == 1


def test_data_inspect_shows_what_is_wrong_without_stopping(trivium: Trivium, toy: Path, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", count=3)
    rows.write_text(rows.read_text() + '{"messages": [{"role": "user", "content": "hi"}]}\n')
    found = trivium.ok("data", "inspect", rows, "--model", toy, "--json").json
    assert found["facts"]["empty"]["count"] == 1 and found["rows"] == 3 and len(found["shown"]) == 3
    trained = [text for text, on in found["shown"][0] if on]
    assert len(trained) == 1 and trained[0].startswith('{"type":') and trained[0].endswith("<|im_end|>")


def test_words_and_flags_are_told_apart(monkeypatch):
    assert separate(["m", "--temperature", "0.7", "hi", "--seed=3", "-"]) == (["m", "hi", "-"], ["--temperature", "0.7", "--seed=3"])
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    assert model_and_text(["m"]) == ("m", None, [])
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n\n"))
    assert model_and_text(["m"]) == ("m", "a\nb\n", [])
    assert sampled(["--max-new-tokens", "3"], stop=["#"], command=separate) == Sampling(temperature=0, max_tokens=3, stop=("#",))
