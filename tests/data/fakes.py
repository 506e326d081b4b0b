"""A prompt contract of a few lines, one id a character, for tests of what is built upon it."""

from __future__ import annotations

from dataclasses import dataclass, field

from trivium.core.errors import DataError

BOS, STOP, FIRST = 1, 2, 3


@dataclass
class FakeRow:
    ids: list[int]
    targets: list[bool]


def encode(text: str) -> list[int]:
    return [FIRST + ord(char) for char in text]


@dataclass
class FakePrompt:
    """`r:content` and a stop id a turn; `forgets` drops <...> thoughts of earlier turns, so that a conversation needs several rows."""

    forgets: bool = False
    stops: tuple[int, ...] = (STOP,)
    calls: list[dict] = field(default_factory=list)

    def _turn(self, message: dict, *, last: bool) -> list[int]:
        content = str(message["tool_calls"]) if message.get("tool_calls") else message["content"]
        if self.forgets and not last and message["role"] == "assistant":
            content = content.split(">")[-1]
        return encode(f"{message['role'][0]}:{content}") + [STOP]

    def generation(self, messages, *, tools=None, arguments=None) -> list[int]:
        head = [BOS] + (encode(f"tools{len(tools)}") if tools else [])
        return head + [token for message in messages for token in self._turn(message, last=False)] + encode("a:")

    def rows(self, messages, *, tools=None, arguments=None, turns="all") -> list[FakeRow]:
        self.calls.append({"tools": tools, "arguments": arguments, "turns": turns})
        if any("<|" in (message.get("content") or "") for message in messages):
            raise DataError("a special token stands in the content")
        answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        rows: list[FakeRow] = []
        for k in answers if turns == "all" else answers[-1:]:
            before = self.generation(messages[:k], tools=tools, arguments=arguments)
            answer = self._turn(messages[k], last=True)[2:]
            if not rows or before[: len(rows[-1].ids)] != rows[-1].ids:
                rows.append(FakeRow([], []))
            row = rows[-1]
            row.targets += [False] * (len(before) - len(row.ids)) + [messages[k].get("train", True)] * len(answer)
            row.ids = before + answer
        return rows

    def completion(self, prompt: str, completion: str) -> FakeRow:
        return FakeRow([BOS, *encode(prompt), *encode(completion), STOP], [False] * (1 + len(prompt)) + [True] * (len(completion) + 1))

    def text(self, text: str) -> FakeRow:
        ids = [BOS, *encode(text), STOP]
        return FakeRow(ids, [False] + [True] * (len(ids) - 1))

    def digest(self) -> str:
        return f"fake-{self.forgets}"


class FakeStream:
    def push(self, token: int) -> str:
        return chr(token - FIRST)

    def finish(self) -> str:
        return ""


class FakeTokenizer:
    special = frozenset({BOS, STOP})

    def token(self, token: int) -> str:
        return {BOS: "<s>", STOP: "</s>"}[token]

    def stream(self) -> FakeStream:
        return FakeStream()


def talk(*contents: str) -> list[dict]:
    """Messages, the user first, in turns."""
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": content} for i, content in enumerate(contents)]
