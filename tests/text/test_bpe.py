"""Training byte-level BPE: the merges of `tokenizers` and of recounting naively, bounds on memory, what comes out."""

from __future__ import annotations

import itertools
import json
import random
import re
import tracemalloc
from collections import Counter

import pytest
import regex
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from trivium.text import bpe
from trivium.text.stream import byte_alphabet
from trivium.text.tokenizer import Tokenizer

ALPHABET = sorted(byte_alphabet())


def texts(seed: int = 0, count: int = 60) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choice("abcdeé \n12") for _ in range(rng.randrange(1, 7))) for _ in range(80)]
    return [" ".join(rng.choices(words, k=40)) + " 你好 🚀" for _ in range(count)]


def naive(counts, size):
    """Recount every pair before each merge; equal counts go to the pair whose tokens came first."""
    tokens = list(ALPHABET)
    words = [[tokens.index(c) for c in word] for word in counts]
    merges = []
    while len(tokens) < size:
        pairs = Counter()
        for word, weight in zip(words, counts.values(), strict=True):
            for pair in itertools.pairwise(word):
                pairs[pair] += weight
        if not pairs or max(pairs.values()) < 2:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((tokens[best[0]], tokens[best[1]]))
        merged = tokens[best[0]] + tokens[best[1]]
        if merged not in tokens:
            tokens.append(merged)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [tokens.index(merged)]
                i += 1
    return merges


@pytest.mark.concept("X.41", part="text/bpe.py")
@pytest.mark.parametrize("seed", range(3))
def test_merges_equal_naive_recounting(seed):
    counts = bpe.count_words(texts(seed, 8)).counts
    assert bpe.train_merges(counts, alphabet=ALPHABET, size=400) == naive(counts, 400)


def sennrich(counts, size):
    """Algorithm 1 of arXiv:1508.07909, as printed there but for the order of pairs that are seen equally often."""
    vocab = {" ".join(word): count for word, count in counts.items()}
    merges, order = [], {token: i for i, token in enumerate(ALPHABET)}
    for _ in range(size - len(ALPHABET)):
        pairs = Counter()
        for word, frequency in vocab.items():
            symbols = word.split()
            for i in range(len(symbols) - 1):
                pairs[symbols[i], symbols[i + 1]] += frequency
        best = min(pairs, key=lambda pair: (-pairs[pair], order[pair[0]], order[pair[1]]))
        pattern = re.compile(r"(?<!\S)" + re.escape(" ".join(best)) + r"(?!\S)")
        vocab = {pattern.sub(lambda _: "".join(best), word): count for word, count in vocab.items()}  # noqa: B023
        order.setdefault("".join(best), len(order))
        merges.append(best)
    return merges


@pytest.mark.concept("T04.01", part="text/bpe.py")
def test_merges_equal_the_published_algorithm():
    paper = {"low": 5, "lower": 2, "newest": 6, "widest": 3}
    assert bpe.train_merges(paper, alphabet=ALPHABET, size=256 + 7) == sennrich(paper, 256 + 7)
    counts = bpe.count_words(texts(5, 4)).counts
    assert bpe.train_merges(counts, alphabet=ALPHABET, size=320, min_count=1) == sennrich(counts, 320)
    tokenizer = bpe.train(["play sing playing player ring"] * 3, size=300, split="gpt2").tokenizer
    assert [tokenizer.token(id) for id in tokenizer.encode("playing", bos=False)] == ["play", "ing"]


@pytest.mark.concept("X.41", part="text/bpe.py")
@pytest.mark.concept("T04.01", part="text/bpe.py")
@pytest.mark.parametrize("split", ["gpt2", "gpt4"])
def test_merges_and_ids_equal_tokenizers(split):
    engine = Engine(models.BPE())
    engine.pre_tokenizer, engine.decoder = bpe.pre_tokenizer(split), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, min_frequency=2, special_tokens=["<|endoftext|>"], initial_alphabet=ALPHABET, show_progress=False
    )
    engine.train_from_iterator(texts(), trainer)
    ours = bpe.train(texts(), size=600, split=split)
    theirs = json.loads(engine.to_str())["model"]
    assert [list(merge) for merge in ours.merges] == [list(merge) for merge in theirs["merges"]]
    for text in (*texts(9, 5), "unseen ÿ 𝔘nicode\r\n\t  end  "):
        assert ours.tokenizer.encode(text, bos=False) == engine.encode(text).ids


