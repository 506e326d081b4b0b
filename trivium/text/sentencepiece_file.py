"""SentencePiece's `.model` files (arXiv:1808.06226) as the engine that a tokenizer.json would give.

The file is a protobuf message, of which the few fields needed are read here. BPE and unigram models with their
normalization, byte fallback, dummy prefix and symbols become the same steps of the `tokenizers` engine. Word and
character models, spaces at the end of words, and pieces switched off (type UNUSED) are left out. Ids differ from
SentencePiece's for a text that is one user's symbol and nothing else, and for a mark after a letter that is replaced (fullwidth).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..core.errors import FileError
from .files import MAX_BYTES
from .gguf_vocab import BYTE, CONTROL, MAX_TOKENS, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, ends
from .stream import SPACE

NAME = "tokenizer.model"
UNIGRAM, BPE = 1, 2  # TrainerSpec.model_type
KINDS = {UNIGRAM: "unigram", BPE: "BPE", 3: "word", 4: "character"}
ALONE = "\ufff8"  # a code point without a character, which no grapheme crosses and no text holds
MANY = 1 << 16
LONGEST = 512  # characters of a piece; real ones have a few dozen at most
NEVER = -1e6  # the score of a piece that text must not become; far below any sum of real scores


@dataclass
class Model:
    """What a `.model` file says. `pieces` are (text, score, type); ids are places among them, -1 for none."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    kind: int = UNIGRAM
    unk: int = 0
    bos: int = 1
    eos: int = 2
    pad: int = -1
    suffix: bool = False  # spaces are marked at the end of words
    charsmap: bytes = b""
    prefix: bool = True  # a space is put before the text
    squeeze: bool = True  # spaces at the ends go, and of several one is left
    escape: bool = True  # spaces are spelled SPACE


