"""The one prompt contract."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..core.errors import DataError
from .template import render
from .tokenizer import Tokenizer, _content, _read_json

Message = Mapping[str, Any]


@dataclass
class Row:
    """Token ids; `targets[i]` says that token i is trained."""

    ids: list[int]
    targets: list[bool]


class Prompt:
    def __init__(self, tokenizer: Tokenizer, template: str | None, *, stops: tuple[int, ...]):
        self.tokenizer = tokenizer
        self.template = template
        self.stops = stops

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        template: str | None,
        generation_config: Mapping[str, Any] | None = None,
        tokenizer_config: Mapping[str, Any] | None = None,
    ) -> Prompt:
        eos = (generation_config or {}).get("eos_token_id")
        stops = list(eos if isinstance(eos, list) else [eos] if eos is not None else [])
        if tokenizer.eos is not None:
            stops.append(tokenizer.eos)
        return cls(tokenizer, template, stops=tuple(dict.fromkeys(stops)))

    @classmethod
    def load(cls, directory: str | Path, tokenizer: Tokenizer) -> Prompt:
        directory = Path(directory)
        config = _read_json(directory / "tokenizer_config.json")
        file = directory / "chat_template.jinja"
        template = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
        return cls.of(tokenizer, template, _read_json(directory / "generation_config.json"), config)

    def _render(self, messages: Sequence[Message], tools: Any, arguments: Mapping[str, Any] | None, *, generate: bool) -> str:
        if self.template is None:
            raise DataError("this model has no chat template: use prompt and completion rows, or give it one")
        named = {name: text for name in ("bos_token", "eos_token", "unk_token", "pad_token") if (text := _content(self.tokenizer.config.get(name)))}
        values = {**named, "messages": list(messages), "tools": tools, "documents": None, "add_generation_prompt": generate, **(arguments or {})}
        return render(self.template, values, date=datetime.datetime.now()).text

    def generation(self, messages: Sequence[Message], *, tools: Any = None, arguments: Mapping[str, Any] | None = None) -> list[int]:
        return self.tokenizer.encode(self._render(messages, tools, arguments, generate=True), bos=False, allow_special=True)

    def rows(
        self, messages: Sequence[Message], *, tools: Any = None, arguments: Mapping[str, Any] | None = None, turns: Literal["all", "last"] = "all"
    ) -> list[Row]:
        answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        rows: list[Row] = []
        for k in answers if turns == "all" else answers[-1:]:
            before = self._render(messages[:k], tools, arguments, generate=True)
            through = self._render(messages[: k + 1], tools, arguments, generate=False)
            if not through.startswith(before):
                raise DataError("the chat template does not render a turn as the continuation of its own generation prompt")
            prompt = self.tokenizer.encode(before, bos=False, allow_special=True)
            turn = self.tokenizer.encode_rest(through[len(before) :], allow_special=True)
            end = next((n + 1 for n, id in enumerate(turn) if id in self.stops), len(turn))
            if not rows or prompt[: len(rows[-1].ids)] != rows[-1].ids:
                rows.append(Row([], []))
            row = rows[-1]
            row.targets += [False] * (len(prompt) - len(row.ids)) + [True] * end
            row.ids = prompt + turn[:end]
        return rows

    def completion(self, prompt: str, completion: str) -> Row:
        before = self.tokenizer.encode(prompt)
        after = self.tokenizer.encode_rest(completion) + ([self.tokenizer.eos] if self.tokenizer.eos is not None else [])
        return Row(before + after, [False] * len(before) + [True] * len(after))

    def text(self, text: str) -> Row:
        ids = self.tokenizer.encode(text) + ([self.tokenizer.eos] if self.tokenizer.add_eos and self.tokenizer.eos is not None else [])
        return Row(ids, [False] + [True] * (len(ids) - 1) if ids else [])

    def settings(self) -> dict[str, Any]:
        return {"template": None if self.template is None else hashlib.sha256(self.template.encode()).hexdigest(), "stops": list(self.stops)}

    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.settings(), self.tokenizer.digest()], sort_keys=True).encode()).hexdigest()

    def save(self, directory: str | Path) -> None:
        if self.template is not None:
            (Path(directory) / "chat_template.jinja").write_text(self.template, encoding="utf-8")
