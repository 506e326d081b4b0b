"""A tokenizer as the metadata of a GGUF file: the way back from `gguf_vocab`.

GGUF names a splitting rule and does not state it, so the rule is recognized from the pre-tokenizer, part by part; one that
llama.cpp has no name for is refused. SentencePiece's merges become scores where scores can say them. What llama.cpp does
otherwise although the file is right comes back as a note.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.errors import ConfigError
from . import gguf_vocab
from .gguf_vocab import BYTE, CONTROL, NFC, NORMAL, PRE, UNKNOWN, UNUSED, USER_DEFINED, WHOLE_WORDS_FIRST
from .stream import SPACE
from .tokenizer import Tokenizer

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
DIGITS = {True: r"\p{N}", False: r"\p{N}+"}  # the Digits step, by whether each digit stands alone
ESCAPES = {"\r": r"\r", "\n": r"\n"}  # some files hold the characters, some their names


def metadata(tokenizer: Tokenizer, *, size: int | None = None) -> tuple[dict[str, Any], list[str]]:
    """The keys `tokenizer.ggml.*` as plain values, and notes for the user.

    `size` is the number of ids that the model has; those without a token are filled with unused ones. Raises `ConfigError`
    with the reason where GGUF cannot say what this tokenizer does.
    """
    state = json.loads(tokenizer.json())
    model = state["model"]
    odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if model["type"] != "BPE" or odd:
        raise _cannot(
            f"its model is {model['type']}{' with ' + ', '.join(odd) if odd else ''}; byte-level and SentencePiece BPE are written"
        )
    notes: list[str] = []
    byte_level = any(step.get("type") == "ByteLevel" for step in _steps(state["pre_tokenizer"]))
    tokens, types = _tokens(tokenizer, state, tokenizer.vocab_size if size is None else size, byte_level=byte_level)
    found: dict[str, Any] = {"tokens": tokens, "token_type": types}
    found = _byte_level(state, found, notes) if byte_level else _sentencepiece(state, found, notes)
    for name, id in {"bos": tokenizer.bos, "eos": tokenizer.eos, "unknown": tokenizer.unk, "padding": tokenizer.pad}.items():
        if id is not None:
            found[f"{name}_token_id"] = id
    found |= {"add_bos_token": tokenizer.add_bos, "add_eos_token": False}
    if tokenizer.add_eos:  # a habit for documents that are trained on
        notes.append("this tokenizer ends a document with its EOS; llama.cpp would put it after a prompt too, so the file does not say so")
    return {f"tokenizer.ggml.{name}": value for name, value in found.items()}, notes


def _cannot(reason: str) -> ConfigError:
    return ConfigError(f"this tokenizer cannot be written to GGUF: {reason}")


def _steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if part is None:
        return []
    inner = part.get("pretokenizers", part.get("normalizers"))
    return [part] if inner is None else [step for nested in inner for step in _steps(nested)]


def _tokens(tokenizer: Tokenizer, state: Mapping[str, Any], size: int, *, byte_level: bool) -> tuple[list[str], list[int]]:
    """Every id's text and type."""
    model = state["model"]
    if tokenizer.vocab_size > size:
        raise _cannot(f"it has ids up to {tokenizer.vocab_size - 1}, but the model only has {size}")
    tokens, types = [f"[PAD{id}]" for id in range(size)], [UNUSED] * size
    bytes_apart = bool(model.get("byte_fallback"))
    for token, id in model["vocab"].items():
        tokens[id], types[id] = token, BYTE if bytes_apart and BYTE_TOKEN.fullmatch(token) else NORMAL
    for added in state["added_tokens"]:
        if marks := [mark for mark in ("single_word", "lstrip", "rstrip") if added[mark]]:
            raise _cannot(f"its token {added['content']!r} is marked {', '.join(marks)}, which GGUF has no word for")
        text = added["content"]
        # Where spaces are spelled otherwise, llama.cpp looks for added tokens before that is done.
        tokens[added["id"]] = text if byte_level or added["special"] or not added["normalized"] else text.replace(SPACE, " ")
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if not byte_level and (unknown := model.get("unk_token")) is not None:
        types[model["vocab"][unknown]] = UNKNOWN
    if len(set(tokens)) < size:
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise _cannot(f"two ids have the token {twice!r}")
    return tokens, types


# Byte-level BPE


