"""Preference learning: pairs of answers (or answers that were liked or not) and a model in, an adapter or a model out.

Reads top to bottom as supervised fine-tuning does, and shares its saving, resuming and planning. New are the rows, which stand in
pairs, the reference, and what is warned of: that the better answers become less likely, or that length is what is learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
from pydantic import Field, SerializeAsAny

from ..adapt.passes import apply_passes
from ..core.errors import ConfigError
from ..core.log import log
from ..data.bank import Prepared
from ..data.inspect import paint, spans
from ..optim.optimizers import AdamW, Optimizer
from ..train import history
from ..train.loop import TrainConfig
from ..train.objectives import Objective
from ..train.preference import DPO, KTO, Preference
from ..train.reference import VALUE, referred
from ..train.rewards import BradleyTerry
from ..train.run import Run
from .load import Bundle
from .mixture import Sets, mixture, say_mixture
from .needs import announce, foresee
from .sft import ALIASES as SFT_ALIASES
from .sft import SFT, fitting, keep_result, loss_on, started, trained

FALLEN = 0.02  # nats per token by which the better answers may become less likely before it is said
BIASED = 0.3  # how much more accurate a model may be where the better answer is the longer
LOPSIDED = 0.9  # share of pairs in which the same side may be the longer
SHORTEN = "take simpo or dpo with objective.per_token, or balance the rows"


class Pairs(SFT):
    """A run whose rows are pairs."""

    data: tuple[str, ...] = Field(
        min_length=1,
        description="rows of pairs, or of judged answers: files, folders or globs; FILE:2 is one set of several, with its weight",
    )
    length: int = Field(512, ge=2, description="tokens in one side of a pair; a packed row has room for two")
    max_same: int | None = Field(0, ge=0, description="how many pairs may have two sides alike, and are left out; null: any number")
    train: TrainConfig = Field(TrainConfig(rows=4), description="how long and how")


class Prefer(Pairs):
    """What one run of preference learning is. The resolved config is saved with the run and runs it again."""

    out: str = Field("runs/prefer", description="the run's folder")
    objective: SerializeAsAny[Objective] = Field(DPO(), description="the method")
    reference: Literal["auto", "adapter", "cached"] = Field(
        "auto", description="the reference: adapter (the model with it off), cached (computed once, kept on disk), or what fits"
    )
    reference_file: str | None = Field(None, description="where a cached reference is kept; none given: in the run's folder")
    optim: SerializeAsAny[Optimizer] = Field(AdamW(lr=5e-5), description="the optimizer")


ALIASES = SFT_ALIASES | {"method": "objective.kind", "loss_type": "objective.kind", "beta": "objective.beta"}


def prefer(config: Prefer, *, bundle: Bundle | None = None) -> Run:
    """Train `config.model` on the preferences in `config.data` and save the result in `config.out`.

    `bundle`: the model, already loaded, as it is to be compared with. The `Run`'s path and what can be resumed are those of
    `sft`. Raises, before the first step, `DataError` for rows that cannot be compared, `ConfigError` for an objective that does
    not take them or a reference that is not there, `FileError` for a reference of other weights.
    """
    out = Path(config.out)
    check(config)
    bundle = started(config, bundle)
    train, validation = prepared(config, bundle)
    apply_passes(bundle.model, config.passes)
    announce(foresee(config, bundle.model, stand_in(config, train), adapter=config.adapter))
    if reference_of(config) == "cached":
        train, validation = with_reference(config, bundle, train, validation)
    validate = None if validation is None else loss_on(validation, config.objective, rows=config.train.rows)
    done = trained(config, bundle, train, validate=validate, identity={"reference": reference_of(config)})
    for text in doubts(history.read(out)):
        log.warn(text)
    return Run(path=keep_result(config, bundle, out, step="prefer"), model=bundle.model, metrics=done.metrics)


def plan(config: Prefer, *, bundle: Bundle | None = None) -> dict[str, Any]:
    """What `prefer` would do, without doing it: `data`, in pairs and tokens, and `needs`, in memory, disk and time. Raises
    what `prefer` raises before it computes a reference."""
    check(config)
    bundle = started(config, bundle)
    train, _ = prepared(config, bundle)
    apply_passes(bundle.model, config.passes)
    needed = foresee(config, bundle.model, stand_in(config, train), adapter=config.adapter)
    log.table("plan", ("what", "how much"), needed.rows())
    return {"data": described(train), "needs": needed.to_dict()}


def check(config: Prefer) -> None:
    """Raises `ConfigError` for what cannot be run together."""
    if not isinstance(config.objective, Preference | KTO):
        if isinstance(config.objective, BradleyTerry):
            raise ConfigError("objective: 'bradley_terry' trains a reward model, which is trivium.recipes.reward's", field="objective")
        kinds = ", ".join(name for name, part in Objective.registry.items() if issubclass(part, Preference | KTO))
        raise ConfigError(f"objective: {config.objective.kind!r} does not learn from preferences (these do: {kinds})", field="objective")
    if config.reference == "adapter" and config.adapter is None:
        raise ConfigError("reference: without an adapter there is none to switch off; say --reference cached", field="reference")
    if config.objective.coupled and config.train.micro is not None and config.train.micro < config.train.rows:
        raise ConfigError(f"train.micro: the rows of an update cannot be taken apart: {config.objective.coupled}", field="train.micro")


def reference_of(config: Prefer) -> Literal["adapter", "cached"] | None:
    """Where the reference comes from; None: the method has none."""
    if isinstance(config.objective, Preference) and not config.objective.refers:
        return None
    if config.reference == "auto":
        return "cached" if config.adapter is None else "adapter"
    return config.reference


def prepared(config: Pairs, bundle: Bundle) -> tuple[Sets, Prepared | None]:
    """The training rows as token banks of pairs with their weights, and the validation rows, shown on the log with the first pair's
    labels."""
    train = [(_bank(config, bundle, paths, name="training"), weight) for paths, weight in mixture(config.data)]
    validation = _bank(config, bundle, config.validation, name="validation") if config.validation else None
    say_mixture(train, config.train)
    for row, what in enumerate(("learned from", "compared with it" if not isinstance(config.objective, KTO) else "its mismatch")):
        log.say(f"{what} in the first rows:\n" + paint(spans(train[0][0], row, bundle.tokenizer), color=log.color))
    return train, validation


def _bank(config: Pairs, bundle: Bundle, paths: tuple[str, ...], *, name: str) -> Prepared:
    feeds = "labels" if isinstance(config.objective, KTO) else "preference"
    bank = fitting(config, bundle, paths, what=f"{name} data: the longest side has", feeds=feeds, max_same=config.max_same)
    log.table(f"{name} data", ("what", "value"), [(what, str(value)) for what, value in facts(bank).items()])
    if (doubt := lopsided(bank)) is not None:
        log.warn(f"{name} data: {doubt}")
    return bank


def described(train: Sets) -> dict[str, Any] | list[dict[str, Any]]:
    """What a plan says of the rows: of one set its facts, of several each one's."""
    found = [facts(bank) for bank, _ in train]
    return found[0] if len(found) == 1 else found


