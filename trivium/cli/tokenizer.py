"""`trivium tokenizer train`, `encode` and `inspect`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .options import UsageError, answer

Files = Annotated[str, Parameter(name="DATA")]
Several = Annotated[tuple[str, ...], Parameter(consume_multiple=False)]
Text = Annotated[str, Parameter(allow_leading_hyphen=True)]


def train(
    *data: Files, out: Path, size: int = 8192, split: str = "gpt4", special: Several = ("<|endoftext|>",),
    most_words: int = 2_000_000, held_out: Several = (), overwrite: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Trains a byte-level BPE tokenizer on text of any size, in bounded memory, and writes a directory with tokenizer.json.

    Any text can be encoded with it, and nothing is unknown: what it has no token for is spelled in bytes.

    Try:
      trivium tokenizer train notes/ --size 4096 --out tokenizers/notes
      trivium tokenizer train 'data/*.jsonl.gz' --split qwen2 --held-out other.txt --out tokenizers/mine

    Parameters
    ----------
    data
        Files (text, JSONL, Parquet; also compressed), folders or globs.
    out
        The directory to write.
    size
        How many tokens, special ones and the 256 bytes included.
    split
        How text is cut into words: gpt2, gpt4, qwen2, whitespace, digits.
    special
        A special token; may be given more than once. The first ends a text.
    most_words
        How many different words to hold; the rarest beyond that are let go, and counted.
    held_out
        Text to measure bytes per token on; may be given more than once.
    overwrite
        Replace what the directory holds.
    json
        Answer as JSON: path and the numbers.
    """
    from ..core.log import log
    from ..recipes import tokenizer as recipe

    if not data:
        raise UsageError("name the data: files, folders or globs")
    found = asdict(
        recipe.train(data, out, size=size, split=split, special=special, most_words=most_words, held_out=held_out, overwrite=overwrite)
    )
    if json:
        answer(found, as_json=True)
        return
    shown = {"tokens": found["size"], "bytes of text": found["bytes"], "different words": found["words"], "words let go": found["dropped"]}
    if found["per_token"] is not None:
        shown |= {"bytes per token, held out": f"{found['per_token']:.3f}"}
    log.table("trained tokenizer", ("what", "value"), list(shown.items()))
    answer(found["path"], as_json=False)


def encode(model: str, text: Text, /, *, split: str | None = None, special: bool = False, json: bool = False) -> None:
    """Shows the tokens of a text: each id, the token as the vocabulary writes it, and what it stands for.

    Try:
      trivium tokenizer encode smollm2 "Hello, world"
      trivium tokenizer encode tokenizers/mine - < notes.txt
      trivium tokenizer encode cl100k_base.tiktoken "Hello" --split gpt4 --json

    Parameters
    ----------
    model
        A model, or a tokenizer: a directory, tokenizer.json, SentencePiece's .model, tiktoken's rank file.
    text
        The text; - reads it from stdin.
    split
        How text is cut into words, for a rank file, which does not say.
    special
        Let special strings in the text be special tokens.
    json
        Answer as JSON: a list of id, token, text.
    """
    from ..recipes import tokenizer as recipe

    if text == "-":
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UsageError(f"what came on stdin is not text in {error.encoding}: {error.reason} at byte {error.start}") from None
    found = recipe.encode(recipe.open_tokenizer(model, split=split), text, allow_special=special)
    if json:
        answer(found, as_json=True)
        return
    answer([{**row, "text": repr(row["text"])} for row in found] or "no tokens", as_json=False)


def inspect(model: str, /, *data: Files, split: str | None = None, json: bool = False) -> None:
    """Shows what a tokenizer is: its kind, size, special tokens, normalization and habits; and what it makes of text.

    Try:
      trivium tokenizer inspect smollm2
      trivium tokenizer inspect tokenizers/mine notes/
      trivium tokenizer inspect tokenizer.model --json

    Parameters
    ----------
    model
        A model, or a tokenizer: a directory, tokenizer.json, SentencePiece's .model, tiktoken's rank file.
    data
        Text to measure on, in files, folders or globs: bytes per token and tokens per word.
    split
        How text is cut into words, for a rank file, which does not say.
    json
        Answer as JSON.
    """
    from ..core.config import dump
    from ..recipes import tokenizer as recipe

    found = recipe.inspect(recipe.open_tokenizer(model, split=split), data=data)
    if json:
        answer(found, as_json=True)
    else:
        answer(dump(found).rstrip("\n"), as_json=False)
