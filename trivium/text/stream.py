"""Token ids back to text: each token is some bytes, a text is their concatenation read as UTF-8.

Decoding a whole list and decoding a stream share this one idea, so they agree on anything: a stream holds back the bytes
of an unfinished character, and bytes that are no UTF-8 become U+FFFD in both, where the Unicode standard puts it.
WordPiece's decoder leaves the spaces that it puts before punctuation; others (CTC) are left out.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..core.errors import FileError

SPACE = "\u2581"  # SentencePiece's mark for a space
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, as character to byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


ALPHABET = byte_alphabet()


class Pieces:
    """The bytes of each token id, by the rules of a tokenizer.json's `decoder`. `lead` leading spaces are not part of a text."""

    def __init__(self, decoder: Mapping[str, Any] | None, *, token: Callable[[int], str | None], added: Mapping[int, str], where: str):
        self._token = token
        self._added = added
        self._known: dict[int, bytes] = {}
        self._byte_level = self._byte_fallback = self._spaces = False
        self._inside = ""  # what WordPiece marks a token with that goes on with a word
        self.lead = 0
        for step in _steps(decoder):
            match step:
                case {"type": "ByteLevel"}:
                    self._byte_level = True
                case {"type": "ByteFallback"}:
                    self._byte_fallback = True
                case {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}:
                    self._spaces = True
                case {"type": "Metaspace", "replacement": "\u2581"}:
                    self._spaces = True
                    self.lead = 0 if step.get("prepend_scheme") == "never" else 1
                case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                    self.lead = start
                case {"type": "Fuse"}:
                    pass
                case {"type": "WordPiece", "prefix": str(prefix)} if prefix:
                    self._inside, self.lead = prefix, 1
                case _:
                    raise FileError(
                        f"{where}: its decoder {step.get('type')!r:.40} is not supported; byte-level, SentencePiece and WordPiece are"
                    )
        if not self._byte_level and not self._spaces and not self._inside:
            raise FileError(f"{where}: it has no byte-level, SentencePiece or WordPiece decoder, the kinds that are supported")

    def __getitem__(self, id: int) -> bytes:
        """The bytes of a token; none for an id that is no token."""
        if id not in self._known:
            self._known[id] = self._bytes(id)
        return self._known[id]

    def missing(self, id: Callable[[str], int | None]) -> frozenset[int]:
        """The bytes that a byte-level vocabulary has no token for. `id` looks a token up."""
        return frozenset(byte for char, byte in ALPHABET.items() if self._byte_level and id(char) is None)

    def _bytes(self, id: int) -> bytes:
        token = self._token(id) if id >= 0 else None
        if token is None:
            return b""
        if self._byte_level:
            if id in self._added or not all(char in ALPHABET for char in token):
                return token.encode()
            return bytes(ALPHABET[char] for char in token)
        if self._inside:
            return (token.removeprefix(self._inside) if token.startswith(self._inside) else f" {token}").encode()
        if self._byte_fallback and (byte := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token.replace(SPACE, " ").encode()


def _steps(decoder: Mapping[str, Any] | None) -> Iterable[Mapping[str, Any]]:
    if decoder is None:
        return
    if decoder.get("type") == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder


class StreamDecoder:
    """Text as it grows: `push` returns what is certain after a token, never half a character; `finish` what was held back."""

    def __init__(self, pieces: Pieces, skip: frozenset[int]):
        self._pieces = pieces
        self._skip = skip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._lead = pieces.lead

    def push(self, id: int) -> str:
        """The text that token `id` completes; often all of it, sometimes none."""
        return "" if id in self._skip else self._text(self._pieces[id])

    def finish(self) -> str:
        """What is left of an unfinished character, as U+FFFD."""
        return self._text(b"", final=True)

    def _text(self, data: bytes, *, final: bool = False) -> str:
        text = self._utf8.decode(data, final)
        while text and self._lead:
            if text[0] != " ":
                self._lead = 0
                break
            text, self._lead = text[1:], self._lead - 1
        return text
