"""Tokenizers from the command line, and tokens added to a model that other libraries load."""

from __future__ import annotations

import json

import pytest
import sentencepiece
import torch
import transformers
from tokenizers import Tokenizer as Engine

from tests.recipes.toys import bundle
from tests.tiny import tiny
from trivium.core.errors import ConfigError
from trivium.recipes import tokenizer as recipe
from trivium.recipes.load import load
from trivium.text.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "Where is it?"}]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"The cat sat on mat number {i}. Die Katze saß auf der Matte.\n" * 30)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        json.dumps({"text": "The cat sat down."})
        + "\n"
        + json.dumps({"messages": [{"role": "user", "content": "Die Katze?"}, {"role": "assistant", "content": "Ja."}]})
        + "\n"
    )
    return folder


def test_train_encode_and_inspect(trivium, corpus, tmp_path):
    done = trivium.ok(
        "tokenizer", "train", corpus, tmp_path / "rows.jsonl", "--size", "285", "--out", "tok", "--held-out", "rows.jsonl", "--json"
    )
    assert done.json["size"] == 285 and done.json["dropped"] == 0 and done.json["per_token"] > 2
    assert done.json["bytes"] == sum(len(text.encode()) for text in recipe.texts([corpus, tmp_path / "rows.jsonl"]))
    engine = Engine.from_file("tok/tokenizer.json")
    shown = trivium.ok("tokenizer", "encode", "tok", "The cat – 你好", "--json").json
    ours = Tokenizer.load(tmp_path / "tok")
    assert [row["id"] for row in shown] == ours.encode("The cat – 你好")
    assert [row["id"] for row in shown if row["id"] not in ours.special] == engine.encode("The cat – 你好", add_special_tokens=False).ids
    assert "".join(row["text"] for row in shown if row["id"] not in ours.special) == "The cat – 你好"
    assert trivium.ok("tokenizer", "encode", "tok", "-", "--json", stdin="The cat – 你好").json == shown
    about = trivium.ok("tokenizer", "inspect", "tok", corpus, "--json").json
    assert about["kind"] == "byte-level BPE" and about["tokens"] == 285 and about["special"] == {"<|endoftext|>": 0}
    assert about["digest"] == ours.digest() == done.json["digest"]
    assert about["on data"]["bytes per token"] > 2 and about["on data"]["unknown"] == 0
    assert "byte-level BPE" in trivium.ok("tokenizer", "inspect", "tok").out
    assert "already holds files" in trivium.refused("tokenizer", "train", corpus, "--size", "300", "--out", "tok")


def test_options_are_followed(trivium, corpus, tmp_path):
    trivium.ok(
        *("tokenizer", "train", corpus, "--size", "300", "--out", "tok", "--split", "whitespace"),
        *("--special", "<|end|>", "--special", "<|user|>", "--most-words", "10"),
    )
    ours = Tokenizer.load(tmp_path / "tok")
    assert ours.eos == ours.id("<|end|>") == 0 and ours.id("<|user|>") == 1 and ours.special == {0, 1}
    assert "no room for" in trivium.refused("tokenizer", "train", corpus, "--size", "200", "--out", "t2")
    assert "unknown split 'gtp4'" in trivium.refused("tokenizer", "train", corpus, "--split", "gtp4", "--out", "t2")
    assert "no such file" in trivium.refused("tokenizer", "train", corpus, "--held-out", "nowhere.txt", "--out", "t2")
    assert "name the data" in trivium.refused("tokenizer", "train", "--out", "t2", status=2)
    assert not (tmp_path / "t2").exists()


def test_a_sentencepiece_file_and_a_rank_file_are_opened(trivium, corpus, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        input=[str(file) for file in corpus.iterdir()], model_prefix=str(tmp_path / "sp"), vocab_size=30, num_threads=1, minloglevel=2
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    shown = trivium.ok("tokenizer", "encode", "sp.model", "Die Katze", "--json").json
    assert [(row["id"], row["token"]) for row in shown] == [(id, theirs.id_to_piece(id)) for id in theirs.encode("Die Katze")]
    assert trivium.ok("tokenizer", "inspect", "sp.model", "--json").json["kind"] == "Unigram"
    import base64

    (tmp_path / "x.tiktoken").write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)) + "YWI= 256\n")
    shown = trivium.ok("tokenizer", "encode", "x.tiktoken", "abc", "--split", "gpt2", "--json").json
    assert [row["id"] for row in shown] == [256, ord("c")]
    assert "does not say how text is split" in trivium.refused("tokenizer", "encode", "x.tiktoken", "abc")


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens_are_there_for_everyone(tied, tmp_path):
    old = bundle()
    if not tied:
        old.model = tiny(old.spec.replace(head=old.spec.head.replace(tied=False)))
    ids = torch.tensor([old.prompt.generation(CHAT)])
    before, size = old.model(ids).logits, old.tokenizer.vocab_size
    new = recipe.add_tokens(old, ["<think>", "</think>"], special=True)
    torch.testing.assert_close(new.model(ids).logits[..., :size], before, rtol=0, atol=1e-6)
    assert new.tokenizer.id("</think>") == size + 1 == new.spec.vocab - 1
    assert new.prompt.generation(CHAT) == ids[0].tolist() and new.prompt.stops == old.prompt.stops
    new.save(tmp_path / "new")

    again = load(tmp_path / "new")
    assert again.spec == new.spec and again.prompt.digest() == new.prompt.digest()
    assert again.lineage[-1]["tokens"] == ["<think>", "</think>"]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    text = "a<think>b</think> c"
    found = again.tokenizer.encode(text, allow_special=True, bos=False)
    assert theirs.encode(text, add_special_tokens=False) == found and {size, size + 1} < set(found)
    assert {size, size + 1}.isdisjoint(again.tokenizer.encode(text)), "content makes no special token"
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (size + 2, new.spec.dim)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([found])).logits, again.model(torch.tensor([found])).logits, rtol=1e-4, atol=1e-5)


def test_a_token_may_begin_as_the_mean_of_its_pieces():
    old = bundle()
    table, pieces = old.model.embed.weight.detach().clone(), old.tokenizer.encode("think", bos=False)
    assert len(pieces) > 1
    new = recipe.add_tokens(old, ["think"], special=False, start="pieces", multiple=64)
    assert torch.allclose(new.model.embed.weight[new.tokenizer.id("think")], table[pieces].mean(0))
    assert new.spec.vocab % 64 == 0 and new.tokenizer.encode("think", bos=False) == [new.tokenizer.vocab_size - 1]
    assert new.tokenizer.decode(new.tokenizer.encode("I think so.")) == "I think so."


def test_tokens_that_cannot_be_added_are_refused():
    old = bundle()
    for tokens, match in (
        (["<|im_end|>"], "is a token already"),
        (["a", "a"], "must be different"),
        ([], "not empty"),
        ([""], "not empty"),
    ):
        with pytest.raises(ConfigError, match=match):
            recipe.add_tokens(old, tokens)
