"""The one prompt contract: messages, tools and arguments become token ids, a loss mask and stop ids here and nowhere else.

What is trained for a turn is what serving sends before it, id for id, and what the template writes from there to the
first stop id. Rows grow while the template extends them; where it rewrites what went before (earlier thoughts), a new
row starts. Nothing is dropped in silence: what a template cannot express is an error unless accepted by name.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..core.errors import ConfigError, DataError, FileError, TriviumError, unknown
from . import template as templates
from .files import read_json, read_text
from .messages import Guard, Message, Special, another, is_empty, plain, spelled, trained, unmarked, with_calls
from .probe import Probe
from .tokenizer import CONFIG, NAMED, Tokenizer, content_of

TEMPLATE = "chat_template.jinja"
TAKEN = ("messages", "tools", "add_generation_prompt", "documents")  # variables that are not the user's to set

# What templates may not be able to write, as `accept` names it and as an error says it.
WORDS = {
    "tools": "the tools on offer",
    "tool": "the results of tools",
    "thoughts": "thoughts (reasoning_content)",
    "calls": "tool calls",
    "parallel calls": "all calls of a turn but one",
    "calls with content": "calls, or the content beside them",
    "calls with thoughts": "calls, or the thoughts before them",
}


@dataclass
class Row:
    """Token ids in the order they are read; `targets[i]` says that token i is trained (predicted from those before it)."""

    ids: list[int]
    targets: list[bool]


class Prompt:
    """A tokenizer, a chat template and their settings.

    `stops`: ids that end an answer. `notes`: sentences for the user about what disagrees. `special`: what becomes of strings
    in content that control the model, `refuse` (an error) or `text` (encoded as plain text). `accept`: what may be dropped
    although the template cannot express it: any of `WORDS`, template arguments (`arguments`), or a role's turns, at the start
    (`developer`) or later (`later system`).
    `arguments` are the template's, unless a call says otherwise; a `date` is recorded where the template writes one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None,
        *,
        ends: Sequence[int] = (),
        special: Special = "refuse",
        accept: Sequence[str] = (),
        arguments: Mapping[str, Any] | None = None,
    ):
        if special not in ("refuse", "text"):
            raise ConfigError(
                unknown("way with special strings", special, ("refuse", "text"), field="special"), field="special", value=special
            )
        self.tokenizer = tokenizer
        self.template = template
        self.special: Special = special
        self.accept = tuple(accept)
        self.arguments: dict[str, Any] = dict(plain(arguments or {}, "arguments"))
        notes: list[str] = []
        self._facts = templates.facts(template or "")
        if "strftime_now" in self._facts.names and "date" not in self.arguments:
            self.arguments["date"] = datetime.date.today().isoformat()
            notes.append(f"the chat template writes the date; it is recorded as {self.arguments['date']} (argument: date)")
        self._probe = Probe(self._write)
        self.stops = self._find_stops(tuple(ends), notes)
        self._guard = Guard(self._control(), special)
        self.notes = tuple(notes)

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        template: str | None,
        generation_config: Mapping[str, Any] | None = None,
        tokenizer_config: Mapping[str, Any] | None = None,
        *,
        special: Special = "refuse",
        accept: Sequence[str] = (),
        arguments: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """A prompt from its parts; without `template`, tokenizer_config's `chat_template` is taken, if it has one."""
        if template is None and tokenizer_config is not None:
            template = _named_template(tokenizer_config.get("chat_template"))
        return cls(tokenizer, template, ends=_ends(generation_config), special=special, accept=accept, arguments=arguments)

    @classmethod
    def load(cls, directory: str | Path, tokenizer: Tokenizer) -> Prompt:
        """The prompt of a model directory, with the settings that trivium.json records. Raises `FileError`."""
        directory = Path(directory)
        file = directory / TEMPLATE
        template = read_text(file) if file.exists() else _named_template(read_json(directory / CONFIG).get("chat_template"))
        settings = read_json(directory / "trivium.json").get("prompt") or {}
        ends = _ends(read_json(directory / "generation_config.json")) or tuple(settings.get("stops", ()))
        kept = {name: settings[name] for name in ("special", "accept", "arguments") if name in settings}
        try:
            return cls(tokenizer, template, ends=ends, **kept)
        except TriviumError as error:
            raise FileError(f"{directory}: {error}") from None

    def generation(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None, arguments: Mapping[str, Any] | None = None
    ) -> list[int]:
        """The ids that serving sends for the answer to `messages`. Raises `DataError`."""
        turns = spelled(messages)
        shown = self._shown(turns, tools, arguments)
        return self._encode(shown.write(turns, generate=True).text, rest=False)[0]

    def rows(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        turns: Literal["all", "last"] = "all",
    ) -> list[Row]:
        """The rows that train the answers in `messages`, or only the last one. Raises `DataError`.

        A turn whose `train` is false or whose `weight` is 0 is context only; a row of nothing else is left out. A turn that
        says nothing trains nothing, so that its row can be found empty.
        """
        said = spelled(messages)
        shown = self._shown(said, tools, arguments)
        answers = [index for index, message in enumerate(said) if message["role"] == "assistant"]
        rows: list[Row] = []
        wanted: list[bool] = []  # whether a turn of the row was left on
        for index in answers if turns == "all" else answers[-1:]:
            before, answer, targets = self._turn(shown, said, index)
            on = trained(messages[index])
            if not on or is_empty(said[index]) or all(token in self.stops for token in answer):
                targets = [False] * len(targets)
            if not rows or before[: len(rows[-1].ids)] != rows[-1].ids:
                rows.append(Row([], []))
                wanted.append(False)
            row = rows[-1]
            row.targets += [False] * (len(before) - len(row.ids)) + targets
            row.ids = before + answer
            wanted[-1] |= on
        return [row for row, on in zip(rows, wanted, strict=True) if on]

    def completion(self, prompt: str, completion: str) -> Row:
        """Plain text and what should follow it, without a template; the tokenizer's end of text closes it."""
        before = self.tokenizer.encode(prompt)
        answer = self.tokenizer.encode_rest(completion)
        ending = [] if self.tokenizer.eos is None else [self.tokenizer.eos]
        return Row(before + answer + ending, [False] * len(before) + [bool(answer)] * (len(answer) + len(ending)))

    def text(self, text: str) -> Row:
        """A document, with the ids that the tokenizer's habit puts around it; all but the first token are trained."""
        ids = self.tokenizer.encode(text)
        if self.tokenizer.add_eos and self.tokenizer.eos is not None:
            ids = [*ids, self.tokenizer.eos]
        return Row(ids, [index > 0 for index in range(len(ids))])

    def settings(self) -> dict[str, Any]:
        """What trivium.json keeps of this prompt."""
        return {
            "template": _sha256(self.template),
            "stops": list(self.stops),
            "special": self.special,
            "accept": list(self.accept),
            "arguments": dict(self.arguments),
        }

    def digest(self) -> str:
        """SHA-256 of everything that decides about ids, masks and stops: tokenizer, template, settings."""
        return _sha256(json.dumps([self.tokenizer.digest(), self.settings()], sort_keys=True)) or ""

    def save(self, directory: str | Path) -> None:
        """Write the template to chat_template.jinja; the settings go into trivium.json with the model."""
        if self.template is not None:
            (Path(directory) / TEMPLATE).write_bytes(self.template.encode())

    def _turn(self, shown: _Shown, said: list[dict[str, Any]], index: int) -> tuple[list[int], list[int], list[bool]]:
        """For the answer at `index`: the ids before it, its own ids to the first stop id, and which of these are trained."""
        before = shown.write(said[:index], generate=True).text
        whole = shown.write(said[: index + 1], generate=False)
        start = len(before) if whole.text.startswith(before) else self._start(shown, said, index, before, whole.text)
        answer, places = self._encode(whole.text[start:], rest=True)
        end = next((position + 1 for position, token in enumerate(answer) if token in self.stops), len(answer))
        targets = [True] * end
        if self._facts.marks:
            targets = [any(_overlap(start + a, start + b, span) for span in whole.spans) for a, b in places[:end]]
        return self._encode(before, rest=False)[0], answer[:end], targets

    def _start(self, shown: _Shown, said: list[dict[str, Any]], index: int, before: str, whole: str) -> int:
        """Where the answer begins in `whole`, if the answer changes what is written before it (gpt-oss then drops thoughts).

        It begins after the last generation prompt in what is common to this answer and another one in its place.
        """
        bare = shown.write(said[:index], generate=False).text
        header = before[len(bare) :] if before.startswith(bare) else ""
        other = shown.write([*said[:index], another(said[index])], generate=False).text
        at = whole.rfind(header, 0, _common(whole, other)) if header else -1
        if at < 0:
            raise DataError(
                f"messages[{index}]: the chat template does not write this answer as the continuation of what serving sends before it "
                f"({_tail(before)!r}), so it cannot be trained as it would be served; other template arguments may help",
                field=f"messages[{index}]",
            )
        return at + len(header)

    def _encode(self, text: str, *, rest: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of what a template wrote, and the characters of each; what was marked in it is nothing but text."""
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        for start, piece, markup in unmarked(text):
            found, spans = self.tokenizer.spans(piece, rest=rest or start > 0, markup=markup)
            ids += found
            places += [(start + a, start + b) for a, b in spans]
        return ids, places

    def _shown(self, said: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None, arguments: Mapping[str, Any] | None) -> _Shown:
        """Everything but the messages, checked; and the messages of `said` checked and brought into the template's form, in place."""
        if self.template is None:
            raise DataError("this model has no chat template, so it takes no messages: use plain text, or prompt and completion")
        offered = list(plain(list(tools or ()), "tools"))
        for what in dict.fromkeys(_used(said, offered)):
            if what not in self.accept and not self._probe.expresses(what):
                raise DataError(
                    f"the chat template drops {WORDS.get(what, f'a {what} turn')}; leave them out, or accept that they are dropped (accept: {what})",
                    field=what,
                )
        forms = self._probe.forms()
        for index, message in enumerate(said):
            if message.get("tool_calls") and forms is not None:
                message = with_calls(message, **forms._asdict())
            said[index] = self._guard(message, f"messages[{index}]")
        given = self._arguments(plain(arguments or {}, "arguments"))
        return _Shown(self, self._guard(offered, "tools"), self._guard(given, "arguments"))

    def _arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The template's arguments for one call."""
        known = self._facts.names | ({"date"} if "strftime_now" in self._facts.names else set())
        for name in arguments.keys() | self.arguments.keys():
            if name in TAKEN:
                raise DataError(f"arguments.{name}: {name!r} is not an argument of the template", field=f"arguments.{name}")
            if name not in known and "arguments" not in self.accept:
                choices = known - {*TAKEN, *self._special_tokens()}
                raise DataError(
                    f"{unknown('argument of the chat template', name, choices, field='arguments')}; or accept it (accept: arguments)"
                )
        return {**self.arguments, **arguments}

    def _special_tokens(self) -> dict[str, str]:
        """The special tokens under the names by which templates know them."""
        config = self.tokenizer.config
        extra = config.get("extra_special_tokens")
        named = {**(extra if isinstance(extra, dict) else {}), **{name: config.get(name) for name in NAMED}}
        return {name: text for name, token in named.items() if (text := content_of(token)) is not None}

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None, arguments: Mapping[str, Any], generate: bool
    ) -> templates.Rendered:
        """What the template writes; everything is taken as it is."""
        assert self.template is not None
        values = {"messages": messages, "tools": tools or None, "documents": None, "add_generation_prompt": generate}
        given = {name: value for name, value in arguments.items() if name != "date" or "date" in self._facts.names}
        return templates.render(
            self.template, {**self._special_tokens(), **given, **values}, date=_date(arguments.get("date", "2000-01-01"))
        )

    def _write(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None = None, generate: bool = False) -> str:
        """For the probe."""
        return self.render(messages, tools=tools, arguments=self.arguments, generate=generate).text

    def _find_stops(self, ends: tuple[int, ...], notes: list[str]) -> tuple[int, ...]:
        """What the template writes after an answer and after a call, and what the model's files declare."""
        if odd := [token for token in ends if not 0 <= token < self.tokenizer.vocab_size]:
            raise FileError(
                f"generation_config.json: eos_token_id {odd[0]} is no token of this tokenizer, whose ids end at {self.tokenizer.vocab_size - 1}"
            )
        declared = ends or (() if self.tokenizer.eos is None else (self.tokenizer.eos,))
        if self.template is None:
            return declared
        known = self.tokenizer.special | set(declared)
        after = [token for token in self._encode(self._probe.ending(), rest=True)[0] if token in known][:1]
        if not after:
            notes.append("the chat template ends an answer with no special token, so a model trained on it learns no end")
        elif declared and after[0] not in declared:
            names = ", ".join(repr(self.tokenizer.token(token)) for token in declared)
            notes.append(
                f"the chat template ends an answer with {self.tokenizer.token(after[0])!r}, but "
                f"{'generation_config' if ends else 'the tokenizer'} declares {names}; all of them stop an answer"
            )
        if self._probe.forms() is not None:
            called = [token for token in self._encode(self._probe.call_ending(), rest=True)[0] if token in known]
            if not called:
                notes.append("the chat template ends a turn of calls with no special token")
            after += [token for token in called if token in (*after, *declared)][:1] or called[-1:]
        return tuple(dict.fromkeys([*after, *declared]))

    def _control(self) -> frozenset[str]:
        """Strings that control the model: special tokens, and what else the template writes around turns as tokens of their own."""
        ids = set(self.tokenizer.special)
        if self.template is not None:
            ids.update(self._encode(self._probe.markup(), rest=True)[0])
        return frozenset(text for id, text in self.tokenizer.added.items() if id in ids and not text.isspace())


