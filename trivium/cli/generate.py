"""`trivium generate`: continue a text."""

from __future__ import annotations

import sys
from pathlib import Path

from . import INTERRUPTED
from .options import ModelAndText, UsageError, answer, model_and_text, sampled


def generate(
    *words: ModelAndText, adapter: Path | None = None, dtype: str | None = None, device: str | None = None,
    extend: str | None = None, stop: tuple[str, ...] = (), json: bool = False,
) -> int:  # fmt: skip
    """Continues a text as it stands, without a chat template. The text is an argument, or comes on stdin.

    Greedy unless --temperature says otherwise; the same seed gives the same text. The text goes to stdout as it grows,
    counts and rates to stderr.

    Try:
      trivium generate smollm2 "Once upon a time" --max_tokens 60
      trivium generate smollm2 "Once upon a time" --temperature 0.8 --top_p 0.9 --seed 7
      cat story.txt | trivium generate models/smollm2 --stop "THE END" --json

    Parameters
    ----------
    words
        The model (a known name, a folder, a GGUF file, an adapter's folder), and the text; "-" reads stdin.
    adapter
        An adapter to put on the model.
    dtype
        What to compute in: fp32, bf16, fp16; otherwise as stored.
    device
        cpu or cuda; otherwise a GPU if there is one.
    extend
        Make the model's context longer: KIND:FACTOR, such as yarn:4 (linear, ntk, dynamic, yarn, none).
    stop
        A text that ends the answer, which stops before it; may be given more than once.
    json
        Answer as JSON: text, ids, finish_reason, prompt_tokens; with --logprobs N also logprobs, top.
    """
    model, text, flags = model_and_text(words)
    if text is None:
        raise UsageError("give a text to continue, as an argument or on stdin")
    from ..core.log import log
    from ..recipes.chat import Answer
    from ..recipes.load import load

    sampling = sampled(flags, stop=stop, command=generate)
    bundle = load(model, adapter=adapter, dtype=dtype, device=device, extend=extend)
    said = Answer(bundle, bundle.tokenizer.encode(text), sampling)
    said.read(lambda piece: None if json else print(piece, end="", flush=True))
    answer(said.to_dict() if json else "", as_json=json)
    sys.stdout.flush()
    log.say(said.pace())
    return INTERRUPTED if said.interrupted else 0