def facts(bank: Prepared) -> dict[str, Any]:
    """What there is in a bank of pairs. Lengths are of answers, in tokens."""
    first, second = bank.index["supervised"][0::2], bank.index["supervised"][1::2]
    label = bank.values.get("label")
    found = {
        "examples": bank.facts.examples,
        "format": bank.facts.format,
        "pairs" if label is None else "judged answers": len(first),
        "tokens": len(bank.tokens),
        "packed rows": len(bank.bins),
    }
    if label is None:
        found |= {
            "mean length of chosen": round(float(first.mean()), 1),
            "mean length of rejected": round(float(second.mean()), 1),
            "chosen is longer": round(float((first > second).mean()), 3),
        }
    else:
        found |= {"liked": int((label > 0).sum()), "disliked": int((label < 0).sum())}
    for kind in ("same", "empty", "dropped", "truncated"):
        tally = getattr(bank.facts, kind)
        if tally.count:
            found[kind] = f"{tally.count}: {', '.join(tally.first)}{', ...' if tally.count > len(tally.first) else ''}"
    return found


def lopsided(bank: Prepared) -> str | None:
    """What a user should know of the lengths in a bank of pairs: that length alone would tell the sides apart. [None: nothing.]"""
    if "label" in bank.values:
        return None
    first, second = bank.index["supervised"][0::2], bank.index["supervised"][1::2]
    for share, which in ((float((first > second).mean()), "longer"), (float((first < second).mean()), "shorter")):
        if share > LOPSIDED:
            return f"the chosen answer is the {which} one in {share:.0%} of the pairs, so length alone tells them apart; balance the rows"
    return None


def stand_in(config: Prefer, train: Sets) -> Sets:
    """`train` as it will be once it has a reference, for planning: with zeros, where it is to be cached."""
    if reference_of(config) != "cached":
        return train
    return [(replace(bank, values={**bank.values, VALUE: np.zeros(len(bank), np.float32)}), weight) for bank, weight in train]


def with_reference(config: Prefer, bundle: Bundle, train: Sets, validation: Prepared | None) -> tuple[Sets, Prepared | None]:
    """The banks with the log-probabilities of `bundle`'s model, as it stands now."""
    path = Path(config.reference_file) if config.reference_file else Path(config.out) / "reference.safetensors"
    weights = bundle.weights()

    def with_its(bank: Prepared, of: str) -> Prepared:
        return referred(bundle.model, bank, path.with_name(path.stem + of + path.suffix), weights=weights, rows=config.train.rows)

    found = [(with_its(bank, f"-{number}" if number else ""), weight) for number, (bank, weight) in enumerate(train)]
    return found, None if validation is None else with_its(validation, "-validation")


def doubts(rows: Sequence[Mapping[str, Any]], *, remedy: str = SHORTEN) -> list[str]:
    """What a user should know about a run, from its metrics: its first tenth (at least one update) against its last. `remedy`: what
    helps where length is learned."""
    if len(rows) < 2:
        return []
    share = max(1, len(rows) // 10)
    first, last = rows[:share], rows[-share:]

    def mean(name: str, part: Sequence[Mapping[str, Any]]) -> float | None:
        values = [row[name] for row in part if name in row]
        return fmean(values) if values else None

    def per_token(name: str, part: Sequence[Mapping[str, Any]]) -> float | None:
        value, length = mean(name, part), mean("chosen_length", part)
        return None if value is None or not length else value / length

    found = []
    now, gain = per_token("chosen_logprob", last), per_token("chosen_gain", last)
    before = per_token("chosen_logprob", first) if now is None or gain is None else now - gain  # the reference's, of these same rows
    if now is not None and before is not None and now < before - FALLEN:
        found.append(
            f"the chosen answers became less likely: {before:.3f} nats per token at first, {now:.3f} at the end. "
            "The margin may grow all the same; raise objective.beta, lower optim.lr, or take a method that learns them too (orpo)"
        )
    longer, shorter = (mean(name, last) for name in ("accuracy_longer", "accuracy_shorter"))
    if longer is not None and shorter is not None and longer - shorter > BIASED:
        found.append(
            f"length may be what is learned: at the end {longer:.0%} of the pairs whose chosen answer is the longer are told right, and "
            f"{shorter:.0%} of those where it is the shorter; {remedy}"
        )
    return found