@pytest.mark.concept("T04.05", part="text/bpe.py")
def test_ids_equal_tiktoken_with_the_same_ranks():
    trained = bpe.train(texts(), size=700, split="gpt2", special=("<|end|>",))
    alphabet = byte_alphabet()
    ranks = {}
    for token, i in ((trained.tokenizer.token(i), i) for i in range(trained.tokenizer.vocab_size)):
        if token != "<|end|>":
            ranks[bytes(alphabet[c] for c in token)] = i
    theirs = tiktoken.Encoding("test", pat_str=bpe.splits.get("gpt2"), mergeable_ranks=ranks, special_tokens={"<|end|>": 0})
    rng = random.Random(3)
    for _ in range(1000):
        text = "".join(
            chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x80, 0xD800), rng.randrange(0xE000, 0x110000)))) for _ in range(12)
        )
        assert trained.tokenizer.encode(text, bos=False) == theirs.encode(text, disallowed_special=())


@pytest.mark.concept("T04.05", part="text/bpe.py")
@given(st.text())
def test_any_text_comes_back_and_nothing_is_unknown(text):
    tokenizer = TRAINED.tokenizer
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.unk is None and all(0 <= i < tokenizer.vocab_size for i in ids)


TRAINED = bpe.train(texts(), size=500)


@pytest.mark.concept("T04.05", part="text/bpe.py")
def test_any_bytes_come_back():
    alphabet = {byte: char for char, byte in byte_alphabet().items()}
    ids = {byte: TRAINED.tokenizer.id(char) for byte, char in alphabet.items()}
    pieces = TRAINED.tokenizer._pieces
    for seed in range(20):
        data = random.Random(seed).randbytes(50)
        assert b"".join(pieces[ids[byte]] for byte in data) == data


# What one version of Unicode leaves unassigned is a letter in the next, and the oracles' versions differ.
ASSIGNED = st.text(st.characters(exclude_categories=("Cs", "Cn")))


@pytest.mark.concept("X.40", part="text/bpe.py")
@given(ASSIGNED)
def test_splits_are_the_published_patterns(text):
    published = {
        "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    }
    for name, pattern in published.items():
        cut = pre_tokenizers.Split(Regex(bpe.splits.get(name)), behavior="isolated")
        assert [piece for piece, _ in cut.pre_tokenize_str(text)] == regex.findall(pattern, text)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert bpe.pre_tokenizer("gpt2").pre_tokenize_str(text) == gpt2.pre_tokenize_str(text)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=False)])
    assert bpe.pre_tokenizer("digits").pre_tokenize_str(text) == digits.pre_tokenize_str(text)
    words = pre_tokenizers.Split(Regex(bpe.splits.get("whitespace")), "isolated").pre_tokenize_str(text)
    assert [part for word, _ in words for part in regex.findall(r"\S+", word)] == regex.findall(r"\S+", text)
    for name in bpe.splits:
        assert "".join(piece for piece, _ in pre_tokenizers.Split(Regex(bpe.splits.get(name)), "isolated").pre_tokenize_str(text)) == text


@pytest.mark.slow
def test_a_stream_larger_than_the_allowed_memory_stays_under_it():
    def endless():
        rng = random.Random(0)
        for _ in range(3000):
            yield " ".join("".join(rng.choices("abcdefghij", k=9)) for _ in range(30)) + " the common words of it"

    tracemalloc.start()
    words = bpe.count_words(endless(), most_words=5000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(words.counts) <= 5000 and words.dropped > 50_000
    assert words.counts["Ġcommon"] == 3000, "what is seen often is counted exactly"
    assert peak < 8_000_000


@pytest.mark.parametrize("split", ["gpt2", "gpt4", "qwen2", "whitespace"])
def test_a_long_text_is_counted_in_parts_as_in_one(split, monkeypatch):
    text = "".join(texts(4, 20)) + "x" * 300 + "\n\n  a  b 12 345 don't --- \n" * 20
    whole = bpe.count_words([text], split=split).counts
    monkeypatch.setattr(bpe, "PART", 50)
    assert bpe.count_words([text], split=split).counts == whole


def test_the_saved_tokenizer_is_the_same_one(tmp_path):
    TRAINED.tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.digest() == TRAINED.tokenizer.digest() and again.eos == 0 and again.add_eos
    assert again.encode("a <|endoftext|> b") == TRAINED.tokenizer.encode("a <|endoftext|> b")
    assert Engine.from_file(str(tmp_path / "tokenizer.json")).encode("abc déf").ids == again.encode("abc déf")


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="no room for 1 special tokens and 256 bytes"):
        bpe.train(["a"], size=256)
    with pytest.raises(ValueError, match="must be different"):
        bpe.train(["a"], size=300, special=("a", "a"))
    with pytest.raises(ValueError, match="unknown split 'gpt5'"):
        bpe.train(["a"], size=300, split="gpt5")
    assert bpe.train([], size=300).tokenizer.vocab_size == 257
