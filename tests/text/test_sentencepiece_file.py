"""SentencePiece's `.model` files: its ids, pieces and text for models that it trained, and any bytes as a file."""

from __future__ import annotations

import io
import random
import struct
import unicodedata
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine
from transformers import AutoTokenizer

from trivium.core.errors import FileError
from trivium.text import sentencepiece_file
from trivium.text.tokenizer import Tokenizer

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Wer reitet so spät durch Nacht und Wind? Es ist der Vater mit seinem Kind.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心。",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
)
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "llama": {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
    },
    "folded": {"normalization_rule_name": "nmt_nfkc_cf", "add_dummy_prefix": False, "byte_fallback": True},
    "symbols": {"user_defined_symbols": ["<user>", "the"], "control_symbols": ["[INST]"], "pad_id": 3},
    "bare": {"normalization_rule_name": "identity", "user_defined_symbols": ["\n\n"], "add_dummy_prefix": False, "bos_id": -1},
}
BOTH = [(kind, name) for kind in ("bpe", "unigram") for name in MODELS]
ODD = (
    "",
    " ",
    "  a  b  ",
    "\n a\tb\u3000c",
    "▁",
    "▁▁a",
    "a ▁",
    "<s>",
    "</s>",
    "<0x41>",
    "ﬁ\u0301",
    "か\u3099",
    "\u1112\u1161\u11ab",
    "ê\u0301",
)


def lines(seed: int = 0, count: int = 700) -> list[str]:
    """Sentences of many languages, some without spaces, cut and joined anew."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(1, 4)):
            sentence = rng.choice(SENTENCES)
            start = rng.randrange(len(sentence) // 2)
            parts.append(sentence[start : start + rng.randrange(4, 60)])
        found.append(rng.choice(("", " ", "  ", " 12")).join(parts))
    return found


LINES = lines()


def random_texts(count: int, *, seed: int = 0, length: int = 12) -> list[str]:
    """Characters drawn from all of Unicode, a good part of them ASCII."""
    rng = random.Random(seed)
    pick = lambda: chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x80, 0xD800), rng.randrange(0xE000, 0x110000))))  # noqa: E731
    return ["".join(pick() for _ in range(length)) for _ in range(count)]


@cache
def data(kind: str, name: str) -> bytes:
    """A `.model` file that SentencePiece trained."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=out,
        model_type=kind,
        vocab_size=900,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **({"character_coverage": 0.98} | MODELS[name]),
    )
    return out.getvalue()


def both(kind: str, name: str) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data(kind, name))
    return Tokenizer(*sentencepiece_file.build(sentencepiece_file.parse(data(kind, name), where="m"), where="m"), where="m"), theirs


def differing(ours: Tokenizer, theirs: sentencepiece.SentencePieceProcessor, texts: Iterable[str]) -> list[str]:
    """The texts that the two read, or write, otherwise, in ASCII, with the pieces of ours and theirs."""
    found = []
    for text in texts:
        mine, ids = ours.encode(text), theirs.encode(text)
        known = theirs.unk_id() not in ids  # which it writes as " ⁇ "
        if mine != ids or (known and ours.decode(ids) != theirs.decode(ids)):
            found.append(f"{text!a}: {[ours.token(id) for id in mine]} {[theirs.id_to_piece(id) for id in ids]}")
    return found


@pytest.mark.parametrize(("kind", "name"), BOTH)
def test_ids_pieces_and_text_equal_sentencepiece(kind, name):
    ours, theirs = both(kind, name)
    assert ours.vocab_size == theirs.vocab_size()
    assert [ours.token(id) for id in range(ours.vocab_size)] == [theirs.id_to_piece(id) for id in range(ours.vocab_size)]
    assert differing(ours, theirs, [*lines(1, 1000), *random_texts(1000), *ODD]) == []


