"""Supervised fine-tuning: rows and a model in, an adapter or a model out.

Reads top to bottom: load, show what the data is, prepare, train, save. Run it again in the same folder and it goes on
from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import nn

from ..adapt.adapter import Adapter, initialize_adapter, with_kind
from ..adapt.lora import LoRA
from ..adapt.passes import Pass, apply_passes
from ..core import config as configs
from ..core.device import dtype
from ..core.log import log
from ..core.spec import Spec
from ..data.bank import Prepared
from ..data.batches import ordered
from ..data.inspect import inspect, paint, spans
from ..io import files, peft
from ..models import count
from ..models.context import check_length
from ..optim.optimizers import AdamW, Optimizer
from ..optim.schedules import Cosine, Schedule
from ..text.named import template_of
from ..train.loop import Fit, TrainConfig, fit
from ..train.objectives import NextToken, Objective
from ..train.run import Run
from .data import bank as token_bank
from .load import Bundle, load, templated
from .mixture import Sets, batches, mixture, say_mixture
from .needs import announce, foresee

CONFIG = "config.yaml"


class Tuning(Spec):
    """What every run has that trains a model further."""

    model: str = Field("smollm2", description="name, model directory, GGUF file or hub repository")
    extend: str | None = Field(None, description="how the model's context is made longer: KIND:FACTOR, such as yarn:4")
    data: tuple[str, ...] = Field(
        min_length=1, description="training rows: files, folders or globs, or one prepared folder; as NAME:WEIGHT, sets of their own"
    )
    validation: tuple[str, ...] = Field((), description="rows to measure the loss on")
    out: str = Field("runs/sft", description="the run's folder")
    adapter: Annotated[SerializeAsAny[Adapter], BeforeValidator(with_kind)] | None = Field(
        LoRA(), description="what is trained beside the frozen model; null trains the model's own parameters"
    )
    passes: tuple[SerializeAsAny[Pass], ...] = Field(
        (), description="what is done to the model first, such as noise, or freeze without an adapter"
    )
    length: int = Field(1024, ge=2, description="tokens in a packed row")
    too_long: Literal["drop", "truncate"] = Field("drop", description="what happens to rows longer than a packed row")
    max_dropped: int | None = Field(0, ge=0, description="how many rows may be dropped or cut; null: any number")
    objective: SerializeAsAny[Objective] = Field(NextToken(), description="what is learned")
    optim: SerializeAsAny[Optimizer] = Field(AdamW(lr=5e-4), description="the optimizer")
    schedule: SerializeAsAny[Schedule] = Field(Cosine(warmup=0.05), description="how the learning rate moves")
    train: TrainConfig = Field(TrainConfig(rows=1), description="how long and how")


class SFT(Tuning):
    """What one run of supervised fine-tuning is. The resolved config is saved with the run and runs it again."""

    template: str | None = Field(
        None, description="chat template, where the model has none or is to get another: alpaca, chatml, or a file (.jinja)"
    )
    format: str | None = Field(None, description="the rows' format, if their columns do not tell")
    turns: Literal["all", "last"] = Field("all", description="which assistant turns are trained")
    max_empty: int | None = Field(0, ge=0, description="how many rows may have nothing to learn; null: any number")


ALIASES = {
    "learning_rate": "optim.lr",
    "lr": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "lora_r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.targets",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "max_grad_norm": "train.clip",
    "per_device_train_batch_size": "train.rows",
    "max_seq_length": "length",
    "max_length": "length",
    "model_name_or_path": "model",
    "output_dir": "out",
    "seed": "train.seed",
    "save_steps": "train.save_every",
    "eval_steps": "train.validate_every",
    "warmup_ratio": "schedule.warmup",
}


def sft(config: SFT, *, bundle: Bundle | None = None) -> Run:
    """Fine-tune `config.model` on `config.data` and save the result in `config.out`.

    `bundle`: the model, already loaded. The `Run`'s path is a PEFT adapter directory (`out/adapter`), or a model
    directory (`out/model`) where every parameter was trained. A run that was stopped goes on where it was.
    Raises `DataError` before the first step for rows that teach nothing, `ConfigError` for a folder of another run.
    """
    out = Path(config.out)
    bundle = started(config, bundle)
    train, validation = prepared(config, bundle)
    apply_passes(bundle.model, config.passes)
    announce(foresee(config, bundle.model, train, adapter=config.adapter))
    validate = None if validation is None else loss_on(validation, config.objective, rows=config.train.rows)
    done = trained(config, bundle, train, validate=validate)
    return Run(path=keep_result(config, bundle, out, step="sft"), model=bundle.model, metrics=done.metrics)


def started(config: SFT, bundle: Bundle | None) -> Bundle:
    """The model that a run begins with: `bundle`, or the config's, with the config's chat template."""
    bundle = bundle or load(config.model, dtype=config.train.precision, extend=config.extend)
    return bundle if config.template is None else templated(bundle, template_of(config.template))


def trained(
    config: Tuning,
    bundle: Bundle,
    train: Prepared | Sets,
    *,
    validate: Callable[[nn.Module], Mapping[str, float]] | None,
    head: bool = False,
    identity: Mapping[str, Any] | None = None,
) -> Fit:
    """Put the config's adapter on `bundle`'s model and train what is to be trained on `train`; `head`: the model's head too, beside
    an adapter. `identity`: what else the run depends on (see `fit`). The config stands beside the run before the first step, so that
    a run that is stopped can be gone on with by its config alone."""
    out = Path(config.out)
    if config.adapter is not None:
        config.adapter.apply(bundle.model)
        initialize_adapter(bundle.model, config.adapter.name, seed=config.train.seed)
        if head:
            bundle.model.head.requires_grad_(True)
    if not (out / CONFIG).exists():
        keep_config(config, out)
    done = fit(
        bundle.model.to(dtype(config.train.precision)),
        batches(train, config.train),
        objective=config.objective,
        optim=config.optim,
        schedule=config.schedule,
        config=config.train,
        directory=out,
        validate=validate,
        identity={
            "model": bundle.spec.digest(),
            "weights": bundle.digest,
            "adapter": None if config.adapter is None else config.adapter.to_dict(),
            **(identity or {}),
            **({"passes": [step.to_dict() for step in config.passes]} if config.passes else {}),
        },
    )
    keep_config(config, out)
    bundle.model.eval()
    return done


def plan(config: SFT, *, bundle: Bundle | None = None) -> dict[str, Any]:
    """What `sft` would do, without doing it: `data`, the inspection of the training rows, `size`, in steps, tokens
    and parameters, and `needs`, in memory, disk and time. Raises what `sft` raises before its first step."""
    bundle = started(config, bundle)
    train, _ = prepared(config, bundle)
    apply_passes(bundle.model, config.passes)
    needed = foresee(config, bundle.model, train, adapter=config.adapter)
    log.table("plan", ("what", "how much"), needed.rows())
    if config.adapter is not None:
        config.adapter.apply(bundle.model)
    dealer = batches(train, config.train)
    steps = config.train.steps or dealer.steps(config.train.epochs)
    found, bins = [inspect(one) for one, _ in train], dealer.dealt(steps)
    shares = [count / one.bins for count, one in zip(bins, found, strict=True)]
    size = {
        "steps": steps,
        "epochs": round(sum(bins) / sum(one.bins for one in found), 3),
        "tokens": round(sum(share * one.tokens for share, one in zip(shares, found, strict=True))),
        "trained tokens": round(sum(share * one.supervised for share, one in zip(shares, found, strict=True))),
        "trained parameters": sum(parameter.numel() for parameter in bundle.model.parameters() if parameter.requires_grad),
        "parameters": count.parameters(bundle.model).total,
    }
    told = [one.to_dict() for one in found]
    return {"data": told[0] if len(told) == 1 else told, "size": size, "needs": needed.to_dict()}


def prepared(config: SFT, bundle: Bundle) -> tuple[Sets, Prepared | None]:
    """The training rows as token banks with their weights, and the validation rows, shown on the log: what they are, and the labels of
    the first."""
    train = [(_bank(config, bundle, paths, name="training"), weight) for paths, weight in mixture(config.data)]
    validation = _bank(config, bundle, config.validation, name="validation") if config.validation else None
    say_mixture(train, config.train)
    log.say("what is learned in the first row is marked:\n" + paint(spans(train[0][0], 0, bundle.tokenizer), color=log.color))
    return train, validation


def _bank(config: SFT, bundle: Bundle, paths: tuple[str, ...], *, name: str) -> Prepared:
    bank = fitting(config, bundle, paths, what=f"{name} data: the longest row has")
    log.table(f"{name} data", ("what", "value"), inspect(bank).table())
    return bank


def fitting(config: SFT, bundle: Bundle, paths: tuple[str, ...], *, what: str, **options: Any) -> Prepared:
    """Rows as a token bank, with the config's choices and further `options`; `ConfigError`, which begins with `what`, where one is longer
    than the model's context."""
    names = ("length", "format", "turns", "too_long", "max_dropped", "max_empty")
    bank = token_bank(paths, bundle.prompt, **{name: getattr(config, name) for name in names}, **options)
    check_length(bundle.spec.context, int(bank.index["length"].max(initial=0)), what=what, field="data")
    return bank


