"""Ablations: parts of a model or a run exchanged, everything else alike, and what that does to the loss.

Every variant is trained with the same seeds on the same batches in the same order, to the same budget; all are measured on
the same held-out documents, so differences are paired. A run that is there already is not made again.
"""

from __future__ import annotations

import itertools
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ..checks.bootstrap import Crossed, crossed
from ..core import config as configs
from ..core.errors import ConfigError
from ..core.log import layout, log
from ..core.spec import Spec
from ..data import rows
from ..data.batches import Batches
from ..evaluate.perplexity import document, negative_log_likelihoods
from ..io import files
from ..models import count
from ..models.presets import presets
from ..recipes.data import bank
from ..recipes.load import Bundle, load
from ..recipes.needs import foresee
from ..recipes.pretrain import Pretrain, TextRun, new, pretrain
from ..recipes.report import curves
from ..text.tokenizer import Tokenizer
from ..train import history
from ..train.loop import fit

PACE = 4  # steps that tell how long one takes, after one that is not counted


class Ablate(TextRun):
    """What is compared. `vary` entries are written PATH=VALUE,VALUE...; the first value of each is what others are compared
    with. A path starts at the model (blocks.*.mixer.position, layers) or at the run (optim, schedule.warmup, train.clip)."""

    base: str = Field("llama-5m", description="what is varied: a named shape, or a file with a model's spec")
    vary: tuple[str, ...] = Field(min_length=1, description="what is exchanged: PATH=VALUE,VALUE...; several: every combination")
    seeds: int = Field(3, gt=0, description="runs of each variant")
    budget: Literal["tokens", "flops", "minutes"] = Field("tokens", description="what every run gets as much of")
    amount: float = Field(gt=0, description="how much of it: tokens, floating-point operations, or minutes of training")
    out: str = Field("ablation", description="the folder that everything is kept in")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.validation:
            raise ValueError("validation: name held-out text, which the variants are compared on")
        return self


ALIASES = {"lr": "optim.lr", "learning_rate": "optim.lr", "output_dir": "out", "block_size": "length"}


@dataclass(frozen=True)
class Variant:
    """One combination of values: its `name`, its `config` without folder and seed, what it changes, and its steps."""

    name: str
    config: Pretrain
    changes: tuple[tuple[str, Any, Any], ...]
    steps: int
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """A variant's loss in nats per token, and the difference to the first variant (None for that one)."""

    variant: Variant
    loss: Crossed
    bits_per_byte: float
    difference: Crossed | None
    by_seed: tuple[float, ...]
    minutes: float


