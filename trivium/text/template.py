"""The one renderer of chat templates: jinja2's immutable sandbox, set up as transformers sets it up.

Templates come with models and are not trusted.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..core.errors import DataError

OPEN, CLOSE = "\U0010fffe", "\U0010ffff"  # noncharacters that mark where {% generation %} begins and ends


@dataclass(frozen=True)
class Rendered:
    """A text, and the spans of characters that stood inside {% generation %}."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()


class _Generation(Extension):
    tags = {"generation"}

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


class _Environment(ImmutableSandboxedEnvironment):
    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:  # noqa: FBT001
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


@lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    return _Environment().from_string(source)


def render(source: str, values: Mapping[str, Any], *, date: datetime.datetime) -> Rendered:
    """Render a template; `date` is what strftime_now tells. Raises `DataError`."""
    try:
        text = _compiled(source).render({**values, "strftime_now": date.strftime})
    except Exception as error:
        raise DataError(f"the chat template cannot render this conversation: {error}") from error
    return _unmark(text)


def _unmark(text: str) -> Rendered:
    pieces, spans, length, start = [], [], 0, 0
    for piece in text.replace(CLOSE, f"{OPEN}{CLOSE}").split(OPEN):
        if piece.startswith(CLOSE):
            spans.append((start, length))
            piece = piece[1:]
        start = length
        pieces.append(piece)
        length += len(piece)
    return Rendered("".join(pieces), tuple(spans))