def _byte_level(state: Mapping[str, Any], found: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in state["model"]["merges"]]
    if spaced := [pair for pair in merges if any(" " in part for part in pair)]:
        raise _cannot(f"its merge {spaced[0]} holds a space")
    rule = pre(state)
    if rule in NFC:
        notes.append("llama.cpp does not normalize text (NFC) as this tokenizer does; text that is not normalized gets other ids there")
    return {"model": "gpt2", "pre": rule, **found, "merges": [" ".join(pair) for pair in merges]}


def pre(state: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer.json splits text. Raises `ConfigError` if it has none."""
    patterns = tuple(_pattern(step) for step in _steps(state["pre_tokenizer"]))
    patterns = tuple(pattern for pattern in patterns if pattern)  # a ByteLevel step that does not split
    normalizers = [step["type"] for step in _steps(state["normalizer"])]
    if normalizers not in ([], ["NFC"]):
        raise _cannot(f"it normalizes text with {', '.join(normalizers)}, which llama.cpp does not")
    whole, nfc = bool(state["model"].get("ignore_merges")), normalizers == ["NFC"]
    alike = [name for name, splits in PRE.items() if splits == patterns]
    for name in alike:
        if (name in WHOLE_WORDS_FIRST, name in NFC) == (whole, nfc):
            return name
    if alike:
        why = f"it splits text as {' or '.join(alike)}, but with ignore_merges {whole} and NFC {nfc}, which goes with no rule known"
    else:
        why = f"it splits text by {' then '.join(patterns) or 'nothing'}, which is none of the rules known ({', '.join(PRE)})"
    raise _cannot(why)


def _pattern(step: Mapping[str, Any]) -> str:
    """What a step of a pre-tokenizer splits by, as `gguf_vocab.PRE` writes it; nothing for one that only spells bytes."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return PRE["gpt-2"][0] if step.get("use_regex", True) else ""
        case {"type": "Digits"}:
            return DIGITS[bool(step["individual_digits"])]
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return "".join(ESCAPES.get(character, character) for character in pattern)
    raise _cannot(f"its pre-tokenizer has the step {json.dumps(step, ensure_ascii=False):.200}, which no rule known to llama.cpp has")


# SentencePiece BPE


def _sentencepiece(state: Mapping[str, Any], found: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    model = state["model"]
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    ranks = _ranks(merges)
    found = {
        "model": "llama",
        "pre": "default",
        **found,
        "scores": [-float(ranks.get(token, len(ranks))) for token in found["tokens"]],
        "add_space_prefix": _prefix(state, notes),
    }
    rebuilt, _ = gguf_vocab.build({f"tokenizer.ggml.{name}": value for name, value in found.items()})
    said = {tuple(pair) for pair in json.loads(rebuilt.to_str())["model"]["merges"]}
    if said != set(merges):
        raise _cannot(f"{len(said ^ set(merges))} of its merges are not those that scores for its tokens would give")
    return found


def _ranks(merges: Sequence[tuple[str, ...]]) -> dict[str, int]:
    """Each merged token's place among them. All merges to one token stand together, or no score could order them."""
    ranks: dict[str, int] = {}
    last = ""
    for token in ("".join(pair) for pair in merges):
        if token != last and token in ranks:
            raise _cannot(f"the merges that give {token!r} do not stand together, so no score of the token can order them")
        ranks.setdefault(token, len(ranks))
        last = token
    return ranks


def _prefix(state: Mapping[str, Any], notes: list[str]) -> bool:
    """Whether a text gets a space put before it."""
    spelled = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefix = {"type": "Prepend", "prepend": SPACE}
    match _steps(state["normalizer"]), _steps(state["pre_tokenizer"]):
        case [steps, []] if steps in ([prefix, spelled], [spelled]):
            return prefix in steps
        case [[], [{"type": "Metaspace", "replacement": mark, "split": False, "prepend_scheme": scheme}]] if mark == SPACE:
            if scheme != "never":
                where = "after special tokens too, and " if scheme == "first" else ""
                notes.append(f"llama.cpp puts its space before a text {where}where the text begins with one; ids differ there")
            return scheme != "never"
    raise _cannot(
        "its normalizer and pre-tokenizer are neither byte-level nor SentencePiece's: "
        f"{json.dumps([state['normalizer'], state['pre_tokenizer']], ensure_ascii=False):.300}"
    )