def ablate(config: Ablate) -> list[Measured]:
    """Train and measure all variants. Writes `table.md`, `ablation.json`, `curves.svg` and each run below `config.out`.

    Raises `ConfigError` for a path that the base does not have, `DataError` for text that cannot be used.
    """
    out = Path(config.out)
    found = plan(config)
    texts = [str(record.value["text"]) for record in rows.read(config.validation)]
    losses: dict[str, list[list[float]]] = {}
    for number, (variant, seed) in enumerate(itertools.product(found, range(config.seeds))):
        log.say(f"[{number + 1}/{len(found) * config.seeds}] {variant.name}, seed {seed}: {variant.steps} steps")
        bundle = trained(variant, out, seed)
        documents = [document(bundle.tokenizer, text) for text in texts]
        nlls = negative_log_likelihoods(bundle.model, documents, context=config.length, stride=max(1, config.length // 2))
        losses.setdefault(variant.name, []).append(nlls)
    tokens, size = [len(d.ids) - 1 for d in documents], sum(d.bytes for d in documents)
    sides = {name: crossed(values, tokens) for name, values in losses.items()}
    first = sides[found[0].name]
    measured = [
        Measured(
            variant=variant,
            loss=sides[variant.name],
            bits_per_byte=sum(map(sum, losses[variant.name])) / config.seeds / math.log(2) / size,
            difference=None if variant is found[0] else sides[variant.name] - first,
            by_seed=tuple(sum(values) / sum(tokens) for values in losses[variant.name]),
            minutes=sum(row["seconds"] for seed in range(config.seeds) for row in history.read(_folder(out, variant, seed))) / 60,
        )
        for variant in found
    ]
    _write(config, measured, out)
    return measured


def plan(config: Ablate) -> list[Variant]:
    """The variants with their steps. Nothing is trained but, for a budget of minutes, a few steps of each."""
    base = Pretrain.model_validate(
        {**{name: getattr(config, name) for name in TextRun.model_fields}, "preset": None, "model": _base(config), "out": config.out}
    )
    made = []
    axes = [_axis(base, text) for text in config.vary]
    for chosen in itertools.product(*axes):
        changed = base
        for choice in chosen:
            changed = choice.apply(changed)
        changes = configs.diff(base, changed)
        made.append(_budgeted(config, ", ".join(choice.name for choice in chosen), changed, tuple(changes)))
    names = [variant.name for variant in made]
    if len(set(names)) != len(names):
        raise ConfigError(f"vary: two variants are the same: {', '.join(names)}", field="vary")
    return made


@dataclass(frozen=True)
class Choice:
    """One value for some paths of a config."""

    name: str
    paths: tuple[str, ...]
    value: str

    def apply(self, base: Pretrain) -> Pretrain:
        """`base` with the value at each path; `none` takes out what may be absent."""
        tries = ("null", self.value) if self.value == "none" else (self.value,)
        for value in tries:
            try:
                return self._resolved(base, value)
            except ConfigError:
                if value == tries[-1]:
                    raise
        raise AssertionError

    def _resolved(self, base: Pretrain, value: str) -> Pretrain:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "base.yaml"
            path.write_text(configs.dump(base.to_dict(defaults=True)), encoding="utf-8")
            try:
                return configs.resolve(Pretrain, [path], [(name, value) for name in self.paths]).spec
            except ConfigError as error:
                text = str(error).replace(f"{path}: ", "")
                raise ConfigError(f"vary {self.name}: {text}", field="vary", value=self.name, choices=error.choices) from None


def _axis(base: Pretrain, text: str) -> list[Choice]:
    """ "blocks.*.mixer.position=rope,alibi" -> its choices."""
    path, equals, listed = text.partition("=")
    values = [value.strip() for value in re.split(r",(?![^\[{(]*[\]})])", listed)]
    if not equals or len(values) < 2 or not all(values):
        raise ConfigError(f"vary {text!r}: write PATH=VALUE,VALUE... with two values or more", field="vary", value=text)
    words = path.strip().split(".")
    if words[0] not in Pretrain.model_fields:
        words = ["model", *words]
    paths = tuple(_expand(base, words, ()))
    if not paths:
        raise ConfigError(f"vary {text!r}: the base has nothing at {path}", field="vary", value=text)
    return [Choice(f"{words[-1]}={value}", paths, value) for value in values]


def _expand(value: Any, words: Sequence[str], before: tuple[str, ...]) -> Iterator[str]:
    """The paths that `words`, in which * stands for every name, lead to. The last word must be a field that is there."""
    if not words:
        yield ".".join(before)
        return
    word = words[0]
    if isinstance(value, Spec):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        for name in value if word == "*" else (word,) if word in value else ():
            yield from _expand(value[name], words[1:], (*before, name))


def _base(config: Ablate) -> dict[str, Any]:
    """The spec that is varied, with the tokenizer's vocabulary."""
    vocab = Tokenizer.load(config.tokenizer).vocab_size
    if config.base in presets.names():
        return presets.get(config.base)().replace(vocab=vocab).to_dict()
    if not Path(config.base).is_file():
        presets.get(config.base, field="base")
    return {**configs.load(config.base).data, "vocab": vocab}


def _budgeted(config: Ablate, name: str, changed: Pretrain, changes: tuple[tuple[str, Any, Any], ...]) -> Variant:
    """How many steps the budget gives a variant, and what it is in numbers."""
    with log.hushed():
        bundle = new(changed)
        data = bank(changed.data, bundle.prompt, length=changed.length)
        planned = foresee(changed.replace(train=changed.train.replace(steps=1)), bundle.model, data).require_fits()
        tokens = round(changed.train.rows * len(data.tokens) / len(data.bins))
        match config.budget:
            case "tokens":
                steps = config.amount / tokens
            case "flops":
                steps = config.amount / planned.flops
            case "minutes":
                steps = config.amount * 60 / _pace(changed, bundle, data)
    if round(steps) < 1:
        raise ConfigError(f"amount: {config.amount:g} {config.budget} is less than one step of {name}", field="amount", value=config.amount)
    facts = {
        "parameters": planned.parameters,
        "tokens": round(steps) * tokens,
        "flops": round(steps) * planned.flops,
        "cache bytes per token": sum(count.cache_bytes(bundle.model)),
        "state bytes": sum(count.state_bytes(bundle.model)),
    }
    return Variant(name, changed, changes, round(steps), facts)


def _pace(config: Pretrain, bundle: Bundle, data: Any) -> float:
    """Seconds that one step takes here: the median of a few."""
    with tempfile.TemporaryDirectory() as folder:
        fit(
            bundle.model,
            Batches([(data, 1)], seed=0, rows=config.train.rows),
            objective=config.objective,
            optim=config.optim,
            schedule=config.schedule,
            config=config.train.replace(steps=PACE + 1, validate_every=None, save_every=None, track=()),
            directory=Path(folder),
            identity={},
        )
        seconds = sorted(row["seconds"] for row in history.read(Path(folder))[1:])
    return seconds[len(seconds) // 2]


def _folder(out: Path, variant: Variant, seed: int) -> Path:
    return out / "runs" / re.sub(r"[^\w.=-]+", "_", variant.name) / f"seed-{seed}"


def trained(variant: Variant, out: Path, seed: int) -> Bundle:
    """The variant's model of one seed, trained now or before."""
    folder = _folder(out, variant, seed)
    train = variant.config.train.replace(steps=variant.steps, seed=seed)
    config = variant.config.replace(train=train, out=str(folder), validation=())
    with log.hushed():
        return load(pretrain(config).path)


def rows_of(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """The table, a row a variant."""
    found = []
    for each in measured:
        low, high = (each.loss.interval().low, each.loss.interval().high)
        row = {
            "variant": each.variant.name,
            "loss": f"{each.loss.value:.4f} ({low:.4f} to {high:.4f})",
            "bits per byte": f"{each.bits_per_byte:.4f}",
            "against the first": "",
            "p": "",
            "parameters": f"{each.variant.facts['parameters']:,}",
            "tokens": f"{each.variant.facts['tokens']:,}",
            "PFLOP": f"{each.variant.facts['flops'] / 1e15:.4g}",
            "minutes, all seeds": f"{each.minutes:.1f}",
            "cache bytes per token": f"{each.variant.facts['cache bytes per token']:,}",
        }
        if each.difference is not None:
            between = each.difference.interval()
            row["against the first"] = f"{between.value:+.4f} ({between.low:+.4f} to {between.high:+.4f})"
            row["p"] = f"{each.difference.p():.2g}"
        found.append(row)
    return found


def _write(config: Ablate, measured: Sequence[Measured], out: Path) -> None:
    table = rows_of(measured)
    names = list(table[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names), *("| " + " | ".join(row.values()) + " |" for row in table)]
    with files.atomic_file(out / "table.md") as sink:
        sink.write(("\n".join(lines) + "\n").encode())
    facts = [
        {
            **row,
            "steps": each.variant.steps,
            "loss": each.loss.value,
            "by seed": each.by_seed,
            "difference": None if each.difference is None else each.difference.value,
            "changes": [list(change) for change in each.variant.changes],
            "facts": dict(each.variant.facts),
        }
        for row, each in zip(table, measured, strict=True)
    ]
    files.write_json(out / "ablation.json", {"config": config.to_dict(), "variants": facts})
    lines_of = {}
    for each in measured:
        runs = [history.read(_folder(out, each.variant, seed)) for seed in range(config.seeds)]
        lines_of[each.variant.name] = [
            (together[0]["step"], sum(row["loss"] for row in together) / len(together)) for together in zip(*runs, strict=True)
        ]
    with files.atomic_file(out / "curves.svg") as sink:
        sink.write(curves(lines_of, "step", "training loss, mean over seeds").encode())


def differences(measured: Sequence[Measured]) -> str:
    """What each variant's config changes in the base, as a table."""
    return layout(
        ("variant", "field", "base", "here"),
        [(each.variant.name, path, str(left), str(right)) for each in measured for path, left, right in each.variant.changes],
    )
