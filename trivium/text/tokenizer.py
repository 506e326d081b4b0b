"""Text to token ids and back, by one engine (the `tokenizers` library) whatever the file was: tokenizer.json, SentencePiece or GGUF.

Content never makes a special token unless that is asked for, a continuation never gets a prefix of its own, and
what streams out is what decoding the whole gives. Training tokenizers is left out here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from ..core.errors import DataError, FileError
from . import gguf_vocab, sentencepiece_file
from .files import read_json, read_text
from .stream import Pieces, StreamDecoder

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
NO_MODEL = {"type": "BPE", "vocab": {}, "merges": []}
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """A tokenizer: ids from 0 to `vocab_size` - 1; `bos`, `eos`, `unk`, `pad` are ids or None.

    `added` tokens (id to text) are found before anything is split; those of them that are `special` never come from ordinary
    text. `missing_bytes` have no token: like the model's own tokenizer this one leaves them out (SmolLM2 lacks six control
    characters). `add_bos` and `add_eos` are its habits for plain text. `config` is what tokenizer_config.json says, without
    a template.
    """

    def __init__(self, engine: tokenizers.Tokenizer, config: Mapping[str, Any], *, where: str):
        self._where = where
        self._engine = engine
        engine.no_truncation()
        engine.no_padding()
        self.config = {key: value for key, value in config.items() if key != "chat_template"}
        names = {name: text for name in NAMED if (text := content_of(config.get(name))) is not None}
        self._declare(names)
        self.added = {id: token.content for id, token in engine.get_added_tokens_decoder().items()}
        self.special = frozenset(id for id, token in engine.get_added_tokens_decoder().items() if token.special)
        ids = engine.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        if not ids or self.vocab_size > 2 * len(ids) + 1024:
            raise FileError(f"{where}: {len(ids)} tokens with ids up to {self.vocab_size - 1}: the vocabulary is damaged")
        self.bos, self.eos, self.unk, self.pad = (self.id(names[name]) if name in names else None for name in NAMED[:4])
        before, after = _habits(_state(engine.post_processor))
        self.add_bos = bool(config.get("add_bos_token", before)) and self.bos is not None
        self.add_eos = bool(config.get("add_eos_token", after)) and self.eos is not None
        self._pieces = Pieces(_state(engine.decoder), token=engine.id_to_token, added=self.added, where=where)
        self.missing_bytes = self._pieces.missing(self.id)
        self._has_prefix = _has_prefix(_state(engine.normalizer)) or _has_prefix(_state(engine.pre_tokenizer))
        self._unwanted = self.special - {self.unk}  # what text makes by itself, at worst, is unknown
        self._bares: dict[bool, tokenizers.Tokenizer] = {}

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a model directory, a tokenizer.json or a SentencePiece .model with its neighbors. Raises `FileError`."""
        path = Path(path)
        file = path / FILE if path.is_dir() else path
        if path.is_dir() and not file.is_file() and (path / sentencepiece_file.NAME).is_file():
            file = path / sentencepiece_file.NAME
        config = read_json(file.parent / "special_tokens_map.json") | read_json(file.parent / CONFIG)
        if file.suffix == ".model":
            return cls(*sentencepiece_file.load(file, config), where=str(file))
        return cls(_parse(read_text(file), where=str(file)), config, where=str(file))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From the keys `tokenizer.ggml.*` of a GGUF file. Raises `FileError`."""
        engine, config = gguf_vocab.build(metadata)
        return cls(engine, config, where="GGUF vocabulary")

    def encode(self, text: str, *, bos: bool | None = None, allow_special: bool = False) -> list[int]:
        """Ids of `text`. `bos` None follows the tokenizer's habit; a BOS that the text itself begins with is not added twice.

        Special strings in the text are plain text unless `allow_special`, each encoded apart from what stands around it.
        """
        ids = self._encode(text, allow_special=allow_special, prefix=True)
        bos = self.add_bos if bos is None else bos
        if bos and self.bos is None:
            raise DataError(f"{self._where}: this tokenizer has no token that begins a text (bos)")
        return [self.bos, *ids] if bos and ids[:1] != [self.bos] else ids  # type: ignore[list-item]

    def encode_rest(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text` as the continuation of another: without BOS, and without the prefix that SentencePiece gives a text."""
        return self._encode(text, allow_special=allow_special, prefix=False)

    def spans(self, text: str, *, rest: bool, markup: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a template's text (`rest`: as a continuation) and the characters that each stands for.

        With `markup` every added token is recognized, without it none is: then the text is nothing but text.
        """
        encoding = (self._markup(not rest) if markup else self._bare(not rest)).encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, ids that are no token nothing."""
        skip = self.special if skip_special else frozenset()
        text = b"".join([self._pieces[id] for id in ids if id not in skip]).decode("utf-8", "replace")
        lead = self._pieces.lead
        return text[len(text[:lead]) - len(text[:lead].lstrip(" ")) :] if lead else text

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder fed one id at a time."""
        return StreamDecoder(self._pieces, self.special if skip_special else frozenset())

    def token(self, id: int) -> str:
        """A token as the vocabulary writes it."""
        token = self._engine.id_to_token(id)
        if token is None:
            raise DataError(f"{self._where}: {id} is no token; ids go from 0 to {self.vocab_size - 1}")
        return token

    def id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it."""
        return self._engine.token_to_id(token)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers 5 lays them out."""
        directory = Path(directory)
        (directory / FILE).write_text(self._engine.to_str(pretty=True), encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.config, "clean_up_tokenization_spaces": False}
        (directory / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def json(self) -> str:
        """The engine as the text of a tokenizer.json, with everything that tokenizer_config.json declares."""
        return self._engine.to_str()

    def digest(self) -> str:
        """SHA-256 of the canonical tokenizer.json and of the habits."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        content = [json.loads(self._engine.to_str()), self.bos, self.eos, self.add_bos, self.add_eos]
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def _declare(self, names: Mapping[str, str]) -> None:
        """Special tokens that tokenizer_config.json names are special, whatever tokenizer.json says of them."""
        known = {token.content: token.special for token in self._engine.get_added_tokens_decoder().values()}
        extra = self.config.get("extra_special_tokens") or {}
        others = [*(self.config.get("additional_special_tokens") or ()), *(extra.values() if isinstance(extra, dict) else extra)]
        listed = self.config.get("added_tokens_decoder") or {}  # version 4's copy of what tokenizer.json should hold
        others += [token for token in listed.values() if isinstance(token, dict) and token.get("special")]
        for text in dict.fromkeys([*names.values(), *filter(None, map(content_of, others))]):
            if known.get(text) is not True:
                if self._engine.token_to_id(text) is None:
                    raise FileError(f"{self._where}: the special token {text!r:.60} that {CONFIG} names is no token of the vocabulary")
                self._engine.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])

    def _encode(self, text: str, *, allow_special: bool, prefix: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"a text holds half a surrogate pair at character {error.start}, which no encoding of Unicode has") from None
        ids = self._markup(prefix).encode(text, add_special_tokens=False).ids
        if allow_special or self._unwanted.isdisjoint(ids):
            return ids
        ids, at = [], 0
        for match in [*self._special_strings.finditer(text), None]:
            between = text[at : match.start() if match else len(text)]
            for piece, markup in ((between, True), (match[0] if match else "", False)):
                found = self.spans(piece, rest=at > 0 or not prefix, markup=markup)[0]
                ids += found if self._unwanted.isdisjoint(found) else self.spans(piece, rest=at > 0 or not prefix, markup=False)[0]
                at += len(piece)
        return ids

    @cached_property
    def _special_strings(self) -> re.Pattern[str]:
        longest_first = sorted((self.added[id] for id in self._unwanted), key=lambda text: (-len(text), text))
        return re.compile("|".join(map(re.escape, longest_first)))

    def _markup(self, prefix: bool) -> tokenizers.Tokenizer:  # noqa: FBT001
        """The engine that recognizes added tokens, with or without the prefix."""
        return self._engine if prefix or not self._has_prefix else self._rest

    @cached_property
    def _rest(self) -> tokenizers.Tokenizer:
        data = json.loads(self._engine.to_str())
        parts = {part: _without_prefix(data[part]) for part in ("normalizer", "pre_tokenizer")}
        return _parse(json.dumps({**data, **parts}), where=self._where)

    def _bare(self, prefix: bool) -> tokenizers.Tokenizer:  # noqa: FBT001
        """The engine without added tokens, for which everything is text."""
        prefix = prefix or not self._has_prefix
        if prefix not in self._bares:
            parts = {"normalizer": _state(self._engine.normalizer), "pre_tokenizer": _state(self._engine.pre_tokenizer)}
            data = parts if prefix else {part: _without_prefix(state) for part, state in parts.items()}
            bare = _parse(json.dumps({"version": "1.0", "added_tokens": [], **data, "model": NO_MODEL}), where=self._where)
            bare.model = self._engine.model  # shared, not copied
            self._bares[prefix] = bare
        return self._bares[prefix]


