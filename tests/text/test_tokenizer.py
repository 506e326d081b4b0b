"""Tokenizers against transformers and the tokenizers library; round trips, streams, and damaged files."""

from __future__ import annotations

import json
import random
import time
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from tests.text.helpers import ODD, REAL, ours, theirs
from trivium.core.errors import DataError, FileError
from trivium.text.tokenizer import Tokenizer

SCALARS = st.characters(exclude_categories=["Cs"])
TEXTS = st.text(st.one_of(st.sampled_from("ab AB 12\n\t\r'é\u0301你▁👩\u200d🚀ﬁ½"), SCALARS), max_size=40)


def normalized(name: str, text: str) -> str:
    """What a tokenizer declares to lose: composed characters, or the difference between a space and its mark."""
    return {"qwen3": unicodedata.normalize("NFC", text), "gemma3": text.replace("▁", " ")}.get(name, text)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_ids_and_text_equal_transformers(name: str) -> None:
    mine, other = ours(name), theirs(name)

    @given(TEXTS)
    @example(ODD)
    @example("<think>a</think><|im_end|>\n<start_of_turn>")
    def check(text: str) -> None:
        ids = mine.encode(text, bos=False, allow_special=True)
        assert ids == other.encode(text, add_special_tokens=False)
        assert mine.decode(ids, skip_special=False) == other.decode(ids, clean_up_tokenization_spaces=False)

    check()
    assert mine.vocab_size == len(other)
    assert [mine.token(id) for id in (0, 5, mine.vocab_size - 1)] == other.convert_ids_to_tokens([0, 5, mine.vocab_size - 1])


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_what_is_encoded_comes_back(name: str) -> None:
    tokenizer = ours(name)

    @given(TEXTS)
    @example(ODD)
    @example(" <|im_end|> <bos>")
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == normalized(name, text)
        assert tokenizer.special.isdisjoint(ids[1:] if tokenizer.add_bos else ids)

    check()


@pytest.mark.parametrize("name", [*REAL, "pieces"])
def test_streams_equal_decoding(name: str) -> None:
    tokenizer = _pieces() if name == "pieces" else ours(name)

    @given(st.lists(st.integers(-1, tokenizer.vocab_size + 3), max_size=20), st.booleans())
    def any_ids(ids: list[int], skip_special: bool) -> None:
        stream = tokenizer.stream(skip_special=skip_special)
        assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids, skip_special=skip_special)

    @given(TEXTS)
    @example("👩\u200d🚀你好")
    def whole_characters(text: str) -> None:
        stream, said = tokenizer.stream(), ""
        ids = tokenizer.encode(text)
        for id in ids:
            said += stream.push(id)
            assert tokenizer.decode(ids).startswith(said), "half a character was let out"
        assert said == tokenizer.decode(ids)
        assert stream.finish() == ""

    any_ids()
    whole_characters()


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    tokenizer = _pieces()
    ids = [tokenizer.id(f"<0x{byte:02X}>") for byte in "你".encode()]
    assert tokenizer.decode(ids) == "你"
    assert tokenizer.decode([*ids[:2], *ids]) == "\ufffd你"
    stream = tokenizer.stream()
    assert [stream.push(id) for id in ids] == ["", "", "你"]
    assert [stream.push(ids[0]), stream.finish()] == ["", "\ufffd"]


@pytest.mark.parametrize("name", REAL)
def test_special_strings_are_text_unless_allowed(name: str) -> None:
    tokenizer = ours(name)
    special = [tokenizer.token(id) for id in sorted(tokenizer.special)[:3]]
    text = f"a{special[0]} {special[1]}{special[2]} b"
    assert sum(id in tokenizer.special for id in tokenizer.encode(text, bos=False, allow_special=True)) == 3
    plain = tokenizer.encode(text, bos=False)
    assert tokenizer.special.isdisjoint(plain)
    assert tokenizer.decode(plain) == text
    other = theirs(name)
    apart = [("a", False), (special[0], True), (" ", False), (special[1], True), (special[2], True), (" b", False)]
    assert plain == [id for piece, split in apart for id in other.encode(piece, add_special_tokens=False, split_special_tokens=split)]


def test_habits() -> None:
    gemma, qwen, deepseek = ours("gemma3"), ours("qwen3"), ours("deepseek_v3")
    assert gemma.encode("hi")[0] == gemma.bos
    assert gemma.encode("hi", bos=False) == gemma.encode("hi")[1:]
    assert gemma.encode("<bos>hi", allow_special=True).count(gemma.bos) == 1, "a BOS was added twice"
    assert theirs("gemma3")("hi").input_ids == gemma.encode("hi")
    assert deepseek.add_bos, "tokenizer_config asks for it, though the post-processor writes none"
    assert not qwen.add_bos
    assert qwen.bos is None
    with pytest.raises(DataError, match="begins a text"):
        qwen.encode("hi", bos=True)


def test_half_a_surrogate_pair_is_an_error() -> None:
    with pytest.raises(DataError, match="surrogate pair at character 2"):
        _words().encode("ab\ud83d")


