"""Rows as training will see them: prepared from files, or read back from a prepared folder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

from ..core.errors import DataError
from ..data import rows
from ..data.bank import META, Prepared
from ..data.prepare import Feeds, prepare
from ..io import directory, peft
from ..io.gguf.family import to_hf
from ..io.gguf.reader import open_gguf
from ..text.prompt import Prompt
from ..text.tokenizer import Tokenizer
from .load import locate


def bank(
    data: Sequence[str | Path],
    prompt: Prompt,
    *,
    length: int,
    feeds: Feeds = "tokens",
    format: str | None = None,
    turns: Literal["all", "last"] = "all",
    too_long: Literal["drop", "truncate"] = "drop",
    max_dropped: int | None = 0,
    max_empty: int | None = 0,
    max_same: int | None = 0,
) -> Prepared:
    """The token bank of files, folders or globs (see `data.prepare`), or the one folder that `data prepare` wrote.

    Raises `DataError` for a folder that was prepared for another tokenizer, template or length.
    """
    if len(data) != 1 or not (Path(data[0]) / META).is_file():
        records = rows.read(data)
        if (first := next(records, None)) is None:
            raise DataError(f"{', '.join(map(str, data))}: no rows: the data is empty")
        return prepare(
            chain([first], records),
            prompt,
            length=length,
            feeds=feeds,
            format=format,
            turns=turns,
            too_long=too_long,
            max_dropped=max_dropped,
            max_empty=max_empty,
            max_same=max_same,
        )
    if feeds != "tokens":
        raise DataError(f"{data[0]}: a prepared folder holds rows for next-token training; give the files that the pairs are in")
    found = Prepared.load(data[0])
    if found.facts.prompt != prompt.digest():
        raise DataError(f"{data[0]}: was prepared with another tokenizer or chat template than this model's; prepare it again")
    if found.length != length:
        raise DataError(
            f"{data[0]}: was prepared for rows of {found.length} tokens, not {length}; say --length {found.length}, or prepare it again"
        )
    return found


def text_side(model: str | Path) -> tuple[Tokenizer, Prompt]:
    """The tokenizer and the prompt contract of what `load` would load, without its weights."""
    path = locate(model)
    if (path / peft.CONFIG).is_file() and not (path / directory.CONFIG).is_file():
        base = peft.read_config(path).base_model_name_or_path
        if base is None:
            raise DataError(f"{path}: this adapter does not name its base; give the base itself")
        return text_side(base)
    if path.is_dir():
        tokenizer = Tokenizer.load(path)
        return tokenizer, Prompt.load(path, tokenizer)
    found = to_hf(open_gguf(path))
    tokenizer = Tokenizer.from_gguf(found.tokenizer)
    return tokenizer, Prompt.of(tokenizer, found.chat_template, found.generation_config, None)
