"""A classifier from texts and labels: a language model or an encoder gets a head for classes in the place of its own.

What is trained beside the head: nothing (feature extraction), the last layers and the final norm, everything, or an adapter.
Reported on held-out rows: accuracy, F1 of each class and of all, with intervals, and the confusion table.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from ..adapt.adapter import Adapter, with_kind
from ..adapt.freeze import Freeze
from ..adapt.passes import apply_passes
from ..core.errors import ConfigError, DataError
from ..core.log import log
from ..data import rows
from ..data.bank import Prepared
from ..data.classes import class_names, counts, cut, encoded, first_of, given, prepare_classes
from ..data.packing import packings
from ..evaluate import results
from ..evaluate.classes import Classification, scores
from ..evaluate.results import Result
from ..evaluate.task import Subject
from ..io.directory import NATIVE
from ..models.context import check_length
from ..models.transformer import TransformerModel, with_head
from ..nn.heads import LMHead
from ..nn.heads_task import Classifier, ClassifierHead, Pool, ProjectHead
from ..optim.optimizers import AdamW, Optimizer
from ..train.classes import Classes
from ..train.loop import TrainConfig
from ..train.objectives import Objective
from ..train.run import Run
from .load import Bundle, Messages, load
from .needs import announce, foresee
from .sft import ALIASES as SFT_ALIASES
from .sft import Tuning, loss_on, trained
from .task_model import family_of, padded

RESULT = "result.json"


class Classify(Tuning):
    """What one run is that trains a classifier. The resolved config is saved with the run and runs it again."""

    data: tuple[str, ...] = Field(min_length=1, description="rows of texts and labels: files, folders or globs")
    validation: tuple[str, ...] = Field((), description="held-out rows to measure on")
    out: str = Field("runs/classify", description="the run's folder")
    text: str = Field("text", description="the column of the text; without it, `messages` is read")
    label: str = Field("label", description="the column of the class: a name, or a number")
    names: tuple[str, ...] = Field(
        (), description="the classes in order; none given: the model's own, or those of the training rows, sorted"
    )
    tune: Literal["head", "last", "all"] = Field(
        "last", description="what is trained without an adapter: the head alone, the last layers and the final norm too, or everything"
    )
    last: int = Field(1, ge=1, description="how many layers are the last ones")
    adapter: Annotated[SerializeAsAny[Adapter], BeforeValidator(with_kind)] | None = Field(
        None, description="what is trained beside the frozen model and the head, instead"
    )
    pool: Pool | None = Field(
        None, description="which state stands for a text; none given: the last token's in a causal model, the first one's in an encoder"
    )
    length: int = Field(512, ge=2, description="most tokens of a text")
    packing: str = Field("none", description="none: a text a row; best_fit: as many as there is room for in `length` tokens")
    objective: SerializeAsAny[Objective] = Field(Classes(), description="what is learned")
    optim: SerializeAsAny[Optimizer] = Field(AdamW(lr=5e-4), description="the optimizer")
    train: TrainConfig = Field(TrainConfig(rows=8, epochs=3.0), description="how long and how")


ALIASES = {name: target for name, target in SFT_ALIASES.items() if name != "max_seq_length"} | {
    "max_seq_length": "length",
    "label_names": "names",
    "text_column": "text",
    "label_column": "label",
}


@dataclass(frozen=True)
class Prediction:
    """What a classifier makes of one text: the likeliest class, and the probability of every class."""

    label: str
    probability: float
    probabilities: dict[str, float]


def classify(config: Classify, *, bundle: Bundle | None = None) -> Run:
    """Train a classifier on `config.data` and save it as a model directory, `out/model`; measured on `config.validation`, whose
    result is `out/result.json`.

    `bundle`: the model, already loaded; its head is replaced. The directory is of the model's own family, as transformers'
    *ForSequenceClassification, where that can say it, else of this library's. Raises, before the first step, `DataError` for rows of
    one class, without a text or with an unknown label, `ConfigError` for what cannot be trained so.
    """
    bundle, names = classifier(config, bundle)
    train, validation = prepared(config, bundle, names)
    apply_passes(bundle.model, (*config.passes, *frozen(config, bundle.model)))
    announce(foresee(config, bundle.model, train, adapter=config.adapter))
    validate = None if validation is None else loss_on(validation, config.objective, rows=config.train.rows)
    done = trained(config, bundle, train, validate=validate, head=True, identity={"names": list(names), "tune": [config.tune, config.last]})
    path = keep(config, bundle)
    metrics = dict(done.metrics)
    if validation is None:
        log.warn("no rows were held out, so nothing says how good this classifier is; name some with --validation")
    else:
        length = config.length if config.too_long == "truncate" else None
        result = measure(
            bundle, config.validation, Path(config.out) / RESULT, text=config.text, label=config.label, length=length, name=str(path)
        )
        metrics |= {name: one.value for name, one in result.metrics.items()} | {"macro f1": result.report["macro_f1"]["value"]}
    return Run(path=path, model=bundle.model, metrics=metrics)


def plan(config: Classify, *, bundle: Bundle | None = None) -> dict[str, Any]:
    """What `classify` would do, without doing it: `data`, the classes and how many rows each has, and `needs`, in memory, disk
    and time. Raises what `classify` raises before its first step."""
    bundle, names = classifier(config, bundle)
    train, _ = prepared(config, bundle, names)
    apply_passes(bundle.model, (*config.passes, *frozen(config, bundle.model)))
    needed = foresee(config, bundle.model, train, adapter=config.adapter)
    log.table("plan", ("what", "how much"), needed.rows())
    return {"data": counts(train, names), "needs": needed.to_dict()}


def predict(model: Bundle | str | Path, texts: Sequence[str | Messages], *, length: int | None = None) -> list[Prediction]:
    """The class of each text, or conversation. `length`: longer ones are cut to so many tokens. Raises `DataError` for an empty
    text, `ConfigError` for a model that is no classifier."""
    bundle = model if isinstance(model, Bundle) else load(model)
    names, ids = names_of(bundle), []
    for number, text in enumerate(texts, start=1):
        if not text or (isinstance(text, str) and not text.strip()):
            raise DataError(f"text {number} is empty")
        found = encoded(text, bundle.prompt)
        ids.append(found if length is None else cut(found, length, bundle.prompt))
    check_length(bundle.spec.context, max(map(len, ids), default=0), what="the longest text has", field="length")
    chances = scores(bundle.model, ids, classes=len(names)).softmax(1).tolist()
    every = [dict(zip(names, row, strict=True)) for row in chances]
    return [Prediction(max(row, key=row.__getitem__), max(row.values()), row) for row in every]


def texts(data: Sequence[str], *, column: str = "text") -> tuple[list[str], list[str | Messages]]:
    """Where the rows of `data` stand, and their texts or messages. Raises `DataError`."""
    found = list(rows.read(data))
    return [record.where for record in found], [given(record, text=column) for record in found]


def measure(
    bundle: Bundle, data: Sequence[str], out: Path, *, text: str = "text", label: str = "label", length: int | None = None, name: str = ""
) -> Result:
    """How well a classifier does on the labeled rows of `data`: a result file, as `trivium eval run` writes it, with every row beside
    it. `name` is what is written there of the model."""
    task = Classification(data=tuple(data), names=names_of(bundle), text=text, label=label, length=length)
    subject = Subject(bundle.model, bundle.tokenizer, bundle.prompt)
    result, samples = results.measure(task, subject, model=name or str(bundle.path), weights=bundle.weights(), command=sys.argv)
    show(result)
    return results.save(out, result, samples)


def show(result: Result) -> None:
    """The metrics and the confusion table, on the log."""
    report, said = result.report, [(name, one.value, one.low, one.high) for name, one in result.metrics.items()]
    macro = ("macro f1", *(report["macro_f1"][part] for part in ("value", "low", "high")))
    table = [
        (name, f"{value:.4f}", "" if low is None else f"{low:.4f} to {high:.4f}") for name, value, low, high in (said[0], macro, *said[1:])
    ]
    log.table("on held-out rows", ("metric", "value", "95% interval"), table)
    names = report["names"]
    confusion = [(name, *map(str, row)) for name, row in zip(names, report["confusion"], strict=True)]
    log.table("right, below; predicted, across", ("", *names), confusion)


def classifier(config: Classify, bundle: Bundle | None) -> tuple[Bundle, tuple[str, ...]]:
    """The model with a head for the config's classes, and their names."""
    if not isinstance(config.objective, Classes):
        raise ConfigError(f"objective: {config.objective.kind!r} trains no classifier ('classes' does)", field="objective")
    packings.get(config.packing, field="packing")
    bundle = bundle or load(config.model, dtype=config.train.precision, extend=config.extend)
    if config.names:
        names = config.names
    elif isinstance(bundle.model.head, ClassifierHead):
        names = names_of(bundle)
    else:
        names = class_names(rows.read(config.data), label=config.label)
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"names: {', '.join(names)}: a classifier needs two classes at least, each named once", field="names")
    return with_class_head(bundle, names, pool=config.pool, seed=config.train.seed), names


