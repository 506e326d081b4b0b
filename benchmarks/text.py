"""Tokenizers: encoding and training speed beside tokenizers, tiktoken and sentencepiece, and the memory that training takes.

Everyone encodes the same documents (the Python standard library's own source, and parts of it with letters of other scripts)
with the same vocabularies, one call a document, one thread; ids are compared, and the benchmark stops
where they differ (but for a few ties of unigram models). Training
gives the merges that tokenizers gives. The naive side recounts every pair before each merge, for a few merges, and is scaled up.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import random
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import common
from .common import Row

MB = 1_000_000
# A long document's likeliest pieces: sentencepiece adds their scores in float32, so near ties and ties fall differently there.
MAY_DIFFER = {"byte-level BPE": 0.0, "SentencePiece BPE": 0.0, "SentencePiece unigram": 0.03}
KINDS = {"byte-level BPE": ("tokenizers", "tiktoken"), "SentencePiece BPE": ("sentencepiece",), "SentencePiece unigram": ("sentencepiece",)}
SPLIT = "gpt2"
NAIVE_GOAL, MEMORY_GOAL = 50, 1.0  # times as fast; share of the stream's size
SCRIPTS = (
    "абвгдежзиклмнопрстуф",
    "αβγδεζηθικλμνξοπρστυ",
    "的一是不了人我在有他这中大来上国个到说们",
    "กขคงจฉชซญดตถทธนบปผพฟ",
    "あいうえおかきくけこさしすせそたちつて",
)


def documents(size: int) -> list[str]:
    """At least `size` bytes of text, every fourth document spelled in another script."""
    rng, found, total = random.Random(0), [], 0
    for number, file in enumerate(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))):
        text = file.read_text(encoding="utf-8")[:20_000]
        if number % 4 == 3:
            letters = rng.choice(SCRIPTS)
            text = text.translate({ord(char): letters[i % len(letters)] for i, char in enumerate("abcdefghijklmnopqrstuvwxyz")})
        found.append(text)
        total += len(text.encode())
        if total >= size:
            break
    return found


def prepare(folder: Path, *, size: int, vocab: int) -> int:
    """The documents, and one vocabulary of each kind; returns bytes of text."""
    import sentencepiece

    from trivium.text import bpe
    from trivium.text.stream import byte_alphabet

    texts = documents(size)
    (folder / "texts.json").write_text(json.dumps(texts))
    trained = bpe.train(texts, size=vocab, split=SPLIT, special=()).tokenizer
    (folder / "bytes").mkdir()
    trained.save(folder / "bytes")
    alphabet = byte_alphabet()
    ranks = {id: bytes(alphabet[char] for char in trained.token(id)) for id in range(trained.vocab_size)}
    (folder / "ranks.tiktoken").write_text("".join(f"{base64.b64encode(token).decode()} {id}\n" for id, token in ranks.items()))
    for kind in ("bpe", "unigram"):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.splitlines() if line.strip()),
            model_prefix=str(folder / kind),
            model_type=kind,
            vocab_size=vocab,
            hard_vocab_limit=False,
            byte_fallback=True,
            num_threads=1,
            minloglevel=2,
        )
    return sum(len(text.encode()) for text in texts)


class Side:
    """Documents, and a way to encode one with each kind of vocabulary."""

    def __init__(self, *, folder: str):
        self.folder = Path(folder)
        self.texts: list[str] = json.loads((self.folder / "texts.json").read_text())
        self.kinds: dict[str, Callable[[str], list[int]]] = {}

    def encode(self, kind: str) -> dict[str, Any]:
        do = self.kinds[kind]
        times, ids = common.clock(lambda: [do(text) for text in self.texts])
        return {**times, "tokens": sum(map(len, ids)), "digests": [digest(one) for one in ids]}


class Trivium(Side):
    def __init__(self, *, folder: str):
        super().__init__(folder=folder)
        from trivium.text.tokenizer import Tokenizer

        files = {"byte-level BPE": "bytes", "SentencePiece BPE": "bpe.model", "SentencePiece unigram": "unigram.model"}
        for kind, file in files.items():
            tokenizer = Tokenizer.load(self.folder / file)
            self.kinds[kind] = lambda text, tokenizer=tokenizer: tokenizer.encode(text, bos=False)

    def train(self, vocab: int) -> dict[str, Any]:
        from trivium.text import bpe

        times, found = common.clock(lambda: bpe.train(self.texts, size=vocab, split=SPLIT, special=()))
        return {**times, "merges": len(found.merges), "digest": digest(found.merges)}

    def naive(self, merges: int) -> dict[str, Any]:
        """The first merges, every pair recounted before each."""
        from trivium.text import bpe

        counts = bpe.count_words(self.texts, split=SPLIT).counts
        return {**common.clock(lambda: recount(counts, merges))[0], "words": len(counts)}


class Tokenizers(Side):
    def __init__(self, *, folder: str):
        super().__init__(folder=folder)
        from tokenizers import Tokenizer

        engine = Tokenizer.from_file(str(self.folder / "bytes" / "tokenizer.json"))
        self.kinds["byte-level BPE"] = lambda text: engine.encode(text).ids

    def train(self, vocab: int) -> dict[str, Any]:
        from tokenizers import Tokenizer, models, trainers

        from trivium.text import bpe
        from trivium.text.stream import byte_alphabet

        engine = Tokenizer(models.BPE())
        engine.pre_tokenizer = bpe.pre_tokenizer(SPLIT)
        trainer = trainers.BpeTrainer(vocab_size=vocab, min_frequency=2, initial_alphabet=sorted(byte_alphabet()), show_progress=False)
        times, _ = common.clock(lambda: engine.train_from_iterator(self.texts, trainer))
        merges = json.loads(engine.to_str())["model"]["merges"]
        return {**times, "merges": len(merges), "digest": digest(merges)}


class Tiktoken(Side):
    def __init__(self, *, folder: str):
        super().__init__(folder=folder)
        import tiktoken

        from trivium.text import bpe, tiktoken_file

        ranks = tiktoken_file.ranks(self.folder / "ranks.tiktoken")
        encoding = tiktoken.Encoding("same", pat_str=bpe.splits.get(SPLIT), mergeable_ranks=ranks, special_tokens={})
        self.kinds["byte-level BPE"] = encoding.encode_ordinary


class SentencePiece(Side):
    def __init__(self, *, folder: str):
        super().__init__(folder=folder)
        import sentencepiece

        for kind, file in {"SentencePiece BPE": "bpe.model", "SentencePiece unigram": "unigram.model"}.items():
            self.kinds[kind] = sentencepiece.SentencePieceProcessor(model_file=str(self.folder / file)).encode


class Memory:
    """Training on a stream that is made while it is read."""

    def __init__(self, *, folder: str):
        from trivium.text import bpe

        self.bpe = bpe

    def train(self, size: int, most_words: int) -> dict[str, Any]:
        before = common.peak_bytes()
        trained = self.bpe.train(stream(size), size=2048, split=SPLIT, special=(), most_words=most_words)
        return {"before": before, "after": common.peak_bytes(), "dropped": trained.dropped}


def stream(size: int) -> Iterator[str]:
    """`size` bytes of text in which new words never end."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    for _ in range(size // MB):
        text = " ".join("".join(rng.choices(letters, k=7)) for _ in range(MB // 16))
        yield text + " the words that all texts have" * (MB // 60)


def recount(counts: Counter[str], merges: int) -> None:
    words = [(list(word), count) for word, count in counts.items()]
    for _ in range(merges):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words:
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        best = max(pairs, key=pairs.__getitem__)
        for word, _ in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = ["".join(best)]
                at += 1


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--size", type=float, default=4, help="MB of text (default: 4)")
    parser.add_argument("--vocab", type=int, default=8192, help="tokens of each vocabulary (default: 8192)")
    parser.add_argument("--stream", type=int, default=200, help="MB of the stream for the memory row (default: 200)")
    options = parser.parse_args()
    machine = common.machine()
    options.threads = 1  # what every side uses
    if options.quick:
        options.rounds, options.size, options.vocab, options.stream = 1, 1, 2048, 60
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        size = prepare(Path(folder), size=int(options.size * MB), vocab=options.vocab)
        facts["text"] = f"{size / MB:.1f} MB; vocabularies of {options.vocab:,} tokens"
        names = {"trivium": "Trivium", "tokenizers": "Tokenizers", "tiktoken": "Tiktoken", "sentencepiece": "SentencePiece"}
        targets = {name: f"benchmarks.text:{target}" for name, target in names.items()}
        with common.workers(targets, threads=1, options={"folder": folder}) as sides:
            for kind, peers in KINDS.items():
                found = common.rounds(
                    ("trivium", *peers),
                    lambda side, kind=kind: sides[side].call("encode", kind=kind),
                    count=options.rounds,
                    warm=1,
                    what=kind,
                )
                every = [one["digests"] for times in found.values() for one in times]
                differ = sum(len(set(document)) != 1 for document in zip(*every, strict=True))
                if differ > MAY_DIFFER[kind] * len(every[0]):
                    sys.exit(f"{kind}: the sides give different ids for {differ} documents, so their speeds are not comparable")
                facts[f"{kind}, ids equal"] = f"{found['trivium'][0]['tokens']:,} tokens; {differ} of {len(every[0])} documents differ"
                for peer in peers:
                    rows += speeds({"trivium": found["trivium"], peer: found[peer]}, f"encode, {kind}", size, peer)
            found = common.rounds(
                ("trivium", "tokenizers"),
                lambda side: sides[side].call("train", vocab=options.vocab),
                count=options.rounds,
                warm=0,
                what="train",
            )
            if len({one["digest"] for times in found.values() for one in times}) != 1:
                sys.exit("train: the sides give different merges")
            rows += speeds(found, "train byte-level BPE", size, "tokenizers")
            merges, few = found["trivium"][0]["merges"], 10
            naive = sides["trivium"].call("naive", merges=few)
            ratio = naive["cpu"] / few * merges / found["trivium"][0]["cpu"]
            rows.append(Row("train, beside recounting naively", "times as fast", "more", [ratio], goal=NAIVE_GOAL))
            facts["trained"] = (
                f"{merges:,} merges, equal to tokenizers'; {naive['words']:,} different words; {few} naive merges {naive['cpu']:.2f} s"
            )
        with common.workers({"memory": "benchmarks.text:Memory"}, threads=1, options={"folder": folder}) as sides:
            used = sides["memory"].call("train", size=options.stream * MB, most_words=50_000)
        grown = used["after"] - used["before"]
        rows.append(Row("peak memory of training, a stream's size", "share", "less", [grown / (options.stream * MB)], goal=MEMORY_GOAL))
        facts["stream"] = f"{options.stream} MB read, {grown / MB:.0f} MB more than before; {used['dropped']:,} words let go, 50,000 held"
    notes = ["tiktoken and sentencepiece get their own files, trivium reads those of sentencepiece; no side uses a batch call"]
    told = common.versions("trivium", "tokenizers", "tiktoken", "sentencepiece")
    common.report("text", options, rows, facts=facts, notes=notes, versions=told, machine=machine)


def speeds(found: dict[str, list[dict[str, Any]]], what: str, size: int, peer: str) -> list[Row]:
    """MB per second, and per processor second."""
    rates = {key: {side: [size / MB / one[key] for one in times] for side, times in found.items()} for key in ("seconds", "cpu")}
    return [
        Row(what, unit, "more", rates[key]["trivium"], peer, rates[key][peer]) for key, unit in (("seconds", "MB/s"), ("cpu", "MB/cpu s"))
    ]


if __name__ == "__main__":
    main()