def test_saved_tokenizers_are_the_same(tmp_path: Path) -> None:
    for name, tokenizer in {"words": _words(), "pieces": _pieces()}.items():
        tokenizer.save(tmp_path)
        again = Tokenizer.load(tmp_path)
        assert again.digest() == tokenizer.digest()
        assert again.encode(ODD) == tokenizer.encode(ODD), name
        assert (again.bos, again.eos, again.unk, again.add_bos, again.special) == (
            tokenizer.bos,
            tokenizer.eos,
            tokenizer.unk,
            tokenizer.add_bos,
            tokenizer.special,
        )
    assert _words().digest() != _pieces().digest()


def test_saved_tokenizers_load_in_transformers(tmp_path: Path) -> None:
    import transformers

    tokenizer = _pieces()
    tokenizer.save(tmp_path)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert other(ODD).input_ids == tokenizer.encode(ODD)
    assert (other.bos_token_id, other.eos_token_id, other.unk_token_id) == (tokenizer.bos, tokenizer.eos, tokenizer.unk)


def test_special_tokens_of_transformers_4_and_5(tmp_path: Path) -> None:
    """Version 4 names special tokens in special_tokens_map.json, as strings or objects; version 5 in tokenizer_config.json."""
    engine = json.loads(_words()._engine.to_str())
    engine["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(engine))
    layouts = (
        {
            "special_tokens_map.json": {
                "bos_token": {"content": "<s>", "lstrip": False},
                "eos_token": "</s>",
                "additional_special_tokens": ["<x>"],
            }
        },
        {
            "tokenizer_config.json": {
                "bos_token": "<s>",
                "eos_token": "</s>",
                "added_tokens_decoder": {"2": {"content": "<x>", "special": True}},
            }
        },
        {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": ["<x>"]}},
        {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": {"image_token": "<x>"}}},
    )
    for files in layouts:
        for file, content in files.items():
            (tmp_path / file).write_text(json.dumps(content))
        tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
        assert (tokenizer.bos, tokenizer.eos, tokenizer.special) == (0, 1, {0, 1, 2})
        assert tokenizer.encode("a<x>", allow_special=True)[-1] == 2
        for file in files:
            (tmp_path / file).unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<absent>"}')
    with pytest.raises(FileError, match="'<absent>'.* is no token"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("kind", ["words", "pieces"])
def test_damaged_files_are_errors_of_ours(kind: str, tmp_path: Path) -> None:
    (_words() if kind == "words" else _pieces()).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = file.read_bytes()
    dice = random.Random(7)
    damaged = [whole[: len(whole) * cut // 60] for cut in range(60)]
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(dice.randint(1, 6)):
            at = dice.randrange(len(data))
            data[at : at + dice.randint(0, 3)] = bytes(
                dice.choice(b'{}[]":,0123456789eE-\\ntrue\xff\x00z') for _ in range(dice.randint(0, 3))
            )
        damaged.append(bytes(data))
    refused, start = 0, time.process_time()
    for data in damaged:
        file.write_bytes(data)
        try:
            tokenizer = Tokenizer.load(tmp_path)
            tokenizer.decode(tokenizer.encode("a b <s> 你"))
        except FileError:
            refused += 1
    assert refused > 60
    assert time.process_time() - start < 20


def test_hostile_files(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    whole = json.loads(_words()._engine.to_str())
    far = {**whole, "model": {**whole["model"], "vocab": {**whole["model"]["vocab"], "far": 4_000_000_000}}}
    spared = {**whole, "truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}}
    spared["padding"] = {"strategy": {"Fixed": 1 << 40}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    for content in ("", "null", "[" * 100_000, '{"version": "1.0"}', json.dumps(far), json.dumps({**whole, "decoder": {"type": "CTC"}})):
        file.write_text(content)
        with pytest.raises(FileError, match=r"tokenizer\.json"):
            Tokenizer.load(tmp_path)
    file.write_text(json.dumps(spared))
    assert len(Tokenizer.load(tmp_path).encode("a b c")) == 5, "a file must not cut or pad what is encoded"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(FileError, match="not UTF-8 at byte 0"):
        Tokenizer.load(tmp_path)
    file.unlink()
    with pytest.raises(FileError, match="No such file"):
        Tokenizer.load(tmp_path)
    file.write_text(json.dumps(whole))
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(FileError, match=r"tokenizer_config\.json: not JSON"):
        Tokenizer.load(tmp_path)


def _words() -> Tokenizer:
    """A byte-level tokenizer without merges."""
    from trivium.text.stream import ALPHABET

    tokens = ["<s>", "</s>", "<x>", *sorted(ALPHABET), "ab"]
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=[("a", "b")]))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    engine.add_special_tokens(["<s>", "</s>", "<x>"])
    return Tokenizer(engine, {"bos_token": "<s>", "eos_token": "</s>"}, where="words")


def _pieces() -> Tokenizer:
    """A SentencePiece tokenizer with byte fallback and a dummy prefix."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab", "é"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 7]
    scores = [0.0] * 259 + [-9.0, -8.0, -7.0, -3.0, -2.0, -1.0, -6.0]
    ends = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    metadata = {"model": "llama", "tokens": tokens, "token_type": kinds, "scores": scores, **ends}
    return Tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