@pytest.mark.parametrize(("kind", "name"), BOTH)
def test_decomposed_text_is_normalized_as_sentencepiece_does(kind, name):
    """Text as some systems write it, with marks apart from their letters, is where the engine's own normalizer goes wrong."""
    ours, theirs = both(kind, name)
    texts = [] if name == "symbols" else lines(2, 300)  # a symbol that ends in the letter of a mark is found before the two are composed
    assert differing(ours, theirs, [unicodedata.normalize("NFD", text) for text in texts]) == []


@pytest.mark.parametrize(("kind", "name"), BOTH)
def test_what_was_normalized_comes_back_without_loss(kind, name):
    ours, theirs = both(kind, name)
    if MODELS[name].get("byte_fallback"):
        for text in lines(3, 200):
            normalized = theirs.normalize(text).replace("▁", " ").removeprefix(" " if MODELS[name].get("add_dummy_prefix", True) else "")
            assert ours.decode(ours.encode(text)) == normalized


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_symbols_stand_where_sentencepiece_puts_them(kind):
    ours, theirs = both(kind, "symbols")
    rng, parts = random.Random(0), ["<user>", "the", " ", "  ", "a", "ﬁ", "\n", "你好", "<", "in", "▁", "Nacht"]
    texts = ["".join(rng.choices(parts, k=rng.randrange(2, 8))) for _ in range(1500)]
    assert differing(ours, theirs, [text for text in texts if text not in ("<user>", "the")]) == []
    assert ours.encode("Nacht [INST]", allow_special=True)[-1] == theirs.piece_to_id("[INST]")
    assert ours.special == {theirs.piece_to_id(piece) for piece in ("<unk>", "<s>", "</s>", "<pad>", "[INST]")}


@pytest.mark.parametrize(("kind", "name"), BOTH)
def test_no_text_becomes_a_control_token(kind, name):
    ours, theirs = both(kind, name)
    control = {id for id in range(theirs.vocab_size()) if theirs.is_control(id)}
    for text in ("<s>", "</s> x <s>", "a<s></s>b", "[INST]the[INST]"):
        assert control.isdisjoint(ours.encode(text))


@pytest.mark.parametrize(("kind", "name"), [("bpe", "llama"), ("unigram", "plain"), ("unigram", "symbols")])
def test_a_directory_with_the_file_loads_and_is_saved_as_tokenizer_json(kind, name, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tokenizer.model").write_bytes(data(kind, name))
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": {"content": "<s>"}}')
    ours, theirs = Tokenizer.load(tmp_path / "a"), sentencepiece.SentencePieceProcessor(model_proto=data(kind, name))
    assert ours.add_bos and ours.bos == theirs.bos_id() and ours.eos == theirs.eos_id() and ours.unk == theirs.unk_id()
    assert not Tokenizer.load(_file(tmp_path, data(kind, name))).add_bos
    (tmp_path / "b").mkdir()
    ours.save(tmp_path / "b")
    again, other = Tokenizer.load(tmp_path / "b"), AutoTokenizer.from_pretrained(tmp_path / "b")
    assert again.digest() == ours.digest()
    engine = Engine.from_file(str(tmp_path / "b" / "tokenizer.json"))
    for text in LINES[:100]:
        wanted = [theirs.bos_id(), *theirs.encode(text)]
        assert again.encode(text) == wanted == engine.encode(text).ids == other.encode(text)
        assert again.encode_rest(text) == again.encode("x" + text)[-len(again.encode_rest(text)) :] or kind == "unigram"


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in ("bpe", "unigram") for name in ("plain", "llama", "symbols")])
def test_a_continuation_keeps_its_own_space_and_gets_no_other(kind, name):
    ours, theirs = both(kind, name)
    for rest in (" Nacht und Wind", "und Wind", "人人生而自由"):
        assert ours.encode_rest(rest) == theirs.encode("Wind" + rest)[len(theirs.encode("Wind")) :] or kind == "unigram"
        if theirs.unk_id() not in ours.encode_rest(rest):
            assert ours.decode(ours.encode("Wind") + ours.encode_rest(rest)) == "Wind" + rest


def _file(folder, content: bytes):
    file = folder / "alone.model"
    file.write_bytes(content)
    return file


