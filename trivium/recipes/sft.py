"""Supervised fine-tuning: rows and a model in, an adapter or a model out.

Reads top to bottom: load, show what the data is, prepare, train, save. Run it again in the same folder and it goes on
from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import nn

from ..adapt.adapter import Adapter, initialize_adapter, with_kind
from ..adapt.lora import LoRA
from ..adapt.passes import Pass, apply_passes
from ..core import config as configs
from ..core.errors import ConfigError
from ..core.log import log
from ..core.spec import Spec
from ..data.bank import Prepared
from ..data.batches import Batches, ordered
from ..data.inspect import inspect, paint, spans
from ..io import files, peft
from ..models.context import check_length
from ..optim.optimizers import AdamW, Optimizer
from ..optim.schedules import Cosine, Schedule
from ..train.loop import TrainConfig, fit
from ..train.objectives import NextToken, Objective
from ..train.run import Run
from .data import bank as token_bank
from .load import Bundle, load
from .needs import announce, foresee

CONFIG = "config.yaml"


class SFT(Spec):
    """What one run of supervised fine-tuning is. The resolved config is saved with the run and runs it again."""

    model: str = Field("smollm2", description="name, model directory, GGUF file or hub repository")
    extend: str | None = Field(None, description="how the model's context is made longer: KIND:FACTOR, such as yarn:4")
    data: tuple[str, ...] = Field(min_length=1, description="training rows: files, folders or globs, or one prepared folder")
    validation: tuple[str, ...] = Field((), description="rows to measure the loss on")
    out: str = Field("runs/sft", description="the run's folder")
    adapter: Annotated[SerializeAsAny[Adapter], BeforeValidator(with_kind)] | None = Field(
        LoRA(), description="what is trained beside the frozen model; null trains the model's own parameters"
    )
    passes: tuple[SerializeAsAny[Pass], ...] = Field(
        (), description="what is done to the model first, such as noise, or freeze without an adapter"
    )
    length: int = Field(1024, ge=2, description="tokens in a packed row")
    format: str | None = Field(None, description="the rows' format, if their columns do not tell")
    turns: Literal["all", "last"] = Field("all", description="which assistant turns are trained")
    too_long: Literal["drop", "truncate"] = Field("drop", description="what happens to rows longer than a packed row")
    max_dropped: int | None = Field(0, ge=0, description="how many rows may be dropped or cut; null: any number")
    max_empty: int | None = Field(0, ge=0, description="how many rows may have nothing to learn; null: any number")
    objective: SerializeAsAny[Objective] = Field(NextToken(), description="what is learned")
    optim: SerializeAsAny[Optimizer] = Field(AdamW(lr=5e-4), description="the optimizer")
    schedule: SerializeAsAny[Schedule] = Field(Cosine(warmup=0.05), description="how the learning rate moves")
    train: TrainConfig = Field(TrainConfig(rows=1), description="how long and how")


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
    bundle = bundle or load(config.model, dtype=config.train.precision, extend=config.extend)
    train, validation = prepared(config, bundle)
    apply_passes(bundle.model, config.passes)
    announce(foresee(config, bundle.model, train, adapter=config.adapter))
    if config.adapter is not None:
        config.adapter.apply(bundle.model)
        initialize_adapter(bundle.model, config.adapter.name, seed=config.train.seed)
    if not (out / CONFIG).exists():  # so that a run that is stopped can be gone on with by its config alone
        keep_config(config, out)
    done = fit(
        bundle.model.to(_dtype(config)),
        Batches([(train, 1)], seed=config.train.seed, rows=config.train.rows),
        objective=config.objective,
        optim=config.optim,
        schedule=config.schedule,
        config=config.train,
        directory=out,
        validate=None if validation is None else loss_on(validation, config.objective, rows=config.train.rows),
        identity={
            "model": bundle.spec.digest(),
            "weights": bundle.digest,
            "adapter": None if config.adapter is None else config.adapter.to_dict(),
            **({"passes": [step.to_dict() for step in config.passes]} if config.passes else {}),
        },
    )
    keep_config(config, out)
    bundle.model.eval()
    return Run(path=keep_result(config, bundle, out, step="sft"), model=bundle.model, metrics=done.metrics)


def plan(config: SFT, *, bundle: Bundle | None = None) -> dict[str, Any]:
    """What `sft` would do, without doing it: `data`, the inspection of the training rows, `size`, in steps, tokens
    and parameters, and `needs`, in memory, disk and time. Raises what `sft` raises before its first step."""
    bundle = bundle or load(config.model, dtype=config.train.precision, extend=config.extend)
    train, _ = prepared(config, bundle)
    apply_passes(bundle.model, config.passes)
    needed = foresee(config, bundle.model, train, adapter=config.adapter)
    log.table("plan", ("what", "how much"), needed.rows())
    if config.adapter is not None:
        config.adapter.apply(bundle.model)
    found = inspect(train)
    steps = config.train.steps or Batches([(train, 1)], seed=config.train.seed, rows=config.train.rows).steps(config.train.epochs)
    share = steps * config.train.rows / found.bins
    size = {
        "steps": steps,
        "epochs": round(share, 3),
        "tokens": round(share * found.tokens),
        "trained tokens": round(share * found.supervised),
        "trained parameters": sum(parameter.numel() for parameter in bundle.model.parameters() if parameter.requires_grad),
        "parameters": sum(parameter.numel() for parameter in bundle.model.parameters()),
    }
    return {"data": found.to_dict(), "size": size, "needs": needed.to_dict()}


def prepared(config: SFT, bundle: Bundle) -> tuple[Prepared, Prepared | None]:
    """The training and validation rows as token banks, shown on the log: what they are, and the labels of the first."""
    banks: list[Prepared | None] = []
    for name, paths in (("training", config.data), ("validation", config.validation)):
        if not paths:
            banks.append(None)
            continue
        bank = token_bank(
            paths,
            bundle.prompt,
            length=config.length,
            format=config.format,
            turns=config.turns,
            too_long=config.too_long,
            max_dropped=config.max_dropped,
            max_empty=config.max_empty,
        )
        log.table(f"{name} data", ("what", "value"), inspect(bank).table())
        longest = int(bank.index["length"].max(initial=0))
        check_length(bundle.spec.context, longest, what=f"{name} data: the longest row has", field="data")
        banks.append(bank)
    train, validation = banks
    if train is None:
        raise ConfigError("data: no training rows were named", field="data")
    log.say("what is learned in the first row is marked:\n" + paint(spans(train, 0, bundle.tokenizer), color=log.color))
    return train, validation


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


def _dtype(config: SFT) -> torch.dtype:
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def keep_config(config: Spec, out: Path) -> None:
    """Write the resolved config beside the run, where it runs it again."""
    out.mkdir(parents=True, exist_ok=True)
    with files.atomic_file(out / CONFIG) as sink:
        sink.write(configs.dump(config).encode())


def keep_result(config: SFT, bundle: Bundle, out: Path, *, step: str) -> Path:
    """Save what was trained: the adapter, or the model with `step` in its lineage."""
    bundle.model.passes = tuple(done for done in bundle.passes if done.lasting)
    if config.adapter is None:
        return bundle.since(step, config=config.to_dict(), base=bundle.digest).save(out / "model", overwrite=True)
    path = out / "adapter"
    base = bundle.path if bundle.path.is_dir() else None
    peft.write(
        path, bundle.model, family=bundle.family, name=config.adapter.name, base=base, base_name=str(bundle.path.resolve()),
        extend=bundle.extended, overwrite=True,
    )  # fmt: skip
    return path
