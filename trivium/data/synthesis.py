"""Synthetic instructions: a model writes them, filters judge them.

Two ways: from raw text, where the model writes a question and its answer about a passage (as in instruction pre-training,
arXiv:2406.14491), and from nothing but the model's own template, which it is given up to where a user would begin to speak
(Magpie, arXiv:2406.08464). The model itself arrives as a callable. Conversations of several turns are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field

from ..core.errors import ConfigError, DataError, TriviumError
from ..core.registry import Registry
from ..core.spec import Part
from .likeness import words
from .rows import Record

if TYPE_CHECKING:
    from ..text.prompt import Prompt

MARK = "zqspoken"
CUT = "cut off"
ASK = (
    "Read the text. Write one question that it answers, and the answer, in your own words and so that both can be understood without "
    "the text. Begin the question with 'Question:' and the answer with 'Answer:'.\n\nText:\n{text}"
)


@dataclass(frozen=True)
class Passage:
    """A piece of raw text, and where it stood."""

    text: str
    where: str


@dataclass(frozen=True)
class Written:
    """What a model wrote; `ended`: it came to an end by itself, and was not cut off. `trouble`: why it could not write at all."""

    text: str
    ended: bool
    trouble: str | None = None


class Writer(Protocol):
    """Continues prompts (token ids), each with randomness of its own: that of `stage` and its number in `numbers`."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        /,
        *,
        stage: str,
        numbers: Sequence[int],
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> list[Written]: ...


@dataclass(frozen=True)
class Draft:
    """A question and its answer, or in `trouble` why there are none. `source`: the place of the passage that they are about."""

    number: int
    question: str = ""
    answer: str = ""
    trouble: str | None = None
    source: str | None = None

    @property
    def parsed(self) -> bool:
        """Whether there are a question and an answer, which came to its end; what they say is judged apart."""
        return bool(words(self.question) and words(self.answer)) and self.trouble != CUT


class Method(Part, registry=Registry("way to synthesize", "trivium.data")):
    """Root of the ways to synthesize. `drafts` asks the model `count` times and gives as many drafts."""

    def drafts(self, numbers: Sequence[int], *, prompt: Prompt, passages: Sequence[Passage], write: Writer) -> list[Draft]:
        raise NotImplementedError

    @property
    def reads(self) -> bool:
        """Whether it needs raw text."""
        return False

    def passages(self, records: Iterable[Record]) -> list[Passage]:
        """The pieces of raw text that it asks about."""
        return []


class FromText(Method):
    """Asks the model for a question that a passage answers, and the answer. Passages come in turn, and again where there are fewer."""

    kind: Literal["from_text"] = "from_text"
    ask: str = Field(ASK, pattern=r"\{text\}", description="what the model is asked; {text} is the passage")
    words: int = Field(200, ge=8, description="most words of a passage")
    grounded: float = Field(0.5, ge=0, le=1, description="share of the answer's longer words that the passage must have")

    @classmethod
    def tiny(cls) -> FromText:
        return cls(words=16)

    @property
    def reads(self) -> bool:
        return True

    def passages(self, records: Iterable[Record]) -> list[Passage]:
        return list(passages(records, most=self.words))

    def drafts(self, numbers: Sequence[int], *, prompt: Prompt, passages: Sequence[Passage], write: Writer) -> list[Draft]:
        chosen = [passages[number % len(passages)] for number in numbers]
        asked: dict[int, list[int]] = {}
        found: dict[int, Draft] = {}
        for number, passage in zip(numbers, chosen, strict=True):
            try:
                asked[number] = prompt.generation([{"role": "user", "content": self.ask.replace("{text}", passage.text)}])
            except TriviumError as error:
                found[number] = Draft(number, trouble=f"cannot be asked: {error}", source=passage.where)
        written = dict(zip(asked, write(list(asked.values()), stage="write", numbers=list(asked)), strict=True))
        for number, passage in zip(numbers, chosen, strict=True):
            if number in written:
                found[number] = self._judged(number, passage, written[number])
        return [found[number] for number in numbers]

    def _judged(self, number: int, passage: Passage, written: Written) -> Draft:
        pair = parse(written.text)
        if written.trouble or pair is None:
            return Draft(number, trouble=written.trouble or "no question and answer", source=passage.where)
        question, answer = pair
        trouble = trouble_of(question, answer, ended=written.ended)
        if trouble is None and (share := grounded(answer, passage.text)) < self.grounded:
            trouble = f"not about the text: it has {share:.0%} of the answer's words"
        return Draft(number, question, answer, trouble, passage.where)


class Magpie(Method):
    """Lets the model speak as the user, from the template's beginning of a user's turn, and then answers what it said."""

    kind: Literal["magpie"] = "magpie"
    system: str | None = Field(None, description="a system message, which steers what users ask about")

    @classmethod
    def tiny(cls) -> Magpie:
        return cls()

    def drafts(self, numbers: Sequence[int], *, prompt: Prompt, passages: Sequence[Passage], write: Writer) -> list[Draft]:
        opening = user_opening(prompt, system=self.system)
        said = write([opening.ids] * len(numbers), stage="ask", numbers=numbers, stop=opening.stop, stop_ids=opening.stop_ids)
        found: dict[int, Draft] = {}
        asked: dict[int, tuple[str, list[int]]] = {}
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        for number, written in zip(numbers, said, strict=True):
            question = written.text.strip()
            if (trouble := written.trouble or trouble_of(question, None, ended=written.ended)) is not None:
                found[number] = Draft(number, question, trouble=trouble)
                continue
            try:
                asked[number] = question, prompt.generation([*system, {"role": "user", "content": question}])
            except TriviumError as error:
                found[number] = Draft(number, question, trouble=f"cannot be asked: {error}")
        answers = write([ids for _, ids in asked.values()], stage="answer", numbers=list(asked))
        for (number, (question, _)), written in zip(asked.items(), answers, strict=True):
            answer = written.text.strip()
            found[number] = Draft(number, question, answer, written.trouble or trouble_of(question, answer, ended=written.ended))
        return [found[number] for number in numbers]


