"""`trivium chat`: talk to a model."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import TriviumError
from ..core.log import log
from . import INTERRUPTED
from .options import ModelAndText, UsageError, answer, model_and_text, sampled

if TYPE_CHECKING:
    from ..recipes.chat import Chat

WELCOME = "Ctrl-C stops an answer, Ctrl-D leaves, /reset forgets what was said."


def chat(
    *words: ModelAndText, adapter: Path | None = None, system: str | None = None, dtype: str | None = None,
    device: str | None = None, extend: str | None = None, stop: tuple[str, ...] = (), json: bool = False,
) -> int:  # fmt: skip
    """Talks with a model that knows how to (one with a chat template); without a message, it asks you for them.

    Greedy unless --temperature says otherwise; the same seed gives the same answers. Answers go to stdout as they grow,
    all else to stderr. Ctrl-C stops an answer, Ctrl-D leaves, /reset forgets what was said.

    Try:
      trivium chat smollm2
      trivium chat smollm2 "What is the capital of France?"
      trivium chat runs/first/adapter --temperature 0.7 --top_p 0.9
      cat question.txt | trivium chat smollm2 --system "You are brief." --json

    Parameters
    ----------
    words
        The model (a known name, a folder, a GGUF file, an adapter's folder), and one message; "-" reads it from stdin.
    adapter
        An adapter to put on the model.
    system
        What the model is told first.
    dtype
        What to compute in: fp32, bf16, fp16; otherwise as stored.
    device
        cpu or cuda; otherwise a GPU if there is one.
    extend
        Make the model's context longer: KIND:FACTOR, such as yarn:4 (linear, ntk, dynamic, yarn, none).
    stop
        A text that ends an answer, which stops before it; may be given more than once.
    json
        Answer one message as JSON: text, ids, finish_reason, prompt_tokens.
    """
    model, text, flags = model_and_text(words)
    if text is None and json:
        raise UsageError("--json answers one message: give it as an argument or on stdin")
    if text is not None and not text.strip():
        raise UsageError("the message is empty")
    from ..recipes.chat import Chat
    from ..recipes.load import load

    sampling = sampled(flags, stop=stop, command=chat)
    talk = Chat(load(model, adapter=adapter, dtype=dtype, device=device, extend=extend), sampling=sampling, system=system)
    if text is None:
        return _converse(talk)
    said = talk.say(text, _ignore if json else _write)
    answer(said.to_dict() if json else "", as_json=json)
    sys.stdout.flush()
    log.say(said.pace())
    return INTERRUPTED if said.interrupted else 0


def _converse(talk: Chat) -> int:
    """Reads messages until there are no more."""
    log.say(WELCOME)
    while True:
        try:
            text = _ask()
        except EOFError:
            log.say("")
            return 0
        except KeyboardInterrupt:  # throws away the line that was being written
            log.say("")
            continue
        if text.strip() == "/reset":
            talk.reset()
            log.say("forgotten")
        elif text.startswith("/"):
            log.say(f"there is no {text.split()[0]}. {WELCOME}")
        elif text.strip():
            try:
                said = talk.say(text, _write)
            except TriviumError as error:
                log.error(f"{error} (/reset makes room)")
                continue
            print(flush=True)
            log.say(said.pace())


def _ask() -> str:
    """One line from the user; the prompt stays out of a redirected stdout."""
    with contextlib.suppress(ImportError):  # gives `input` editing and history, where it is there
        import readline  # noqa: F401
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


def _write(piece: str) -> None:
    print(piece, end="", flush=True)


def _ignore(_piece: str) -> None:
    """The whole answer comes at the end."""