def load(file: str | Path, config: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The engine of a `.model` file, and its tokenizer_config.json: `config` is what stands beside the file, if anything does.

    SentencePiece itself puts no tokens before or after a text, so only `config` makes that a habit. Raises `FileError`.
    """
    file = Path(file)
    try:
        if file.stat().st_size > MAX_BYTES:
            raise FileError(f"{file}: larger than {MAX_BYTES >> 20} MiB, which no tokenizer is")
        data = file.read_bytes()
    except OSError as error:
        raise FileError(f"{file}: cannot be read: {error.strerror}") from None
    engine, own = build(parse(data, where=str(file)), where=str(file))
    _add(engine, config.get("added_tokens_decoder") or {}, where=f"{file.parent / 'tokenizer_config.json'}")
    said = own | {key: value for key, value in config.items() if key != "added_tokens_decoder"}
    for end in ("bos", "eos"):
        token = said.get(f"{end}_token")
        text = token.get("content") if isinstance(token, dict) else token
        known = isinstance(text, str) and engine.token_to_id(text) is not None
        said |= {f"add_{end}_token": bool(said[f"add_{end}_token"]) and known} | ({f"{end}_token": text} if known else {})
    engine.post_processor = ends(engine, said)
    return engine, said


def _add(engine: Tokenizer, tokens: Any, *, where: str) -> None:
    """The tokens that tokenizer_config.json puts after the pieces, by id."""
    try:
        wanted = sorted((int(id), token["content"], bool(token.get("special"))) for id, token in tokens.items())
    except (AttributeError, KeyError, TypeError, ValueError):
        raise FileError(f"{where}: added_tokens_decoder is not ids with their tokens") from None
    for id, text, special in wanted:
        if engine.token_to_id(text) is None:
            engine.add_tokens([AddedToken(text, special=special, normalized=False)])
        if engine.token_to_id(text) != id:
            raise FileError(f"{where}: gives the token {text!r:.60} the id {id}, but in the vocabulary it is {engine.token_to_id(text)}")


# The message


def parse(data: bytes, *, where: str) -> Model:
    """The message ModelProto. Raises `FileError` for what is damaged."""
    model = Model()
    for number, value in _fields(data, where):
        if number == 1:
            model.pieces.append(_piece(_bytes(value, where), where))
            if len(model.pieces) > MAX_TOKENS:
                raise _damaged(where, f"more than {MAX_TOKENS} pieces")
        elif number == 2:
            _trainer(model, _bytes(value, where), where)
        elif number == 3:
            _normalizer(model, _bytes(value, where), where)
    if not model.pieces:
        raise _damaged(where, "it has no pieces")
    return model


def _piece(data: bytes, where: str) -> tuple[str, float, int]:
    text, score, type = "", 0.0, NORMAL
    for number, value in _fields(data, where):
        if number == 1:
            text = _text(value, where)
        elif number == 2:
            score = float(str(np.frombuffer(_bytes(value, where, size=4), "<f4")[0]))  # as few digits as name it: JSON keeps those
        elif number == 3:
            type = _number(value, where)
    if len(text) > LONGEST:
        raise _damaged(where, f"a piece of {len(text)} characters, beginning {text[:20]!r}")
    if not text or not -1e30 < score < 1e30 or type not in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE):
        raise _damaged(where, f"a piece {text!r:.40} with score {score} and type {type}")
    return text, score, type


def _trainer(model: Model, data: bytes, where: str) -> None:
    for number, value in _fields(data, where):
        if number == 3:
            model.kind = _number(value, where)
        elif number == 24:
            model.suffix = bool(_number(value, where))
        elif number in (40, 41, 42, 43):
            setattr(model, {40: "unk", 41: "bos", 42: "eos", 43: "pad"}[number], _number(value, where))


def _normalizer(model: Model, data: bytes, where: str) -> None:
    for number, value in _fields(data, where):
        if number == 2:
            model.charsmap = _bytes(value, where)
        elif number in (3, 4, 5):
            setattr(model, {3: "prefix", 4: "squeeze", 5: "escape"}[number], bool(_number(value, where)))


def _fields(data: bytes, where: str) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one message: numbers as unsigned, all else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at, where)
        match key & 7:
            case 0:
                value, at = _varint(data, at, where)
                yield key >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(data, at, where)
            case 5:
                size = 4
            case wire:
                raise _damaged(where, f"wire type {wire} at byte {at}")
        if size > len(data) - at:
            raise _damaged(where, f"a field of {size} bytes where {len(data) - at} are left")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int, where: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _damaged(where, "it ends inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _damaged(where, f"a number without end at byte {at}")


def _number(value: int | bytes, where: str) -> int:
    """A signed 32-bit number."""
    if isinstance(value, bytes):
        raise _damaged(where, "bytes where a number belongs")
    low = value & 0xFFFFFFFF
    return low - (1 << 32) if low >> 31 else low


def _bytes(value: int | bytes, where: str, *, size: int | None = None) -> bytes:
    if not isinstance(value, bytes) or size not in (None, len(value)):
        raise _damaged(where, "a number where bytes belong")
    return value


def _text(value: int | bytes, where: str) -> str:
    try:
        return _bytes(value, where).decode()
    except UnicodeDecodeError:
        raise _damaged(where, f"a piece that is not UTF-8: {value!r:.40}") from None


def _damaged(where: str, why: str) -> FileError:
    return FileError(f"{where}: not a SentencePiece model: {why}; the file is damaged: fetch it again")


# The engine


def build(model: Model, *, where: str) -> tuple[Tokenizer, dict[str, Any]]:
    """The engine that does what `model` says, and what tokenizer_config.json would say. Raises `FileError`."""
    vocab = {text: id for id, (text, _, _) in enumerate(model.pieces)}
    if len(vocab) != len(model.pieces):
        raise _damaged(where, f"{len(model.pieces) - len(vocab)} pieces stand there twice")
    _check(model, where)
    table = _normalization(model, where)
    symbols = _apart(model, normalizers.Sequence([*table, *_spaces(model, ())]))
    engine = Tokenizer(_bpe(model, vocab) if model.kind == BPE else _unigram(model))
    if steps := [*table, *_spaces(model, symbols)]:
        engine.normalizer = normalizers.Sequence(steps)
    if splits := _splits(model, symbols):
        engine.pre_tokenizer = pre_tokenizers.Sequence(splits)
    lead = MANY if model.squeeze else int(model.prefix)  # spaces that do not belong to the text
    strip = [decoders.Strip(" ", lead, 0)] if lead else []
    engine.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    added = []
    for text, _, type in model.pieces:
        if type in (CONTROL, UNKNOWN):
            added.append(AddedToken(text, special=True, normalized=False))
        elif text in symbols:
            added.append(AddedToken(text, special=False, normalized=engine.normalizer.normalize_str(text) == text))
    engine.add_tokens(added)
    config: dict[str, Any] = {"add_bos_token": False, "add_eos_token": False}
    for name, id, type in (
        ("bos", model.bos, CONTROL),
        ("eos", model.eos, CONTROL),
        ("unk", model.unk, UNKNOWN),
        ("pad", model.pad, CONTROL),
    ):
        if 0 <= id < len(model.pieces) and model.pieces[id][2] == type:
            config[f"{name}_token"] = model.pieces[id][0]
    return engine, config


def _check(model: Model, where: str) -> None:
    if model.kind not in (UNIGRAM, BPE):
        raise FileError(f"{where}: a {KINDS.get(model.kind, model.kind)} model, which is not supported; unigram and BPE models are")
    if model.suffix or not model.escape:
        raise FileError(
            f"{where}: it {'marks spaces at the end of words' if model.suffix else 'keeps spaces as they are'}; this is not supported"
        )
    types = [type for _, _, type in model.pieces]
    if UNUSED in types:
        raise FileError(f"{where}: {types.count(UNUSED)} of its pieces are switched off (UNUSED); this is not supported")
    if types.count(UNKNOWN) != 1:
        raise _damaged(where, f"{types.count(UNKNOWN)} unknown pieces, where there is one")
    if BYTE in types and not {f"<0x{byte:02X}>" for byte in range(256)} <= {text for text, _, type in model.pieces if type == BYTE}:
        raise _damaged(where, "its bytes are not complete")


def _bpe(model: Model, vocab: dict[str, int]) -> models.BPE:
    pieces = model.pieces
    usable = {text: (-score, id) for id, (text, score, type) in enumerate(pieces) if type == NORMAL}
    merges = [
        (text[:cut], text[cut:])
        for text in sorted(usable, key=usable.__getitem__)
        for cut in range(1, len(text))
        if text[:cut] in usable and text[cut:] in usable
    ]
    return models.BPE(vocab=vocab, merges=merges, unk_token=_unknown(model), fuse_unk=True, byte_fallback=_falls_back(model))


def _unigram(model: Model) -> models.Unigram:
    """The engine looks for every piece in a text, so those that text must not become get a score that nothing else has."""
    scored = []
    for text, score, type in model.pieces:
        symbol = (len(text.encode()) - 1) / 10  # measured: what SentencePiece gives a user's symbol, where the file says 0
        scored.append((text, score if type == NORMAL else symbol if type == USER_DEFINED else NEVER))
    return models.Unigram(scored, unk_id=[type for _, _, type in model.pieces].index(UNKNOWN), byte_fallback=_falls_back(model))


def _unknown(model: Model) -> str:
    return next(text for text, _, type in model.pieces if type == UNKNOWN)


def _falls_back(model: Model) -> bool:
    return any(type == BYTE for _, _, type in model.pieces)


def _apart(model: Model, normalizer: normalizers.Normalizer) -> list[str]:
    """The user's symbols that are found before anything else is: all of a BPE model. A unigram model weighs them against
    other pieces, so there it is only those that normalization would change."""
    symbols = [text for text, _, type in model.pieces if type == USER_DEFINED]
    if model.kind == BPE:
        return symbols
    return [text for text in symbols if f"x{text}x" not in normalizer.normalize_str(f"x{text}x")]


def _splits(model: Model, symbols: Sequence[str]) -> list[pre_tokenizers.PreTokenizer]:
    splits: list[pre_tokenizers.PreTokenizer] = []
    if _by_pre_tokenizer(model, symbols):
        splits.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False))
    normal = {text for text, _, type in model.pieces if type == NORMAL}
    barred = [text for text, _, type in model.pieces if type not in (NORMAL, USER_DEFINED) and len(text) > 1]
    # Text that spells a control piece could become one, were there no pieces for its characters: cut it beside such a character.
    if model.kind == UNIGRAM and (exposed := [text for text in barred if not normal.issuperset(text)]):
        places = [next((at for at in range(1, len(text)) if (text[at - 1] in normal) != (text[at] in normal)), 1) for text in exposed]
        pattern = "|".join(f"(?<={re.escape(text[:at])})(?={re.escape(text[at:])})" for text, at in zip(exposed, places, strict=True))
        splits.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    return splits


def _by_pre_tokenizer(model: Model, symbols: Sequence[str]) -> bool:
    """Whether the pre-tokenizer puts the space before a text. It looks whether one is there already, so that a continuation
    keeps its own, and knows where a text begins, where a normalizer would put one before every piece between symbols."""
    return model.prefix and (model.squeeze or bool(symbols))


def _spaces(model: Model, symbols: Sequence[str]) -> list[normalizers.Normalizer]:
    """What happens to spaces, in SentencePiece's order."""
    steps: list[normalizers.Normalizer] = []
    if model.squeeze:
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if _by_pre_tokenizer(model, symbols):
        # Before these it puts none, so it is done here; but not where a symbol by itself is normalized, to be looked for.
        names = [re.escape(text) for text in symbols]
        alone = f"(?!(?:{'|'.join(names)})\\z)" if names else ""
        steps.append(
            normalizers.Replace(Regex(rf"\A(?={'|'.join([SPACE, *names] if model.squeeze else [SPACE, ' ', *names])}){alone}"), " ")
        )
    elif model.squeeze:
        steps.append(normalizers.Replace(Regex(r"\A +"), ""))
    elif model.prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return [*steps, normalizers.Replace(Regex(rf"{SPACE}+\z"), "")] if model.squeeze else steps


def _normalization(model: Model, where: str) -> list[normalizers.Normalizer]:
    if not model.charsmap:
        return []
    check_charsmap(model.charsmap, where=where)
    table = normalizers.Precompiled(model.charsmap)
    composes = table.normalize_str("e\u0301") == "\u00e9"
    # The engine looks a whole grapheme up and takes what the table says of its beginning: marks would be lost. So each
    # character stands alone there, and what the table would have composed is composed before.
    apart = normalizers.Replace(Regex(r"(?!\A)(?=[^\x00-\x7F])|(?<=[^\x00-\x7F])(?!\z)|(?<=\r)(?=\n)"), ALONE)
    first = [normalizers.Replace(Regex(_blocked()), ALONE), normalizers.NFC()] if composes else []
    return [*first, apart, table, normalizers.Replace(ALONE, "")]


def _blocked() -> str:
    """Where NFC would compose or order what SentencePiece, which reads from left to right once, leaves alone: a mark after a
    letter that has one already, and marks out of order."""
    marks = [chr(code) for code in range(0x300, 0x10000) if unicodedata.combining(chr(code))]
    latin = [mark for mark in marks if mark < "\u0346"]
    others = marks[len(latin) :]
    letters = [char for char in map(chr, range(0xC0, 0xF900)) if re.fullmatch(r"\w+ \w+", unicodedata.decomposition(char))]
    ways = [
        (letters, marks),
        ([chr(code) for code in range(0xAC00, 0xD7A4)], [chr(code) for code in range(0x11A8, 0x11C3)]),
        (others, marks),
        (latin, others),
    ]
    for order in sorted(set(map(unicodedata.combining, latin)))[1:]:
        before = [mark for mark in latin if unicodedata.combining(mark) == order]
        ways.append((before, [mark for mark in latin if unicodedata.combining(mark) < order]))
    pairs = "|".join(f"(?<=[{_ranges(before)}])(?=[{_ranges(after)}])" for before, after in ways)
    return rf"(?=[\p{{M}}\p{{Lo}}])(?:{pairs})"  # nothing else comes after: a quick no at most places


def _ranges(chars: Sequence[str]) -> str:
    """Characters as the inside of a regular expression's brackets."""
    codes = {ord(char) for char in chars}
    starts, ends = sorted(code for code in codes if code - 1 not in codes), sorted(code for code in codes if code + 1 not in codes)
    return "".join(rf"\x{{{start:X}}}-\x{{{end:X}}}" for start, end in zip(starts, ends, strict=True))


def check_charsmap(data: bytes, *, where: str) -> None:
    """Walk the double-array trie of a normalization once, so that nothing in a text can lead out of it. Raises `FileError`.

    It is a little-endian size, that many bytes of 32-bit units, and the replacements, each ended by a zero byte.
    """
    size = int.from_bytes(data[:4], "little")
    if not 4 <= size <= len(data) - 4 or size % 4:
        raise _damaged(where, "its normalization is cut off")
    units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
    replacements = data[4 + size :]
    try:
        replacements.decode()
    except UnicodeDecodeError:
        raise _damaged(where, "its normalization is not UTF-8") from None
    offsets = (units >> 10) << ((units & (1 << 9)) >> 6)
    labels = np.arange(1, 256)
    seen = np.zeros(len(units), bool)
    frontier, values = offsets[:1], []
    while len(frontier):
        if frontier.max() >= len(units):
            raise _damaged(where, "its normalization leads out of its table")
        seen[frontier] = True
        ways = frontier[:, None] ^ labels
        if ways.max() >= len(units):
            raise _damaged(where, "its normalization leads out of its table")
        taken = (units[ways] & ((1 << 31) | 0xFF)) == labels
        nodes = ways[taken]
        after = nodes ^ offsets[nodes]
        leaves = after[(units[nodes] >> 8) & 1 == 1]
        if len(after) and after.max() >= len(units):
            raise _damaged(where, "its normalization leads out of its table")
        values.append(units[leaves] & 0x7FFFFFFF)
        frontier = np.unique(after[~seen[after]])
    starts = np.unique(np.concatenate(values)) if values else np.zeros(0, np.int64)
    if len(starts) and (starts.max() >= len(replacements) or any(replacements[start] & 0xC0 == 0x80 for start in starts)):
        raise _damaged(where, "its normalization has a replacement that is none")