@dataclass(frozen=True)
class Opening:
    """What a model is given to speak as the user, and what ends that turn: ids, or where the template has none, a text."""

    ids: list[int]
    stop_ids: tuple[int, ...]
    stop: tuple[str, ...]


def user_opening(prompt: Prompt, *, system: str | None = None) -> Opening:
    """The template up to where the user's first words stand. Raises `DataError` for a template that does not write them as they are."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    prompt.generation([*messages, {"role": "user", "content": MARK}])  # checks that the template writes such messages at all
    text = prompt.render([*messages, {"role": "user", "content": MARK}], tools=None, arguments=prompt.arguments, generate=False).text
    before, mark, after = text.partition(MARK)
    if not mark:
        raise DataError("the chat template does not write what a user says as it is, so the model cannot speak in its place")
    ids, _ = prompt.tokenizer.spans(before, rest=False, markup=True)
    if not ids:
        raise DataError("the chat template writes nothing before a user's words, so there is nothing for the model to begin from")
    ending, _ = prompt.tokenizer.spans(after, rest=True, markup=True)
    stop_ids = tuple(ending[:1]) if ending and ending[0] in prompt.tokenizer.added else ()
    if not stop_ids and not after.strip():
        raise DataError("the chat template writes nothing after a user's words, so there is no telling where they end")
    return Opening(ids, stop_ids, () if stop_ids else (after.strip(),))


def parse(text: str) -> tuple[str, str] | None:
    """The first question and its answer in "Question: ... Answer: ..."; None if there is none, or one of the two is empty."""
    found = re.search(
        r"question[\W\d]{0,8}?:(?P<q>.*?)\banswer[\W\d]{0,8}?:(?P<a>.*?)(?=\bquestion[\W\d]{0,8}?:|\Z)", text, re.IGNORECASE | re.DOTALL
    )
    if found is None:
        return None
    question, answer = (found[name].strip().strip("*").strip() for name in ("q", "a"))
    return (question, answer) if question and answer else None


def trouble_of(question: str, answer: str | None, *, ended: bool) -> str | None:
    """Why a pair, or a question alone, is not worth keeping; None if nothing speaks against it."""
    if len(words(question)) < 2:
        return "no question" if not words(question) else "a question of one word"
    if answer is not None and not words(answer):
        return "no answer"
    if not ended:
        return CUT
    if answer is not None and words(answer) == words(question):
        return "the answer repeats the question"
    return None


def grounded(answer: str, passage: str) -> float:
    """The share of the answer's words of four letters and more, or of all if none is so long, that the passage has."""
    said = words(answer)
    long = [word for word in said if len(word) > 3] or said
    there = set(words(passage))
    return sum(word in there for word in long) / len(long) if long else 0.0


def passages(records: Iterable[Record], *, most: int) -> Iterator[Passage]:
    """Raw text in pieces of whole paragraphs and at most `most` words; a paragraph longer than that is cut between words."""
    for record in records:
        text = record.value.get("text")
        if not isinstance(text, str):
            raise DataError(f"{record.where}: has no 'text'; instructions are made from raw text (rows of {{text}}, or text files)")
        held: list[str] = []
        size = 0
        for paragraph in re.split(r"\n\s*\n", text):
            said = paragraph.split()
            if held and size + len(said) > most:
                yield Passage("\n\n".join(held), record.where)
                held, size = [], 0
            while len(said) > most:
                yield Passage(" ".join(said[:most]), record.where)
                said, paragraph = said[most:], " ".join(said[most:])
            if said:
                held.append(paragraph.strip())
                size += len(said)
        if held:
            yield Passage("\n\n".join(held), record.where)


def check_template(prompt: Prompt) -> None:
    """Raises `ConfigError` for a model that was not made to converse."""
    if prompt.template is None:
        raise ConfigError(
            "this model has no chat template: instructions are written by a model that answers them; name one that was tuned to converse",
            field="model",
        )


def tally(drafts: Sequence[Draft]) -> dict[str, Any]:
    """How many drafts parsed, as a share of all, how many nothing speaks against, and what speaks against the others."""
    troubles: dict[str, int] = {}
    for draft in drafts:
        if draft.trouble is not None:
            name = draft.trouble.partition(":")[0]
            troubles[name] = troubles.get(name, 0) + 1
    parsed = sum(draft.parsed for draft in drafts)
    return {
        "asked": len(drafts),
        "parsed": parsed,
        "parsed share": parsed / len(drafts) if drafts else 0.0,
        "accepted": len(drafts) - sum(troubles.values()),
        "troubles": dict(sorted(troubles.items())),
    }