def _parse(text: str, *, where: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the engine is no Exception
        raise FileError(f"{where}: not a tokenizer: {error!s:.200}; the file is damaged: fetch it again") from None


def _state(part: Any) -> dict[str, Any] | None:
    """A part of the engine as tokenizer.json writes it."""
    return None if part is None else json.loads(part.__getstate__())


def content_of(token: Any) -> str | None:
    """A special token in a config: a string, or an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _habits(processor: dict[str, Any] | None) -> tuple[bool, bool]:
    """Whether a post-processor writes tokens before and after a text."""
    match processor:
        case {"type": "Sequence", "processors": list(parts)}:
            found = [_habits(part) for part in parts]
            return any(before for before, _ in found), any(after for _, after in found)
        case {"type": "TemplateProcessing", "single": list(single)} if single:
            return "SpecialToken" in single[0], "SpecialToken" in single[-1]
        case {"type": "BertProcessing" | "RobertaProcessing"}:
            return True, True
    return False, False


def _has_prefix(part: dict[str, Any] | None) -> bool:
    return part is not None and _without_prefix(part) != part


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer that puts nothing before a text."""
    match part:
        case {"type": "Prepend"}:
            return {"type": "Sequence", "normalizers": []}
        case {"type": "Metaspace"}:
            return {**part, "prepend_scheme": "never"}
        case {"type": "ByteLevel"}:
            return {**part, "add_prefix_space": False}
        case {"type": "Sequence"}:
            return {key: [_without_prefix(step) for step in value] if isinstance(value, list) else value for key, value in part.items()}
    return part
