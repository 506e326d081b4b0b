"""Multiple choice, scored by log-likelihood (raw, per character, per byte) and, on request, by generating and reading the answer.

The modes can disagree on the same row, so each row keeps every mode's pick and `gap` reports their accuracies, differences and disagreement.
Metrics bear lm-eval's names (`acc` raw, `acc_norm` per character, `acc_bytes` per byte), and context and choice are encoded as there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..checks.bootstrap import Interval, interval, paired
from ..checks.metrics import Term, normalize
from ..core.errors import DataError
from ..data.rows import Record
from ..infer.generate import generate
from ..infer.sampling import Sampling
from .likelihood import Likelihood, Request, likelihoods
from .task import Finish, Prompted, Sample, Subject, column, key

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

LIKELIHOOD_MODES = ("acc", "acc_norm", "acc_bytes")
_PLACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Question:
    """One row: what stands before the answer, the choices as text, the index of the right one."""

    context: str
    choices: tuple[str, ...]
    gold: int


class Choices(Prompted):
    """Pick one of the choices that a row gives. Raw log-likelihood (`acc`) is the main metric."""

    kind: Literal["choices"] = "choices"
    template: str = Field("{question}\nAnswer:", description="what stands before the answer; {name} is a column")
    choices: str = Field("choices", description="the column that lists the choices")
    answer: str = Field("answer", description="the column of the right choice: its index from 0, its letter, or its text")
    delimiter: str = Field(" ", description="what stands between context and choice")
    generated: bool = Field(False, description="also let the model write its answer, and read the choice from it")
    max_tokens: int = Field(32, ge=1, description="most tokens of a generated answer, which ends with its line")

    def metrics(self) -> dict[str, Finish]:
        modes = (*LIKELIHOOD_MODES, "acc_generated") if self.generated else LIKELIHOOD_MODES
        return dict.fromkeys(modes, "ratio")

    def run(self, subject: Subject, records: Sequence[Record]) -> list[Sample]:
        pool = self.pool(records)
        questions = [self._with_shots(record, pool) for record in records]
        requests = [
            Request(*encode_pair(subject.tokenizer, question.context, self.delimiter + choice))
            for question in questions
            for choice in question.choices
        ]
        self._check_lengths(subject, records, questions, requests)
        scores = iter(likelihoods(subject.model, requests, tokens=subject.tokens))
        prompts = [subject.tokenizer.encode(question.context) for question in questions]
        texts: list[str | None] = self._generate(subject, prompts) if self.generated else [None] * len(questions)
        return [
            _sample(record, question, [next(scores) for _ in question.choices], prompt, text)
            for record, question, prompt, text in zip(records, questions, prompts, texts, strict=True)
        ]

    def report(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The gap between the scoring modes."""
        picks = {mode: [sample.shown["picks"][mode] for sample in samples] for mode in samples[0].shown["picks"]}
        return {"gap": asdict(gap(picks, [sample.shown["gold"] for sample in samples]))} if len(samples) > 1 else {}

    def _with_shots(self, record: Record, pool: Sequence[Record]) -> Question:
        asked = self._question(record)
        solved = [self._question(other) for other in self.drawn(record, pool)]
        before = "".join(f"{one.context}{self.delimiter}{one.choices[one.gold]}\n\n" for one in solved)
        return Question(before + asked.context, asked.choices, asked.gold)

    def _question(self, record: Record) -> Question:
        given = column(record, self.choices)
        if not isinstance(given, list) or len(given) < 2 or not all(isinstance(choice, str) and choice for choice in given):
            raise DataError(f"{record.where}: {self.choices!r} must list at least two texts, got {given!r:.80}", field=self.choices)
        context = _PLACE.sub(lambda place: str(column(record, place[1])), self.template)
        return Question(context, tuple(given), _index(record, column(record, self.answer), given))

    def _check_lengths(self, subject: Subject, records: Sequence[Record], questions: list[Question], requests: list[Request]) -> None:
        """Nothing is cut in silence: a row that does not fit the model's context is an error."""
        context = subject.model.spec.context
        lengths = iter(len(request.ids) for request in requests)
        for record, question in zip(records, questions, strict=True):
            longest = max(next(lengths) for _ in question.choices)
            if context is not None and longest > context:
                raise DataError(
                    f"{record.where}: {longest} tokens with its examples, but the model's context is {context}; show fewer examples"
                )

    def _generate(self, subject: Subject, prompts: list[list[int]]) -> list[str | None]:
        sampling = Sampling(temperature=0, max_tokens=self.max_tokens, stop=("\n",))
        answers = generate(
            subject.model, prompts, sampling, stops=subject.prompt.stops, decoder=subject.tokenizer.stream, batch=subject.batch
        )
        return [answer.text for answer in answers]


