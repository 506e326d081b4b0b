"""A tokenizer that goes into a GGUF file comes back with the same ids, or is refused with the reason."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.assets import asset
from tests.text.helpers import ODD, ours
from tests.text.test_gguf_vocab import NAMES, _trained
from tests.text.test_tokenizer import TEXTS
from trivium.core.errors import ConfigError
from trivium.io.gguf.reader import open_gguf
from trivium.text.bpe import train
from trivium.text.gguf_export import metadata
from trivium.text.stream import byte_alphabet
from trivium.text.tokenizer import Tokenizer


def same(mine: Tokenizer, again: Tokenizer, *, texts: st.SearchStrategy[str] = TEXTS) -> None:
    """The two give the same ids for any text and agree on all that a tokenizer says of itself."""

    @given(texts, st.booleans())
    @example(ODD, True)
    @example("I'LL we'll 1234567 x=1;\r\n\r\n  y /// αΒ ǅ 한국어 カタカナ ひらがな 漢字 [!abc] $5", False)
    def check(text: str, special: bool) -> None:
        ids = mine.encode(text, allow_special=special)
        assert again.encode(text, allow_special=special) == ids
        assert again.decode(ids) == mine.decode(ids)

    check()
    for name in ("bos", "eos", "unk", "pad", "add_bos", "special", "added"):
        assert getattr(again, name) == getattr(mine, name), name
    assert not again.add_eos


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_real_tokenizers_come_back(name: str) -> None:
    mine = ours(name)
    found, notes = metadata(mine, size=mine.vocab_size + 3)
    assert found["tokenizer.ggml.pre"] == NAMES[name] and found["tokenizer.ggml.model"] == "gpt2"
    again = Tokenizer.from_gguf(found)
    same(mine, again)
    assert again.vocab_size == mine.vocab_size + 3 == len(found["tokenizer.ggml.tokens"])
    assert found["tokenizer.ggml.token_type"][-3:] == [5, 5, 5]
    assert bool(notes) == (name == "qwen3") == any("NFC" in note for note in notes)


def test_smollm2_becomes_what_its_file_says() -> None:
    there = dict(open_gguf(asset("smollm2")).metadata.under("tokenizer.ggml."))
    found, notes = metadata(Tokenizer.from_gguf(there))
    there["tokenizer.ggml.token_type"] = there["tokenizer.ggml.token_type"].tolist()
    assert {**found, "tokenizer.ggml.add_space_prefix": False} == {**there, "tokenizer.ggml.add_eos_token": False}
    assert not notes


@pytest.mark.parametrize(("prefix", "symbols"), [(True, []), (False, []), (False, ["<tool>", "<sep>"])])
def test_pieces_come_back(prefix: bool, symbols: list[str]) -> None:
    _, there = _trained(prefix=prefix, symbols=symbols)
    mine = Tokenizer.from_gguf(there)
    found, notes = metadata(mine)
    likely = st.lists(st.sampled_from(["aa", "an", "ban", "hel", "lo", " ", "  ", "你", "12", "ß", "▁", *symbols])).map("".join)
    same(mine, Tokenizer.from_gguf(found), texts=likely)
    assert not notes and found["tokenizer.ggml.add_space_prefix"] is prefix
    kinds, scores = there["tokenizer.ggml.token_type"], found["tokenizer.ggml.scores"]
    assert found["tokenizer.ggml.token_type"] == kinds and found["tokenizer.ggml.tokens"] == there["tokenizer.ggml.tokens"]
    merged = [id for id, token in enumerate(found["tokenizer.ggml.tokens"]) if kinds[id] == 1 and len(token) > 1]
    by_theirs = sorted(merged, key=lambda id: -there["tokenizer.ggml.scores"][id])
    assert sorted(merged, key=lambda id: -scores[id]) == by_theirs, "scores order the tokens as sentencepiece's own do"


@cache
def trained(split: str) -> Tokenizer:
    """A tokenizer trained on this file."""
    return train([Path(__file__).read_text()], size=600, split=split).tokenizer


SPLITS = {"gpt2": "gpt-2", "gpt4": "smaug-bpe", "qwen2": "stablelm2"}


@pytest.mark.parametrize("split", SPLITS)
def test_trained_tokenizers_come_back(split: str) -> None:
    mine = trained(split)
    found, notes = metadata(mine)
    assert found["tokenizer.ggml.pre"] == SPLITS[split]
    assert mine.add_eos and [note for note in notes if "ends a document with its EOS" in note] == notes != []
    same(mine, Tokenizer.from_gguf(found))


# What cannot be said


def state(**changes: Any) -> dict[str, Any]:
    """A small byte-level tokenizer.json."""
    vocab = {token: id for id, token in enumerate(byte_alphabet())} | {"ab": 256, "<s>": 257}
    split = {"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = {"id": 257, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    whole = {
        "version": "1.0",
        "added_tokens": [added],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
        "post_processor": None,
        "decoder": bytes_,
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]], "ignore_merges": False},
    }
    for path, value in changes.items():
        place: Any = whole
        *way, last = path.split("__")
        for step in way:
            place = place[int(step)] if step.isdigit() else place[step]
        place[int(last) if last.isdigit() else last] = value
    return whole


def tokenizer(folder: Path, **changes: Any) -> Tokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(state(**changes)))
    return Tokenizer.load(folder)


SPM = {
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    "pre_tokenizer": None,
    "decoder": {
        "type": "Sequence",
        "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}],
    },
    "model__vocab": {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "aba": 4, "<s>": 257},
    "model__unk_token": "<unk>",
}
REFUSED = {
    "a rule without a name": ({"pre_tokenizer__pretokenizers__0__pattern": {"Regex": r"\p{L}"}}, r"by \\p\{L\} then .* none of the rules known"),
    "whole words first": ({"model__ignore_merges": True}, "it splits text as smollm, but with ignore_merges True and NFC False"),
    "NFC": ({"normalizer": {"type": "NFC"}}, "as smollm, but with ignore_merges False and NFC True"),
    "another normalizer": ({"normalizer": {"type": "Lowercase"}}, "normalizes text with Lowercase"),
    "a prefix": ({"pre_tokenizer__pretokenizers__1__add_prefix_space": True}, 'the step {"type": "ByteLevel", "add_prefix_space": true'),
    "another step": ({"pre_tokenizer__pretokenizers__0": {"type": "Punctuation", "behavior": "Isolated"}}, 'the step {"type": "Punctuation"'),
    "another behavior": ({"pre_tokenizer__pretokenizers__0__behavior": "Removed"}, '"behavior": "Removed"'),
    "strip": ({"added_tokens__0__lstrip": True}, "'<s>' is marked lstrip"),
    "dropout": ({"model__dropout": 0.1}, "BPE with dropout"),
    "another model": ({"model": {"type": "WordLevel", "vocab": {"a": 0, "<s>": 257}, "unk_token": "a"}}, "its model is WordLevel"),
    "neither kind": ({"pre_tokenizer": None}, "neither byte-level nor SentencePiece's"),
    "merges apart": (
        SPM | {
            "model__vocab": {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "aba": 4, "ba": 5, "<s>": 257},
            "model__merges": [["ab", "a"], ["a", "b"], ["a", "ba"], ["b", "a"]],
        },
        "that give 'aba' do not stand together",
    ),
    "merges missing": (SPM | {"model__merges": [["a", "b"]]}, "1 of its merges are not those that scores"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_gguf_cannot_say_is_refused(tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        metadata(tokenizer(tmp_path, **changes))
    assert str(caught.value).startswith("this tokenizer cannot be written to GGUF: ")


def test_the_small_ones_are_sound_without_the_change(tmp_path: Path) -> None:
    found, notes = metadata(tokenizer(tmp_path), size=260)
    assert found["tokenizer.ggml.pre"] == "smollm" and found["tokenizer.ggml.tokens"][256:] == ["ab", "<s>", "[PAD258]", "[PAD259]"]
    assert found["tokenizer.ggml.token_type"][256:] == [1, 3, 5, 5] and not notes
    with pytest.raises(ConfigError, match="ids up to 257, but the model only has 200"):
        metadata(tokenizer(tmp_path), size=200)
    found, notes = metadata(tokenizer(tmp_path, **SPM | {"model__merges": [["a", "b"], ["ab", "a"]]}))
    assert found["tokenizer.ggml.scores"][:5] == [-2, -2, -2, -0.0, -1] and found["tokenizer.ggml.token_type"][0] == 2


@pytest.mark.parametrize(("scheme", "prefix", "notes"), [("never", False, 0), ("always", True, 1), ("first", True, 1)])
def test_metaspace_is_told_where_it_differs(tmp_path: Path, scheme: str, prefix: bool, notes: int) -> None:
    mark = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    changes = SPM | {"normalizer": None, "pre_tokenizer": mark, "model__merges": [["a", "b"], ["ab", "a"]]}
    found, said = metadata(tokenizer(tmp_path, **changes))
    assert found["tokenizer.ggml.add_space_prefix"] is prefix and len(said) == notes


@pytest.mark.parametrize(
    ("pattern", "whole", "nfc", "expected"),
    [
        ("{1,3}", True, False, "llama-bpe"),
        ("{1,3}", False, False, "smaug-bpe"),
        ("", False, True, "qwen2"),
        ("", False, False, "stablelm2"),
    ],
)
def test_rules_that_split_alike_are_told_apart(tmp_path: Path, pattern: str, whole: bool, nfc: bool, expected: str) -> None:
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    changes = {
        "pre_tokenizer__pretokenizers__0__pattern": {"Regex": words.replace("DIGITS", pattern).replace(r"\n", "\n")},
        "pre_tokenizer__pretokenizers__1__use_regex": False,
        "model__ignore_merges": whole,
        "normalizer": {"type": "NFC"} if nfc else None,
    }
    mine = tokenizer(tmp_path, **changes)
    found, _ = metadata(mine)
    assert found["tokenizer.ggml.pre"] == expected
    assert Tokenizer.from_gguf(found).encode("ab e\u0301 1234") == mine.encode("ab e\u0301 1234")