def with_class_head(bundle: Bundle, names: Sequence[str], *, pool: Pool | None = None, seed: int) -> Bundle:
    """`bundle`, whose model has a head for `names` now, drawn by `seed`. One that has it already is kept; so is an encoder's pooler."""
    model, spec = bundle.model, bundle.spec
    causal = spec.causal
    how: Pool = pool or ("last" if causal else "first")
    if isinstance(model.head, ClassifierHead):
        if names_of(bundle) == tuple(names) and model.head.spec.pool == how:
            return bundle
        log.say(f"the head for {', '.join(names_of(bundle))} gives way to a new one for {', '.join(names)}")
    old = model.head.pooler.dense if isinstance(model.head, ProjectHead | ClassifierHead) else None
    dropout = 0.0 if causal else max(block.dropout for block in spec.blocks.values())
    with_head(model, Classifier(labels=len(names), pool=how, inner=not causal, bias=not causal, dropout=dropout), seed=seed)
    assert isinstance(model.head, ClassifierHead)
    if old is not None and model.head.pooler.dense is not None:
        model.head.pooler.dense.load_state_dict(old.state_dict())
    rest = {
        **bundle.rest,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    if bundle.family != NATIVE and isinstance(spec.head, LMHead):
        rest["tie_word_embeddings"] = spec.head.tied
    return replace(bundle, rest=rest)


def names_of(bundle: Bundle) -> tuple[str, ...]:
    """The classes of a classifier, as its config names them. Raises `ConfigError` for another model."""
    head = bundle.model.head
    if not isinstance(head, ClassifierHead):
        kind = bundle.spec.head.kind
        raise ConfigError(
            f"{bundle.path}: has a head of kind {kind!r}, not one for classes; `trivium classify train` makes it one", field="model"
        )
    told = bundle.rest.get("id2label")
    named = told if isinstance(told, Mapping) else {}
    return tuple(str(named.get(str(i), f"LABEL_{i}")) for i in range(head.spec.labels))


def prepared(config: Classify, bundle: Bundle, names: Sequence[str]) -> tuple[Prepared, Prepared | None]:
    """The training and validation rows as token banks with classes, shown on the log."""
    banks = []
    for what, paths in (("training", config.data), ("validation", config.validation)):
        if not paths:
            continue
        bank = prepare_classes(
            rows.read(paths),
            bundle.prompt,
            names=names,
            length=config.length,
            text=config.text,
            label=config.label,
            too_long=config.too_long,
            max_dropped=config.max_dropped,
            packing=config.packing,
        )
        found, longest = counts(bank, names), int(bank.index["length"].max(initial=0))
        check_length(bundle.spec.context, longest, what=f"{what} data: the longest text has", field="data")
        told = [(name, str(count)) for name, count in found.items()]
        told += [(kind, str(tally.count)) for kind in ("dropped", "truncated") if (tally := getattr(bank.facts, kind)).count]
        log.table(f"{what} data", ("class", "rows"), [*told, ("tokens", f"{len(bank.tokens)}, {longest} in the longest text")])
        banks.append(bank)
        if what == "training":
            absent = [name for name, count in found.items() if not count]
            if len(names) - len(absent) < 2:
                raise DataError(f"the training rows are all of one class; these have none: {', '.join(absent)}", field="data")
            if absent:
                log.warn(f"no training row is of the class {', '.join(absent)}")
    log.table("the first rows", ("where", "class"), first_of(banks[0], names))
    return banks[0], banks[1] if config.validation else None


def frozen(config: Classify, model: TransformerModel) -> tuple[Freeze, ...]:
    """The pass that leaves what `tune` says to be trained; none where everything is, or an adapter."""
    if config.adapter is not None or config.tune == "all":
        return ()
    if config.tune == "head":
        return (Freeze(train=("head",)),)
    norm = ("final_norm",) if any(True for _ in model.final_norm.parameters()) else ()
    return (Freeze(last=config.last, train=(*norm, "head")),)


def keep(config: Classify, bundle: Bundle) -> Path:
    """Save the classifier as `out/model`, in the model's family where that has words for it."""
    bundle = padded(bundle)
    bundle.model.passes = tuple(done for done in bundle.passes if done.lasting)
    made = bundle.since("classify", config=config.to_dict(), base=bundle.digest)
    return made.save(Path(config.out) / "model", family=family_of(bundle), overwrite=True)
