"""tiktoken's rank files: its ids on any text, and a clear error for a file that is none."""

from __future__ import annotations

import base64
import random
from pathlib import Path

import pytest
import tiktoken
from tokenizers import Tokenizer as Engine
from transformers import AutoTokenizer, GPT2TokenizerFast

from tests.text.test_bpe import texts
from tests.text.test_sentencepiece_file import LINES, random_texts
from trivium.text import bpe, tiktoken_file
from trivium.text.stream import byte_alphabet
from trivium.text.tokenizer import Tokenizer

PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def trained(split: str) -> dict[bytes, int]:
    """Ranks of a vocabulary over many scripts."""
    tokenizer = bpe.train([*LINES, *texts(count=10)], size=1800, split=split, special=()).tokenizer
    alphabet = byte_alphabet()
    return {bytes(alphabet[char] for char in tokenizer.token(id)): id for id in range(tokenizer.vocab_size)}


def write(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return path


@pytest.mark.concept("T04.05", "T04.01", part="text/tiktoken_file.py")
@pytest.mark.parametrize("split", PATTERNS)
def test_ids_equal_tiktoken(split, tmp_path):
    ranks = trained(split)
    special = {"<|endoftext|>": len(ranks) + 5, "<|fim|>": len(ranks) + 1}  # with gaps, as cl100k has
    theirs = tiktoken.Encoding("test", pat_str=PATTERNS[split], mergeable_ranks=ranks, special_tokens=special)
    ours = tiktoken_file.load(write(tmp_path / "test.tiktoken", ranks), split=split, special=special)
    for text in [*random_texts(10_000), *LINES, *texts(5, 20)]:
        ids = theirs.encode(text, disallowed_special=())
        assert ours.encode(text) == ids, ascii(text)
    text = "a <|endoftext|>b<|fim|>"
    assert ours.encode(text) == theirs.encode(text, disallowed_special=())
    assert ours.encode(text, allow_special=True) == theirs.encode(text, allowed_special="all")
    assert ours.decode(theirs.encode("".join(LINES))) == "".join(LINES) and ours.eos == len(ranks) + 5


def test_ranks_that_no_training_gave_merge_as_in_tiktoken(tmp_path):
    """Tokens in an order that training would not find: a token before its parts, several ways to one token, unreachable ones."""
    rng = random.Random(1)
    tokens = {bytes(rng.choices(b"abc", k=rng.randrange(2, 5))) for _ in range(60)}
    ranks = {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *rng.sample(sorted(tokens), len(tokens))])}
    theirs = tiktoken.Encoding("test", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens={})
    ours = tiktoken_file.load(write(tmp_path / "odd.tiktoken", ranks), split="gpt2")
    different = 0
    for _ in range(2000):
        text = "".join(rng.choices("abc", k=rng.randrange(1, 14)))
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        different += ids != theirs.encode(text)
    assert different <= 20, "only where two ways to one token overlap, of which tiktoken takes the left one"


@pytest.mark.concept("T04.05", part="text/tiktoken_file.py")
def test_the_saved_tokenizer_is_read_by_transformers_with_the_same_ids(tmp_path):
    ours = tiktoken_file.build(trained("gpt2"), split="gpt2", special={"<|endoftext|>": 1800}, where="test")
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.digest() == ours.digest()
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    gpt2 = GPT2TokenizerFast(tokenizer_object=Engine.from_file(str(tmp_path / "tokenizer.json")))
    for text in [*random_texts(300), *LINES[:200]]:
        assert theirs.encode(text) == again.encode(text) == gpt2.encode(text, add_special_tokens=False)


def test_a_damaged_file_is_refused_and_says_where(tmp_path):
    good = {bytes([byte]): byte for byte in range(256)}
    file = write(tmp_path / "x.tiktoken", good)
    text = file.read_text()
    for bad, match in (
        (text + "!!! 256\n", r":257: not a token in base64"),
        (text + "YWI= x\n", r":257: not a token"),
        (text + "YWI= -1\n", r":257: .* ranks go from 0"),
        (text + "YQ== 300\n", r":257: .* stand once"),
        (text + "YWI= 255\n", r"two tokens have the same rank"),
        ("".join(text.splitlines(keepends=True)[:200]), r"56 single bytes are no token \(0xc8, 0xc9"),
        ("", r"256 single bytes"),
    ):
        file.write_text(bad)
        with pytest.raises(ValueError, match=match):
            tiktoken_file.load(file, split="gpt2")
    with pytest.raises(ValueError, match="unknown split"):
        tiktoken_file.build(good, split="gpt9", special={}, where="x")
    with pytest.raises(ValueError, match="cannot have the id 3"):
        tiktoken_file.build(good, split="gpt2", special={"<|e|>": 3}, where="x")
    with pytest.raises(ValueError, match="leaves '<e>' whole"):
        tiktoken_file.build(good, split="whitespace", special={"<e>": 300}, where="x")