def test_tokens_added_beside_the_file_keep_their_ids(tmp_path):
    size = len(sentencepiece_file.parse(data("bpe", "llama"), where="m").pieces)
    (tmp_path / "tokenizer.model").write_bytes(data("bpe", "llama"))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(f'{{"added_tokens_decoder": {{"1": {{"content": "<s>"}}, "{size}": {{"content": "<|im_end|>", "special": true}}}}}}')
    assert Tokenizer.load(tmp_path).encode("a<|im_end|>", allow_special=True)[-1] == size
    config.write_text(f'{{"added_tokens_decoder": {{"{size + 3}": {{"content": "<|im_end|>"}}}}}}')
    with pytest.raises(FileError, match=f"the id {size + 3}, but in the vocabulary it is {size}"):
        Tokenizer.load(tmp_path)


def message(*fields: tuple[int, int | float | bytes]) -> bytes:
    """A protobuf message."""
    out = b""
    for number, value in fields:
        match value:
            case bytes():
                out += _varint(number << 3 | 2) + _varint(len(value)) + value
            case float():
                out += _varint(number << 3 | 5) + struct.pack("<f", value)
            case int():
                out += _varint(number << 3) + _varint(value % (1 << 64))
    return out


def _varint(value: int) -> bytes:
    return b"" if value < 0 else bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


def piece(text: str, score: float = 0.0, type: int = 1) -> tuple[int, bytes]:
    return 1, message((1, text.encode()), (2, score), (3, type))


UNK, A = piece("<unk>", type=2), piece("a", -1.0)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ([], "no pieces"),
        ([UNK, A, A], "1 pieces stand there twice"),
        ([A], "0 unknown pieces"),
        ([UNK, A, (2, message((3, 3)))], "a word model"),
        ([UNK, A, (2, message((24, 1)))], "marks spaces at the end"),
        ([UNK, A, (3, message((5, 0)))], "keeps spaces as they are"),
        ([UNK, piece("b", type=5)], "switched off"),
        ([UNK, piece("<0x00>", type=6)], "bytes are not complete"),
        ([UNK, piece("c", float("nan"))], "score nan"),
        ([UNK, piece("c" * 513)], "a piece of 513 characters"),
        ([UNK, (1, message((1, b"\xff")))], "not UTF-8"),
        ([UNK, (1, b"\x0a\x7f")], "a field of 127 bytes where 0 are left"),
        ([UNK, (1, b"\x80" * 11)], "a number without end"),
        ([UNK, (1, b"\x0b")], "wire type 3"),
        ([UNK, (1, 7)], "a number where bytes belong"),
        ([UNK, A, (3, message((2, b"\x10\0\0\0abc")))], "normalization is cut off"),
        ([UNK, A, (3, message((2, struct.pack("<II", 4, 0xFFFFFC00) + b"x\0")))], "leads out of its table"),
    ],
)
def test_a_file_that_cannot_be_is_refused(fields, match, tmp_path):
    with pytest.raises(FileError, match=match):
        Tokenizer.load(_file(tmp_path, message(*fields)))


@settings(max_examples=50)
@given(st.data())
def test_a_damaged_file_is_refused_or_is_a_tokenizer(drawn):
    content = bytearray(data("unigram", "plain"))
    for _ in range(drawn.draw(st.integers(1, 4))):
        content[drawn.draw(st.integers(0, len(content) - 1))] = drawn.draw(st.integers(0, 255))
    cut = drawn.draw(st.sampled_from([len(content), drawn.draw(st.integers(0, len(content)))]))
    try:
        model = sentencepiece_file.parse(bytes(content[:cut]), where="m")
        tokenizer = Tokenizer(*sentencepiece_file.build(model, where="m"), where="m")
    except FileError:
        return
    ids = [id for text in ("a ﬁ 你好\u3000\u0301", SENTENCES[1], "\x01\x7f\xad") for id in tokenizer.encode(text)]
    assert all(0 <= id < tokenizer.vocab_size for id in ids)