def loss_on(bank: Prepared, objective: Objective, *, rows: int) -> Callable[[nn.Module], dict[str, float]]:
    """A validation function: each of the objective's terms over all of `bank`, weighted as training weighs them."""

    @torch.no_grad()
    def validate(model: nn.Module) -> dict[str, float]:
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        for batch in ordered(bank, rows=rows):
            batch = batch.to(next(model.parameters()).device)
            for name, weight in objective.weights(batch).items():
                weights[name] = weights.get(name, 0.0) + weight
            for name, term in objective.terms(model, batch).items():
                sums[name] = sums.get(name, 0.0) + float(term)
        return {name: sums[name] / weights[name] for name in sums if weights[name]}

    return validate


def keep_config(config: Spec, out: Path) -> None:
    """Write the resolved config beside the run, where it runs it again."""
    out.mkdir(parents=True, exist_ok=True)
    with files.atomic_file(out / CONFIG) as sink:
        sink.write(configs.dump(config).encode())


def keep_result(config: Tuning, bundle: Bundle, out: Path, *, step: str) -> Path:
    """Save what was trained: the adapter, or the model with `step` in its lineage."""
    bundle.model.passes = tuple(done for done in bundle.passes if done.lasting)
    if config.adapter is None:
        return bundle.since(step, config=config.to_dict(), base=bundle.digest).save(out / "model", overwrite=True)
    path = out / "adapter"
    base = bundle.path if bundle.path.is_dir() else None
    peft.write(
        path, bundle.model, family=bundle.family, name=config.adapter.name, base=base, base_name=str(bundle.path.resolve()),
        extend=bundle.extended, template=bundle.template, overwrite=True,
    )  # fmt: skip
    return path
