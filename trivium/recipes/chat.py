"""Answers as they grow, and a conversation that remembers them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..infer.generate import Completion, stream
from ..infer.sampling import Sampling
from .load import Bundle


class Answer:
    """What a model says to a prompt (token ids): iterate for the text, piece by piece; then `completion` holds all of it.

    Raises `DataError` or `ConfigError` at once for what cannot be answered.
    """

    def __init__(self, bundle: Bundle, prompt: Sequence[int], sampling: Sampling):
        self.prompt_tokens = len(prompt)
        self.completion = Completion(
            text="",
            logprobs=None if sampling.logprobs is None else [],
            top=[] if sampling.logprobs else None,
        )
        self.interrupted = False
        self.first = self.seconds = 0.0  # until the first token, and until the last
        self._events = stream(bundle.model, [prompt], sampling, stops=bundle.prompt.stops, decoder=bundle.tokenizer.stream)

    def __iter__(self) -> Iterator[str]:
        began = time.perf_counter()
        for event in self._events:
            self.seconds = time.perf_counter() - began
            self.first = self.first or self.seconds
            self.completion.add(event)
            yield event.text

    def read(self, write: Callable[[str], None]) -> Answer:
        """Hand each piece to `write` as it comes. Ctrl-C ends the answer there, and says so in `interrupted`."""
        try:
            for piece in self:
                write(piece)
        except KeyboardInterrupt:
            self.interrupted = True
        return self

    def pace(self) -> str:
        """Counts and rates, in one line."""
        count = len(self.completion.ids)
        rate = f", {(count - 1) / (self.seconds - self.first):.1f} tokens/s" if self.seconds > self.first else ""
        return f"{self.prompt_tokens} tokens read in {self.first:.2f} s; {count} written{rate}; ended by {self.ended}"

    @property
    def ended(self) -> str:
        return "Ctrl-C" if self.interrupted else str(self.completion.finish_reason)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        found = self.completion
        facts = {"text": found.text, "ids": found.ids, "finish_reason": self.ended, "prompt_tokens": self.prompt_tokens}
        return facts if found.logprobs is None else {**facts, "logprobs": found.logprobs, "top": found.top}


class Chat:
    """A conversation with a model, through the prompt contract. `messages` is all that was said."""

    def __init__(self, bundle: Bundle, *, sampling: Sampling, system: str | None = None):
        self.bundle, self.sampling = bundle, sampling
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[Mapping[str, Any]] = list(self._opening)

    def say(self, text: str, write: Callable[[str], None]) -> Answer:
        """Say something as the user; the answer goes to `write` as it comes, and is remembered, as far as it came.

        What cannot be asked raises `TriviumError`, and is not remembered.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = Answer(self.bundle, self.bundle.prompt.generation(asked), self.sampling).read(write)
        self.messages = [*asked, {"role": "assistant", "content": answer.completion.text}]
        return answer

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self._opening)