def _index(record: Record, answer: Any, choices: list[str]) -> int:
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and answer.isalpha():
        answer = ord(answer.upper()) - ord("A")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise DataError(f"{record.where}: the answer {answer!r:.80} is no index from 0, letter or text of its {len(choices)} choices")


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """The ids of both, and where the continuation begins: the context encoded alone, then what the ids of the whole text have beyond it.

    White space at the end of the context goes to the continuation, and one after no context follows the start token. All as in lm-eval:
    where a token spans the cut, the context's own ids stand in its place, so that all choices follow the same ids.
    """
    whole = tokenizer.encode(context + continuation)
    before = tokenizer.encode(kept) if (kept := context.rstrip()) else []
    if before:
        return before + whole[len(before) :], len(before)
    start = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
    return (whole if start is None or whole[0] == start else [start, *whole]), 1


def parse_choice(text: str, choices: Sequence[str]) -> int | None:
    """The choice that a written answer names: its text, else its letter, else the only choice that the answer contains."""
    said = normalize(text)
    names = [normalize(choice) for choice in choices]
    if said in names:
        return names.index(said)
    if letter := re.match(r"\s*\(?([A-Za-z])(?:[).:]|\s*$)", text):
        index = ord(letter[1].upper()) - ord("A")
        return index if index < len(choices) else None
    inside = [index for index, name in enumerate(names) if name and re.search(rf"\b{re.escape(name)}\b", said)]
    return inside[0] if len(inside) == 1 else None


def _sample(record: Record, question: Question, scores: list[Likelihood], prompt: list[int], text: str | None) -> Sample:
    totals = [score.total for score in scores]
    picks: dict[str, int | None] = {
        "acc": _best(totals),
        "acc_norm": _best([total / len(choice) for total, choice in zip(totals, question.choices, strict=True)]),
        "acc_bytes": _best([total / len(choice.encode()) for total, choice in zip(totals, question.choices, strict=True)]),
    }
    shown: dict[str, Any] = {"context": question.context, "choices": list(question.choices), "gold": question.gold, "logprobs": totals}
    if text is not None:
        picks["acc_generated"] = parse_choice(text, question.choices)
        shown["generated"] = text
    terms = {mode: Term(pick == question.gold, 1) for mode, pick in picks.items()}
    return Sample(key(record), tuple(prompt), terms, {**shown, "picks": picks})


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


@dataclass(frozen=True)
class Pair:
    """Two modes on the same rows: accuracy of b minus accuracy of a, and the share of rows on which they pick differently."""

    a: str
    b: str
    difference: Interval
    disagreement: Interval


@dataclass(frozen=True)
class Gap:
    """How far the scoring modes are apart. `unread` is the share of rows from which a mode's answer could not be read."""

    accuracy: dict[str, Interval]
    unread: dict[str, float]
    pairs: list[Pair]


def gap(picks: Mapping[str, Sequence[int | None]], gold: Sequence[int], *, seed: int = 0) -> Gap:
    """Compare modes by their picks, row for row; a pick of None could not be read, is wrong, and agrees only with another None."""
    right = {mode: [float(a == b) for a, b in zip(found, gold, strict=True)] for mode, found in picks.items()}
    return Gap(
        accuracy={mode: interval(hits, seed=seed) for mode, hits in right.items()},
        unread={mode: sum(pick is None for pick in found) / len(gold) for mode, found in picks.items()},
        pairs=[
            Pair(
                a,
                b,
                paired(right[a], right[b], seed=seed),
                interval([float(x != y) for x, y in zip(picks[a], picks[b], strict=True)], seed=seed),
            )
            for a, b in combinations(picks, 2)
        ],
    )
