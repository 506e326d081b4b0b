"""Synthetic instructions as a file: a model writes, filters judge, and each row says where it came from.

Every request has a seed of its own, derived from the run's, the stage and its number, so that neither batches nor what came before
change what is written. Rows that nothing speaks against go through the steps of curation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, SerializeAsAny

from ..core.errors import ConfigError, DataError
from ..core.log import log
from ..core.seed import derive
from ..core.spec import Spec
from ..data import rows
from ..data.curation import Exact, Near, Step, curate
from ..data.items import Means
from ..data.likeness import bags
from ..data.rows import Record
from ..data.synthesis import Draft, Magpie, Method, Passage, Written, check_template, tally
from ..infer.generate import generate
from ..infer.sampling import Sampling
from .curate import losses
from .load import Bundle, load
from .rewrite import Place


class Synthesize(Spec):
    """What is written by which model, how, and what is kept."""

    model: str = Field("smollm2", description="the model that writes; it must have a chat template")
    adapter: str | None = Field(None, description="adapter directory to put on the model")
    method: SerializeAsAny[Method] = Field(Magpie(), description="how instructions come about")
    data: tuple[str, ...] = Field((), description="raw text, for a method that reads: files, folders or globs")
    out: str = Field("synthetic.jsonl", pattern=r"\.jsonl$", description="the rows; what was refused and a report lie beside it")
    count: int = Field(100, ge=1, description="how many times the model is asked")
    sampling: Sampling = Field(Sampling(temperature=1.0, top_p=0.95), description="how the model writes; its seed is derived from `seed`")
    steps: tuple[SerializeAsAny[Step], ...] = Field((Exact(over="question"), Near()), description="curation of what was written")
    batch: int = Field(16, ge=1, description="requests at a time")
    seed: int = Field(0, ge=0, description="same model, same seed: same rows")


ALIASES = {
    "model_name_or_path": "model",
    "max_new_tokens": "sampling.max_tokens",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
}


@dataclass(frozen=True)
class Synthetic:
    """The rows that stayed, what was refused with the reason, and the numbers: `parsed share` is the validity of what was written."""

    kept: tuple[dict[str, Any], ...]
    removed: tuple[dict[str, Any], ...]
    report: dict[str, Any]


def synthesize(config: Synthesize, *, bundle: Bundle | None = None, overwrite: bool = False) -> Synthetic:
    """Let a model write instructions and answers, and write those that stand to `config.out` as rows of messages.

    `bundle`: the model, already loaded. Nothing is written before the end. Raises `ConfigError` for a model without a chat template,
    `DataError` for no raw text where the method reads, a place that is taken, and if nothing stands; what was refused is then still
    written.
    """
    place = Place.of(config.out, config.data, overwrite=overwrite)
    if config.method.reads != bool(config.data):
        needs = "reads raw text: name it (data)" if config.method.reads else "reads no raw text; leave out data"
        raise ConfigError(f"the method {config.method.kind!r} {needs}", field="data")
    bundle = bundle or load(config.model, adapter=config.adapter)
    check_template(bundle.prompt)
    found = _passages(config)
    drafts: list[Draft] = []
    with log.progress("requests", total=config.count) as progress:
        for start in range(0, config.count, config.batch):
            numbers = range(start, min(start + config.batch, config.count))
            drafts += config.method.drafts(numbers, prompt=bundle.prompt, passages=found, write=_Pen(bundle, config))
            progress.advance(len(numbers))
    made = judged(drafts, config, bundle)
    if not made.kept:
        place.write_aside(made.removed, made.report)
        named = ", ".join(f"{name} ({count})" for name, count in made.report["troubles"].items())
        raise DataError(
            f"none of {len(drafts)} drafts stands: {named}; see {place.removed}; a larger model, other sampling or more tokens may help"
        )
    place.write(made.kept, made.removed, made.report)
    return made


def judged(drafts: Sequence[Draft], config: Synthesize, bundle: Bundle) -> Synthetic:
    """The drafts as rows with their provenance, put through `config.steps`."""
    origin = {
        "method": config.method.to_dict(),
        "model": bundle.weights(),
        "prompt": bundle.prompt.digest(),
        "sampling": config.sampling.replace(seed=0).to_dict(),
        "seed": config.seed,
    }
    numbers = tally(drafts)
    good = [Record(_row(draft, origin), "request", draft.number + 1) for draft in drafts if draft.trouble is None]
    refused = [
        {"step": "draft", "why": draft.trouble, "where": f"request:{draft.number + 1}", "question": draft.question, "answer": draft.answer}
        for draft in drafts
        if draft.trouble is not None
    ]
    report: dict[str, Any] = {"config": config.to_dict(), "model": origin["model"], **numbers, "kept": 0, "steps": []}
    if not good:
        return Synthetic((), tuple(refused), report)
    means = Means(bundle.prompt, losses(bundle.model), bags)
    curated = curate(good, config.steps, means=means, format="messages")
    kept = tuple(record.value for record in curated.kept)
    report |= {"kept": len(kept), "steps": curated.report["steps"]}
    return Synthetic(kept, (*refused, *(out.to_dict() for out in curated.removed)), report)


def _row(draft: Draft, origin: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": draft.question}, {"role": "assistant", "content": draft.answer}]
    about = {} if draft.source is None else {"source": draft.source}
    return {"messages": messages, "synthetic": {**origin, "request": draft.number, **about}}


def _passages(config: Synthesize) -> list[Passage]:
    if not config.method.reads:
        return []
    found = config.method.passages(rows.read(config.data))
    if not found:
        raise DataError(f"{', '.join(config.data)}: holds no text to write about", field="data")
    return found


class _Pen:
    """The model as a `Writer`."""

    def __init__(self, bundle: Bundle, config: Synthesize):
        self.bundle, self.config = bundle, config

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        /,
        *,
        stage: str,
        numbers: Sequence[int],
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> list[Written]:
        base = self.config.sampling
        asked = [
            base.replace(
                seed=derive(self.config.seed, "synthesize", stage, number), stop=(*base.stop, *stop), stop_ids=(*base.stop_ids, *stop_ids)
            )
            for number in numbers
        ]
        bundle, context = self.bundle, self.bundle.spec.context
        fits = [at for at, prompt in enumerate(prompts) if context is None or len(prompt) < context]
        completions = generate(
            bundle.model,
            [prompts[at] for at in fits],
            [asked[at] for at in fits],
            stops=bundle.prompt.stops,
            decoder=bundle.tokenizer.stream,
        )
        found = [
            Written("", ended=False, trouble=f"does not fit: {len(prompt)} tokens, and the model reads {context}") for prompt in prompts
        ]
        for at, completion in zip(fits, completions, strict=True):
            found[at] = Written(completion.text or "", completion.finish_reason == "stop")
        return found
