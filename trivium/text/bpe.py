"""Byte-level BPE trained from a stream of any size in bounded memory (arXiv:1508.07909; bytes as in GPT-2).

Each different word is counted once and kept once; a heap and an index from pairs to words make each merge cost what it
changes (the algorithm of Sennrich's reference code). When more words are seen than `most_words`, the rarest are let
go, and how many is said. The result is a `tokenizer.json` in the common format.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import pre_tokenizers

from ..core.errors import ConfigError
from ..core.registry import Registry
from .gguf_vocab import PRE
from .stream import byte_alphabet
from .tokenizer import Tokenizer

# How text is cut into words before merging; the published patterns stand where GGUF's names for them do.
splits: Registry[str] = Registry("split")
splits.add("gpt2", PRE["gpt-2"][0])
splits.add("gpt4", PRE["llama-bpe"][0])
splits.add("qwen2", PRE["qwen2"][0])
splits.add("whitespace", r"\s*\S+|\s+$")
splits.add("digits", r"\p{N}|[^\p{N}]+")

PART = 1 << 18  # characters that are cut into words at a time: what that takes is many times the text
BOUNDARY = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")


@dataclass(frozen=True)
class Words:
    """How often each word was seen; `dropped` counts the words, with repetition, that were let go to stay in bounds."""

    counts: Mapping[str, int]
    dropped: int


@dataclass(frozen=True)
class Trained:
    """A trained tokenizer, and what its training saw."""

    tokenizer: Tokenizer
    merges: tuple[tuple[str, str], ...]
    words: int
    dropped: int


def pre_tokenizer(split: str) -> pre_tokenizers.PreTokenizer:
    """The `tokenizers` pre-tokenizer of a named split: the pattern, then bytes as printable characters."""
    pattern = tokenizers.Regex(splits.get(split, field="split"))
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def count_words(texts: Iterable[str], *, split: str = "gpt4", most_words: int = 2_000_000) -> Words:
    """Count the words of `texts`. Never holds more than about `most_words` different ones: past that, those seen least
    often are dropped, all of one count together, until a tenth is free."""
    cut, counts, dropped = pre_tokenizer(split), Counter(), 0
    for text in texts:
        for part in _parts(text):
            counts.update([word for word, _ in cut.pre_tokenize_str(part)])
            if len(counts) <= most_words:
                continue
            while len(counts) > most_words - most_words // 10:
                few = min(counts.values())
                gone = [word for word, count in counts.items() if count == few]
                dropped += few * len(gone)
                for word in gone:
                    del counts[word]
    return Words(counts, dropped)


def _parts(text: str) -> Iterator[str]:
    """A text in parts of about `PART` characters, cut before a single space between others, where the published patterns cut."""
    at = 0
    while len(text) - at > PART:
        found = BOUNDARY.search(text, at + PART)
        if found is None:
            break
        yield text[at : found.start()]
        at = found.start()
    yield text[at:]


def train_merges(counts: Mapping[str, int], *, alphabet: Sequence[str], size: int, min_count: int = 2) -> list[tuple[str, str]]:
    """The merges, first to last, that grow `alphabet` to `size` tokens: each time the pair seen most often, and of equals
    the one whose tokens came first. Stops when no pair is seen `min_count` times."""
    tokens = list(alphabet)
    ids = {token: i for i, token in enumerate(tokens)}
    words = [[ids[char] for char in word] for word in counts]
    weights = list(counts.values())
    pairs: defaultdict[tuple[int, int], int] = defaultdict(int)
    where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for index, (word, weight) in enumerate(zip(words, weights, strict=True)):
        for pair in itertools.pairwise(word):
            pairs[pair] += weight
            where[pair].add(index)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    merges: list[tuple[str, str]] = []
    while heap and len(tokens) < size:
        negative, pair = heapq.heappop(heap)
        count = pairs[pair]
        if count != -negative:  # changed since it was pushed
            if count > 0:
                heapq.heappush(heap, (-count, pair))
            continue
        if count < min_count:
            break
        merges.append((tokens[pair[0]], tokens[pair[1]]))
        merged = ids.setdefault("".join(merges[-1]), len(tokens))
        if merged == len(tokens):
            tokens.append("".join(merges[-1]))
        grown: set[tuple[int, int]] = set()
        for index in where.pop(pair):
            found = _merge(words[index], pair, merged, pairs, weights[index])
            for each in found:
                where[each].add(index)
            grown |= found
        del pairs[pair]
        for each in grown:
            heapq.heappush(heap, (-pairs[each], each))
    return merges


def _merge(word: list[int], pair: tuple[int, int], merged: int, pairs: dict[tuple[int, int], int], weight: int) -> set[tuple[int, int]]:
    """Merge `pair` in `word`, in place and from the left; move `weight` in `pairs` from each neighboring pair that goes to
    the one that comes, and return those."""
    first, second = pair
    found: set[tuple[int, int]] = set()
    i = 0
    while i < len(word) - 1:
        if word[i] == first and word[i + 1] == second:
            word[i : i + 2] = [merged]
            if i > 0:
                pairs[word[i - 1], first] -= weight
                came = (word[i - 1], merged)
                pairs[came] += weight
                found.add(came)
            if i + 1 < len(word):
                pairs[second, word[i + 1]] -= weight
                came = (merged, word[i + 1])
                pairs[came] += weight
                found.add(came)
        i += 1
    return found


def train(
    texts: Iterable[str],
    *,
    size: int,
    split: str = "gpt4",
    special: Sequence[str] = ("<|endoftext|>",),
    most_words: int = 2_000_000,
    min_count: int = 2,
) -> Trained:
    """A byte-level BPE tokenizer of at most `size` tokens: `special` first, the 256 bytes, then merges.

    The first special token begins and ends a text. Raises `ConfigError` for a size with no room for the bytes.
    """
    alphabet = sorted(byte_alphabet())
    if size < len(special) + len(alphabet):
        raise ConfigError(f"size: {size} has no room for {len(special)} special tokens and 256 bytes", field="size", value=size)
    if len(set(special)) != len(special) or not all(special):
        raise ConfigError(f"special: {list(special)} must be different and not empty", field="special")
    words = count_words(texts, split=split, most_words=most_words)
    merges = train_merges(words.counts, alphabet=alphabet, size=size - len(special), min_count=min_count)
    return Trained(build(merges, split=split, special=special), tuple(merges), len(words.counts), words.dropped)


def build(merges: Sequence[tuple[str, str]], *, split: str, special: Sequence[str]) -> Tokenizer:
    """The tokenizer that these merges, this split and these special tokens make."""
    vocab = {token: i for i, token in enumerate([*special, *sorted(byte_alphabet())])}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(merges)))
    engine.pre_tokenizer = pre_tokenizer(split)
    engine.decoder = tokenizers.decoders.ByteLevel()
    engine.add_special_tokens(list(special))
    config: dict[str, object] = {}
    if special:  # one token stands before and after each document, as in GPT-2's training text
        end = special[0]
        engine.post_processor = tokenizers.processors.TemplateProcessing(single=f"{end} $A", special_tokens=[(end, vocab[end])])
        config = {"bos_token": end, "eos_token": end, "add_bos_token": True, "add_eos_token": True}
    return Tokenizer(engine, config, where="trained tokenizer")
