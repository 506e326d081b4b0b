"""tiktoken's rank files (`*.tiktoken`) as byte-level BPE: each line a token in base64 and its rank.

tiktoken merges whichever two neighbors make the token of lowest rank; the engine wants those pairs written out. The file
does not say how text is split into words or which tokens are special, so the caller does.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

import tokenizers

from ..core.errors import ConfigError, FileError
from .bpe import pre_tokenizer
from .files import read_text
from .gguf_vocab import MAX_TOKENS
from .stream import byte_alphabet
from .tokenizer import Tokenizer

LONGEST = 1024  # bytes of a token; the longest that is known has 128


def load(file: str | Path, *, split: str, special: Mapping[str, int] | None = None) -> Tokenizer:
    """The tokenizer of a rank file. `split` names how text is cut into words (see `bpe.splits`), `special` gives special
    tokens their ids. Raises `FileError`, and `ConfigError` for an unknown split or an id that is taken."""
    return build(ranks(file), split=split, special=special or {}, where=str(file))


def ranks(file: str | Path) -> dict[bytes, int]:
    """Each token and its rank. Raises `FileError`."""
    found: dict[bytes, int] = {}
    for number, line in enumerate(read_text(Path(file)).splitlines(), 1):
        if not line:
            continue
        token, _, rank = line.partition(" ")
        try:
            key, value = base64.b64decode(token, validate=True), int(rank)
        except (binascii.Error, ValueError):
            raise FileError(f"{file}:{number}: not a token in base64 and its rank: {line!r:.60}") from None
        if not 0 < len(key) <= LONGEST or key in found or not 0 <= value < MAX_TOKENS:
            raise FileError(
                f"{file}:{number}: {line!r:.60}: tokens have 1 to {LONGEST} bytes and stand once; ranks go from 0 to {MAX_TOKENS - 1}"
            )
        found[key] = value
    if len(set(found.values())) != len(found):
        raise FileError(f"{file}: two tokens have the same rank")
    if missing := [byte for byte in range(256) if bytes([byte]) not in found]:
        raise FileError(
            f"{file}: {len(missing)} single bytes are no token ({', '.join(map(hex, missing[:3]))}, ...); the file is damaged or cut off"
        )
    return found


def build(ranks: Mapping[bytes, int], *, split: str, special: Mapping[str, int], where: str) -> Tokenizer:
    """The tokenizer of these ranks, whose ids they are. The first special token ends a text."""
    spelled = {byte: char for char, byte in byte_alphabet().items()}
    vocab = {"".join(spelled[byte] for byte in token): rank for token, rank in ranks.items()}
    cut = pre_tokenizer(split)
    taken = {id: token for token, id in vocab.items()}
    for token, id in special.items():
        if token in vocab or id in taken or not 0 <= id < MAX_TOKENS:
            raise ConfigError(f"special: {token!r} cannot have the id {id}; {taken.get(id, token)!r} is a token already", field="special")
        if len(cut.pre_tokenize_str(token)) < 2:  # a whole word that is a token would become that token
            raise ConfigError(f"special: the split {split!r} leaves {token!r} whole, so plain text could become it", field="special")
        taken[id] = token
    # A whole word that is a token is that token, as in tiktoken, even where merges would not lead to it.
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab | dict(special), merges=_merges(vocab), ignore_merges=True))
    engine.pre_tokenizer = cut
    engine.decoder = tokenizers.decoders.ByteLevel()
    engine.add_special_tokens(list(special))
    return Tokenizer(engine, {"eos_token": next(iter(special))} if special else {}, where=where)


def _merges(vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to join two tokens to a third: the third with the lowest rank first, and of its ways that of the lowest ranks."""
    return [
        (token[:cut], token[cut:])
        for token in sorted(vocab, key=vocab.__getitem__)
        for cut in sorted(
            (cut for cut in range(1, len(token)) if token[:cut] in vocab and token[cut:] in vocab),
            key=lambda cut: (vocab[token[:cut]], vocab[token[cut:]]),
        )
    ]