@dataclass(frozen=True)
class _Shown:
    """What a template is shown besides the messages."""

    prompt: Prompt
    tools: list[Any]
    arguments: dict[str, Any]

    def write(self, messages: Sequence[Mapping[str, Any]], *, generate: bool) -> templates.Rendered:
        return self.prompt.render(messages, tools=self.tools, arguments=self.arguments, generate=generate)


def _used(said: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> Iterator[str]:
    """What a conversation asks of a template, beyond turns of user and assistant."""
    if tools:
        yield "tools"
    for index, message in enumerate(said):
        if message["role"] == "assistant":
            calls = message.get("tool_calls")
            if calls:
                yield "calls"
            if calls and len(calls) > 1:
                yield "parallel calls"
            if calls and str(message.get("content") or "").strip():
                yield "calls with content"
            if message.get("reasoning_content"):
                yield "calls with thoughts" if calls else "thoughts"
        elif message["role"] == "tool":
            yield "tool"
        elif message["role"] != "user":
            yield message["role"] if index == 0 else f"later {message['role']}"


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _overlap(start: int, end: int, span: tuple[int, int]) -> bool:
    return start < span[1] and max(end, start + 1) > span[0]


def _tail(text: str) -> str:
    return text if len(text) <= 60 else f"...{text[-60:]}"


def _date(date: Any) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(date)
    except (TypeError, ValueError):
        raise DataError(f"arguments.date: {date!r:.60} is no date such as 2025-06-30", field="arguments.date", value=date) from None


def _sha256(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def _ends(generation_config: Mapping[str, Any] | None) -> tuple[int, ...]:
    """The ids that generation_config.json ends an answer with: one, several or none."""
    ends = (generation_config or {}).get("eos_token_id")
    listed = ends if isinstance(ends, list | tuple) else [] if ends is None else [ends]
    if not all(type(id) is int for id in listed):
        raise FileError(f"generation_config.json: eos_token_id is {ends!r:.80}, not an id or a list of ids")
    return tuple(listed)


def _named_template(template: Any) -> str | None:
    """tokenizer_config.json's template: a string, or a list of them with names, of which one is the default."""
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}.get("default")
    if template is not None and not isinstance(template, str):
        raise FileError(f"{CONFIG}: chat_template is neither a string nor a list with a default")
    return template
