"""GGUF vocabularies against transformers' own reading, the tokenizers that they came from, and sentencepiece."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from tests.assets import asset
from tests.text.helpers import ODD, ours, theirs
from tests.text.test_tokenizer import TEXTS
from trivium.core.errors import FileError
from trivium.io.gguf.reader import open_gguf
from trivium.text.gguf_vocab import PRE
from trivium.text.tokenizer import Tokenizer

NAMES = {"llama3": "llama-bpe", "qwen3": "qwen2", "deepseek_v3": "deepseek-v3", "gptoss": "gpt-4o"}


def _metadata(**values: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def _smollm2() -> dict[str, Any]:
    return dict(open_gguf(asset("smollm2")).metadata.under("tokenizer.ggml."))


def test_smollm2_equals_the_engine_that_it_came_from() -> None:
    metadata = _smollm2()
    mine = Tokenizer.from_gguf(metadata)
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    model = tokenizers.models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=[tuple(line.split(" ")) for line in merges])
    engine = tokenizers.Tokenizer(model)
    digits, words = tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, words])  # as SmolLM2's own tokenizer.json has it
    engine.decoder = tokenizers.decoders.ByteLevel()

    @given(TEXTS)
    @example(ODD)
    def check(text: str) -> None:
        ids = mine.encode(text)
        assert ids == engine.encode(text).ids
        assert mine.decode(ids) == engine.decode(ids)
        assert mine.decode(ids) == text or not mine.missing_bytes.isdisjoint(text.encode())

    check()
    assert (mine.vocab_size, mine.bos, mine.eos, mine.unk, mine.pad, mine.add_bos) == (49152, 1, 2, 0, 2, False)
    assert mine.special == frozenset(range(17))
    assert {byte for byte in mine.missing_bytes if byte < 0x80} == {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D}
    assert mine.encode("<|im_end|>", allow_special=True) == [2]


@pytest.mark.slow
def test_smollm2_equals_transformers_reading_the_same_file() -> None:
    import transformers

    file = asset("smollm2")
    mine, other = Tokenizer.from_gguf(_smollm2()), transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in (
        "Hello, world!",
        " two  spaces\n\n\tand tabs",
        "naïve – 你好 👩‍🚀",
        "<|im_start|>user\nhi<|im_end|>\n",
    ):  # it splits no digits
        ids = mine.encode(text, allow_special=True)
        assert ids == other.encode(text, add_special_tokens=False)
        assert mine.decode(ids, skip_special=False) == other.decode(ids, clean_up_tokenization_spaces=False)
    assert (mine.bos, mine.eos, mine.unk, mine.pad) == (other.bos_token_id, other.eos_token_id, other.unk_token_id, other.pad_token_id)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_splitting_rules_equal_the_tokenizers_that_they_name(name: str) -> None:
    data = json.loads((asset(f"tokenizer-{name}") / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"] | {token["content"]: token["id"] for token in data["added_tokens"]}
    kinds = {token["id"]: 3 if token["special"] else 4 for token in data["added_tokens"]}
    tokens = [f"[{id}]" for id in range(ours(name).vocab_size)]
    for token, id in vocab.items():
        tokens[id] = token
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    kinds_of = [kinds.get(id, 1) for id in range(len(tokens))]
    mine = Tokenizer.from_gguf(_metadata(model="gpt2", pre=NAMES[name], tokens=tokens, token_type=kinds_of, merges=merges))
    other = theirs(name)

    @given(TEXTS)
    @example(ODD)
    @example("I'LL we'll 1234567 x=1;\r\n\r\n  y /// αΒ ǅ 한국어 カタカナ ひらがな 漢字 [!abc] $5")
    def check(text: str) -> None:
        assert mine.encode(text, allow_special=True) == other.encode(text, add_special_tokens=False)

    check()


def test_gpt2_and_default_rules_split_as_their_patterns_say() -> None:
    """`gpt-2` equals the library's own; `default` differs from it in punctuation and digits."""
    own = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    metadata = _smollm2()

    def pieces(pre: str, text: str) -> list[str]:
        engine = Tokenizer.from_gguf({**metadata, "tokenizer.ggml.pre": pre})._engine
        return [piece for piece, _ in engine.pre_tokenizer.pre_tokenize_str(text)]

    for text in (ODD, "It's  12345, $x<=y!?\n"):
        assert pieces("gpt-2", text) == [piece for piece, _ in own.pre_tokenize_str(text)]
    assert pieces("default", "a$1234 b") == ["a", "$", "123", "4", "Ġb"]
    assert set(PRE) == {"default", "gpt-2", "smollm", "smaug-bpe", "stablelm2", *NAMES.values()}


