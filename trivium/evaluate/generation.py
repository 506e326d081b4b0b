"""Generate and score: the model writes its answer to each row exactly as serving would, and a scorer says what is right about it.

Rows are conversations, whose last assistant turn is the expected answer, or prompt and completion; their formats are those of training data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, SerializeAsAny

from ..core.errors import DataError
from ..core.seed import derive
from ..data import formats
from ..data.formats import Completion, Conversation, Text
from ..data.rows import Record
from ..infer.generate import generate
from ..infer.sampling import Sampling
from .scorers import Exact, Scorer
from .task import Finish, Prompted, Sample, Subject, key

Asked = tuple[Completion | Conversation, str]
"""A row, with its solved examples in front, and the answer that is expected."""


class Generate(Prompted):
    """Write an answer to each row; the scorer's first metric is the main one."""

    kind: Literal["generate"] = "generate"
    scorer: SerializeAsAny[Scorer] = Field(Exact(), description="what makes an answer right")
    sampling: Sampling = Field(Sampling(temperature=0), description="how answers are sampled; greedy by default")
    format: str | None = Field(None, description="the rows' format, if their columns do not tell")

    def metrics(self) -> Mapping[str, Finish]:
        return self.scorer.metrics

    def run(self, subject: Subject, records: Sequence[Record]) -> list[Sample]:
        format = formats.choose(records[:100], name=self.format)
        pool = self.pool(records)
        asked = [self._asked(record, pool, format) for record in records]
        expected = [self._expected(record, answer) for record, (_, answer) in zip(records, asked, strict=True)]
        prompts = [self._prompt(subject, example) for example, _ in asked]
        answers = generate(
            subject.model,
            prompts,
            [self.sampling.replace(seed=derive(self.sampling.seed, "row", key(record))) for record in records],
            stops=subject.prompt.stops,
            decoder=subject.tokenizer.stream,
            context=subject.model.spec.context,
            batch=subject.batch,
        )
        samples = []
        for record, prompt, (_, wanted), meaning, answer in zip(records, prompts, asked, expected, answers, strict=True):
            assert answer.text is not None, "a decoder was given"
            shown = {"row": record.value, "expected": wanted, "answer": answer.text, "finish_reason": answer.finish_reason}
            samples.append(Sample(key(record), tuple(prompt), self.scorer.terms(answer.text, meaning), shown))
        return samples

    def _expected(self, record: Record, answer: str) -> object:
        try:
            return self.scorer.read(answer)
        except DataError as error:
            raise DataError(f"{record.where}: {error}") from None

    def _asked(self, record: Record, pool: Sequence[Record], format: formats.Format) -> Asked:
        example, answer = _split(record, format)
        for other in reversed(self.drawn(record, pool)):
            solved, solution = _split(other, format)
            if isinstance(example, Completion) and isinstance(solved, Completion):
                example = Completion(f"{solved.prompt}{solution}\n\n{example.prompt}", "")
            elif isinstance(example, Conversation) and isinstance(solved, Conversation):
                turns = [turn for turn in solved.messages if turn["role"] not in ("system", "developer")]
                heads = [turn for turn in example.messages if turn["role"] in ("system", "developer")]
                rest = [turn for turn in example.messages if turn["role"] not in ("system", "developer")]
                example = Conversation((*heads, *turns, {"role": "assistant", "content": solution}, *rest), example.tools)
        return example, answer

    def _prompt(self, subject: Subject, example: Completion | Conversation) -> list[int]:
        if isinstance(example, Completion):
            return subject.tokenizer.encode(example.prompt)
        tools = None if example.tools is None else list(example.tools)
        return subject.prompt.generation(list(example.messages), tools=tools)


def _split(record: Record, format: formats.Format) -> Asked:
    """The row without its answer, and the answer."""
    example = formats.convert(record, format)
    if isinstance(example, Completion):
        return Completion(example.prompt, ""), example.completion
    if isinstance(example, Text):
        raise DataError(f"{record.where}: a text has no answer to expect; give messages, or prompt and completion")
    last = example.messages[-1]
    if last["role"] != "assistant" or not isinstance(last.get("content"), str):
        raise DataError(f"{record.where}: the last message must be the assistant's text, which is the answer to expect")
    return Conversation(example.messages[:-1], example.tools), last["content"]
