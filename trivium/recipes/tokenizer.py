"""A tokenizer of one's own: trained from text of any size, looked into, and given further tokens together with its model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tokenizers

from ..adapt.resize import resize
from ..core.errors import ConfigError, DataError, FileError, TriviumError
from ..core.log import log
from ..data import rows
from ..io.files import atomic_directory
from ..text import bpe, tiktoken_file
from ..text.prompt import Prompt
from ..text.sentencepiece_file import NAME
from ..text.tokenizer import FILE, Tokenizer
from .data import text_side
from .load import Bundle

SAMPLE = 1 << 24  # bytes of held-out text that are encoded, at most


@dataclass(frozen=True)
class Report:
    """What training gave. `dropped` words, with repetition, were let go to stay in memory; `per_token` is bytes of held-out
    text a token, `held_out` how many bytes that was measured on."""

    path: str
    digest: str
    size: int
    words: int
    dropped: int
    bytes: int
    per_token: float | None
    held_out: int


def train(
    data: Sequence[str | Path],
    out: str | Path,
    *,
    size: int,
    split: str = "gpt4",
    special: Sequence[str] = ("<|endoftext|>",),
    most_words: int = 2_000_000,
    held_out: Sequence[str | Path] = (),
    overwrite: bool = False,
) -> Report:
    """Train byte-level BPE on files, folders or globs, and write a directory with tokenizer.json.

    Rows are read one at a time and at most about `most_words` different words are held, whatever the size of the data.
    Raises `DataError` for rows without text, `ConfigError` for a size or split that cannot be.
    """
    files, size_seen = rows.files(data), 0
    bpe.splits.get(split, field="split")
    if held_out:
        rows.files(held_out)  # what is missing is said before the work
    with atomic_directory(Path(out), overwrite=overwrite) as partial:
        with log.progress("counting words", sum(os.path.getsize(file) for file in files)) as progress:

            def watched() -> Iterator[str]:
                nonlocal size_seen
                for file in files:
                    for text in texts([file]):
                        size_seen += len(text.encode())
                        yield text
                    progress.advance(os.path.getsize(file))

            trained = bpe.train(watched(), size=size, split=split, special=special, most_words=most_words)
        if trained.dropped:
            log.warn(f"{trained.dropped:,} rare words were let go to stay within {most_words:,}; --most-words allows more")
        if trained.tokenizer.vocab_size < size:
            log.warn(f"{trained.tokenizer.vocab_size:,} tokens, not {size:,}: no pair of tokens is seen twice any more")
        measured = fertility(trained.tokenizer, texts(held_out)) if held_out else {}
        trained.tokenizer.save(partial)
    return Report(
        path=str(out),
        digest=trained.tokenizer.digest(),
        size=trained.tokenizer.vocab_size,
        words=trained.words,
        dropped=trained.dropped,
        bytes=size_seen,
        per_token=measured.get("bytes per token"),
        held_out=int(measured.get("bytes", 0)),
    )


def texts(data: Sequence[str | Path]) -> Iterator[str]:
    """Every text in files, folders or globs: a document, a row's `text`, or the strings that a row of another form holds."""
    for record in rows.read(list(data)):
        found = list(_strings(record.value))
        if not found:
            raise DataError(f"{record.where}: this row holds no text")
        yield from found


def _strings(value: Any) -> Iterator[str]:
    match value:
        case str() if value:
            yield value
        case {"text": str(text)}:
            yield text
        case {"role": str(), "content": content}:  # a message: its role is no text
            yield from _strings(content)
        case dict():
            for item in value.values():
                yield from _strings(item)
        case list():
            for item in value:
                yield from _strings(item)


def fertility(tokenizer: Tokenizer, found: Iterator[str]) -> dict[str, float]:
    """How many bytes a token stands for, and how many tokens a word takes, on at most `SAMPLE` bytes of text."""
    size = words = tokens = unknown = 0
    for text in found:
        ids = tokenizer.encode(text, bos=False)
        size, words, tokens = size + len(text.encode()), words + len(text.split()), tokens + len(ids)
        unknown += 0 if tokenizer.unk is None else ids.count(tokenizer.unk)
        if size >= SAMPLE:
            break
    if not tokens:
        raise DataError("there is no text to measure on")
    return {
        "bytes": size,
        "tokens": tokens,
        "bytes per token": size / tokens,
        "tokens per word": tokens / max(words, 1),
        "unknown": unknown,
    }