def _trained(*, prefix: bool, symbols: list[str]) -> tuple[sentencepiece.SentencePieceProcessor, dict[str, Any]]:
    """A small SentencePiece model, and its vocabulary as a GGUF file would hold it."""
    words = [
        "hello",
        "world",
        "the",
        "a",
        "aaa",
        "banana",
        "straße",
        "naïve",
        "你好",
        "世界",
        "foo",
        "bar",
        "token",
        "tokenizer",
        "123",
        "don't",
    ]
    lines = [" ".join(words[(7 * row + 3 * column * row) % len(words)] for column in range(1 + row % 11)) for row in range(600)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=symbols,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(pieces.get_piece_size())
    kinds = [
        2
        if pieces.is_unknown(id)
        else 3
        if pieces.is_control(id)
        else 6
        if pieces.is_byte(id)
        else 4
        if pieces.id_to_piece(id) in symbols
        else 1
        for id in ids
    ]
    metadata = _metadata(
        model="llama",
        tokens=[pieces.id_to_piece(id) for id in ids],
        scores=[pieces.get_score(id) for id in ids],
        token_type=kinds,
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
        add_space_prefix=prefix,
    )
    return pieces, metadata


@pytest.mark.parametrize(("prefix", "symbols"), [(True, []), (False, []), (False, ["<tool>", "<sep>"])])
def test_pieces_equal_sentencepiece(prefix: bool, symbols: list[str]) -> None:
    pieces, metadata = _trained(prefix=prefix, symbols=symbols)
    mine = Tokenizer.from_gguf(metadata)
    likely = st.lists(st.sampled_from(["aa", "an", "ban", "hel", "lo", " ", "  ", "你", "12", "ß", "▁", *symbols])).map("".join)

    @given(st.one_of(TEXTS, likely))
    @example(" leading and trailing ")
    @example("")
    def check(text: str) -> None:
        ids = mine.encode(text, bos=False)
        assert ids == pieces.encode(text)
        assert mine.decode(ids) == text.replace("▁", " ")

    check()
    assert mine.encode("a")[0] == mine.bos == 1, "this kind begins a text with BOS"
    assert mine.encode_rest(" world") == pieces.encode("hello world")[len(pieces.encode("hello")) :]
    assert mine.encode_rest("world") == (pieces.encode("hello\nworld")[-len(mine.encode_rest("world")) :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "rwkv"}, "model.*unknown kind"),
        ({"model": None}, "model: missing"),
        ({"pre": "smolm"}, "did you mean 'smollm'"),
        ({"tokens": []}, "0 tokens"),
        ({"tokens": ["a", "b", "a"]}, "stand there twice"),
        ({"tokens": ["a", "b", 3]}, "not a list of strings"),
        ({"token_type": [1]}, "1 types for 3 tokens"),
        ({"merges": ["a b c", "x"]}, "does not join two tokens"),
        ({"merges": None}, "merges: missing"),
        ({"model": "llama"}, "0 scores for 3 tokens"),
        ({"model": "llama", "scores": [1.0]}, "1 scores for 3 tokens"),
    ],
)
def test_hostile_vocabularies(change: dict[str, Any], message: str) -> None:
    good = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"], "token_type": [1, 1, 1]}
    assert Tokenizer.from_gguf(_metadata(**good)).encode("ab") == [2]
    bad = {key: value for key, value in (good | change).items() if value is not None}
    with pytest.raises(FileError, match=message):
        Tokenizer.from_gguf(_metadata(**bad))