def open_tokenizer(model: str | Path, *, split: str | None = None) -> Tokenizer:
    """The tokenizer of anything that `load` loads, of a directory that holds only one, of a tokenizer.json, SentencePiece's
    .model or tiktoken's rank file, for which `split` says how text is cut."""
    path = Path(model)
    if path.suffix == ".tiktoken":
        if split is None:
            raise ConfigError(
                f"{path}: the file does not say how text is split; choose one with split: {', '.join(bpe.splits)}", field="split"
            )
        return tiktoken_file.load(path, split=split)
    if split is not None:
        raise ConfigError(f"{path}: the file says itself how text is split; only rank files (.tiktoken) need a split", field="split")
    if path.suffix in (".json", ".model") or any((path / name).is_file() for name in (FILE, NAME)):
        return Tokenizer.load(path)
    return text_side(model)[0]


def encode(tokenizer: Tokenizer, text: str, *, allow_special: bool = False) -> list[dict[str, Any]]:
    """Each token of `text`: its id, as the vocabulary writes it, and the text that it completes."""
    decoder = tokenizer.stream(skip_special=False)
    ids = tokenizer.encode(text, allow_special=allow_special)
    return [{"id": id, "token": tokenizer.token(id), "text": decoder.push(id)} for id in ids]


def inspect(tokenizer: Tokenizer, *, data: Sequence[str | Path] = ()) -> dict[str, Any]:
    """What a tokenizer is and does; with `data`, what it makes of that text too."""
    state = json.loads(tokenizer.json())
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos, "unk": tokenizer.unk, "pad": tokenizer.pad}
    return {
        "kind": _kind(state),
        "tokens": tokenizer.vocab_size,
        "special": {tokenizer.token(id): id for id in sorted(tokenizer.special)},
        "roles": {name: tokenizer.token(id) for name, id in ids.items() if id is not None},
        "adds": [name for name, wanted in (("bos", tokenizer.add_bos), ("eos", tokenizer.add_eos)) if wanted],
        "normalization": _types(state["normalizer"], "normalizers"),
        "splitting": _types(state["pre_tokenizer"], "pretokenizers"),
        "digest": tokenizer.digest(),
        **({"on data": fertility(tokenizer, texts(data))} if data else {}),
    }


def _kind(state: dict[str, Any]) -> str:
    model = state["model"]
    byte_level = "ByteLevel" in _types(state["pre_tokenizer"], "pretokenizers")
    extra = "byte-level " if byte_level else ""
    return f"{extra}{model['type']}{' with byte fallback' if model.get('byte_fallback') else ''}"


def _types(part: dict[str, Any] | None, inner: str) -> list[str]:
    """The names of a normalizer's or pre-tokenizer's steps."""
    if part is None:
        return []
    return [name for step in part[inner] for name in _types(step, inner)] if inner in part else [part["type"]]


def add_tokens(
    bundle: Bundle, tokens: Sequence[str], *, special: bool = True, start: Literal["mean", "pieces"] = "mean", multiple: int = 1
) -> Bundle:
    """The bundle with further tokens: its tokenizer and prompt know them, its model has rows for them.

    A row begins as the mean of all old rows, or of the rows that the token's text was spelled with (`pieces`). Old ids keep
    their rows, so old logits stay. Ids that the model has rows for but no token are used first; a table that grows does so
    to a `multiple`. The bundle's model is changed in place. Raises `ConfigError` for a token that is there already.
    """
    if bundle.passes:
        raise TriviumError("adding tokens changes the tables below the adapters: merge them first")
    old = bundle.tokenizer
    if not tokens or len(set(tokens)) != len(tokens) or not all(tokens):
        raise ConfigError(f"tokens: {list(tokens)} must be different and not empty", field="tokens")
    if known := [token for token in tokens if old.id(token) is not None]:
        raise ConfigError(f"tokens: {known[0]!r} is a token already (id {old.id(known[0])})", field="tokens", value=known[0])
    engine = tokenizers.Tokenizer.from_str(old.json())
    engine.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False) for token in tokens])
    new = Tokenizer(engine, old.config, where="tokenizer with added tokens")
    used = old.vocab_size
    if [new.id(token) for token in tokens] != list(range(used, used + len(tokens))):
        raise FileError("the vocabulary has gaps between its ids, so tokens cannot be added after them")
    everything = range(min(used, bundle.spec.vocab))
    sources = [old.encode_rest(token) if start == "pieces" else everything for token in tokens]
    resize(bundle.model, [ids or everything for ids in sources], used=used, multiple=multiple)
    was = bundle.prompt
    prompt = Prompt(new, was.template, ends=was.stops, special=was.special, accept=was.accept, arguments=was.arguments)
    return replace(bundle, tokenizer=new, prompt=prompt).since("add tokens", tokens=list(tokens), start=start)
