"""Pretraining: text, a tokenizer and a shape in, a model of one's own out.

Reads top to bottom: build, prepare, train, save. At each validation the model completes a few prompts, and the best
model so far is kept as a directory of its own. Run it again in the same folder and it goes on from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, SerializeAsAny
from torch import nn

from ..core.errors import ConfigError
from ..core.log import log
from ..core.spec import Spec
from ..data.inspect import inspect
from ..infer.generate import generate
from ..infer.sampling import Sampling
from ..io.directory import NATIVE
from ..io.hf import families
from ..models.presets import presets
from ..models.transformer import Transformer, build, initialize
from ..optim.optimizers import AdamW, Optimizer
from ..optim.schedules import Cosine, Schedule
from ..text.prompt import Prompt
from ..text.tokenizer import Tokenizer
from ..train import history
from ..train.loop import TrainConfig, fit
from ..train.objectives import NextToken, Objective
from ..train.run import Run
from .data import bank
from .load import Bundle
from .mixture import batches, mixture, say_mixture
from .needs import Plan, announce, foresee, machine_rates
from .sft import CONFIG, keep_config, loss_on


class TextRun(Spec):
    """Training on text, but for the model that is trained."""

    tokenizer: str = Field(description="directory or tokenizer.json")
    data: tuple[str, ...] = Field(
        min_length=1, description="training text: files, folders or globs, or one prepared folder; NAME:WEIGHT makes sets"
    )
    validation: tuple[str, ...] = Field((), description="text to measure the loss on")
    out: str = Field("runs/pretrain", description="the run's folder")
    length: int = Field(512, ge=2, description="tokens in a row")
    std: float = Field(0.02, gt=0, description="standard deviation of the first weights")
    objective: SerializeAsAny[Objective] = Field(NextToken(), description="what is learned")
    optim: SerializeAsAny[Optimizer] = Field(AdamW(lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1), description="the optimizer")
    schedule: SerializeAsAny[Schedule] = Field(Cosine(warmup=0.05, minimum=0.1), description="how the learning rate moves")
    train: TrainConfig = Field(TrainConfig(rows=16), description="how long and how")
    samples: tuple[str, ...] = Field((), description="texts that the model completes at each validation")


class Pretrain(TextRun):
    """What one pretraining run is. The resolved config is saved with the run and runs it again."""

    preset: str | None = Field("llama-5m", description="a named shape; its vocabulary becomes the tokenizer's")
    model: Transformer | None = Field(None, description="a shape of one's own, instead of a preset")


ALIASES = {
    "learning_rate": "optim.lr",
    "lr": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "max_grad_norm": "train.clip",
    "per_device_train_batch_size": "train.rows",
    "block_size": "length",
    "max_length": "length",
    "output_dir": "out",
    "seed": "train.seed",
    "save_steps": "train.save_every",
    "eval_steps": "train.validate_every",
    "warmup_ratio": "schedule.warmup",
}


def pretrain(config: Pretrain) -> Run:
    """Train a new model and save it as `out/model`; with validation, the best one so far is `out/best`.

    The `Run`'s path is `out/model`. A run that was stopped goes on where it was. Raises `ConfigError` for a shape that does
    not fit its tokenizer and for a folder of another run, `DataError` for text that cannot be used.
    """
    out = Path(config.out)
    bundle = new(config)
    train = [(bank(paths, bundle.prompt, length=config.length), weight) for paths, weight in mixture(config.data)]
    for one, _ in train:
        log.table("training data", ("what", "value"), inspect(one).table())
    say_mixture(train, config.train)
    validation = bank(config.validation, bundle.prompt, length=config.length) if config.validation else None
    planned = announce(foresee(config, bundle.model, train))
    if not (out / CONFIG).exists():  # so that a run that is stopped can be gone on with by its config alone
        keep_config(config, out)
    done = fit(
        bundle.model,
        batches(train, config.train),
        objective=config.objective,
        optim=config.optim,
        schedule=config.schedule,
        config=config.train,
        directory=out,
        validate=None if validation is None else _measured(config, bundle, loss_on(validation, config.objective, rows=config.train.rows)),
        identity={"model": bundle.spec.digest(), "tokenizer": bundle.tokenizer.digest(), "std": config.std},
    )
    keep_config(config, out)
    bundle.model.eval()
    metrics = {**done.metrics, "mfu": utilization(planned, history.read(out))}
    log.say(f"matrix products ran at {metrics['mfu']:.1%} of the rate that this machine reached when it was measured (MFU)")
    bundle.since("pretrain", config=config.to_dict(), metrics=metrics).save(out / "model", overwrite=True)
    return Run(path=out / "model", model=bundle.model, metrics=metrics)


def utilization(planned: Plan, rows: Sequence[Mapping[str, Any]]) -> float:
    """Model FLOPs utilization: the products that the run's `rows` (of metrics.jsonl) needed, per second, as a share of the
    measured rate of this machine's matrix products; what is computed twice does not count as more."""
    training, seconds = planned.training, sum(row["seconds"] for row in rows)
    return planned.flops * len(rows) / training.steps / seconds / machine_rates()[training.train.precision]


def plan(config: Pretrain) -> dict[str, int]:
    """What `pretrain` would do: steps, tokens and parameters. Raises what it raises before its first step."""
    bundle = new(config)
    sets = [(bank(paths, bundle.prompt, length=config.length), weight) for paths, weight in mixture(config.data)]
    dealer = batches(sets, config.train)
    steps = config.train.steps or dealer.steps(config.train.epochs)
    return {
        "parameters": sum(parameter.numel() for parameter in bundle.model.parameters()),
        "steps": steps,
        "tokens": round(sum(bins / len(one.bins) * len(one.tokens) for (one, _), bins in zip(sets, dealer.dealt(steps), strict=True))),
    }


def new(config: Pretrain) -> Bundle:
    """The model that `config` says, freshly drawn, with its text side."""
    tokenizer = Tokenizer.load(config.tokenizer)
    spec = shape(config, tokenizer)
    model = initialize(build(spec, device="cpu"), seed=config.train.seed, std=config.std)
    return Bundle(
        model=model,
        tokenizer=tokenizer,
        prompt=Prompt.of(tokenizer, None),
        path=Path(config.out),
        family=family_of(spec),
        rest={},
        generation_config=None if tokenizer.eos is None else {"eos_token_id": tokenizer.eos},
    )


def shape(config: Pretrain, tokenizer: Tokenizer) -> Transformer:
    """The spec: the preset with the tokenizer's vocabulary, or the config's own, which must have room for it."""
    if (config.preset is None) == (config.model is None):
        raise ConfigError("say either a preset or a model of your own (--preset null)", field="preset")
    if config.model is None:
        assert config.preset is not None
        return presets.get(config.preset, field="preset")().replace(vocab=tokenizer.vocab_size)
    if config.model.vocab < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab: {config.model.vocab} rows for a tokenizer of {tokenizer.vocab_size} tokens",
            field="model.vocab",
            value=config.model.vocab,
        )
    return config.model


def family_of(spec: Transformer) -> str:
    """The model_type that can express `spec`, so that others can load what was trained; our own if none can."""
    for name, family in families.items():
        try:
            family.to_hf(spec, {})
        except ConfigError:
            continue
        return name
    return NATIVE


def _measured(
    config: Pretrain, bundle: Bundle, loss: Callable[[nn.Module], dict[str, float]]
) -> Callable[[nn.Module], Mapping[str, float]]:
    """Validation: the loss; the best model so far is kept, and completes the samples."""
    out = Path(config.out)
    before = [row["validation"]["loss"] for row in history.read(out) if "validation" in row]
    best = min(before, default=float("inf"))

    def validate(model: nn.Module) -> dict[str, float]:
        nonlocal best
        found = loss(model)
        if found["loss"] < best:
            best = found["loss"]
            bundle.since("pretrain", config=config.to_dict(), validation=found).save(out / "best", overwrite=True)
        for text in config.samples:
            log.say(f"  {text}\u2026{complete(bundle, text)}")
        return found

    return validate


def complete(bundle: Bundle, text: str, *, tokens: int = 48) -> str:
    """A greedy continuation of `text`."""
    sampling: Any = Sampling(temperature=0, max_tokens=tokens)
    ids = bundle.tokenizer.encode(text)
    return generate(bundle.model, [ids], sampling, stops=bundle.prompt.stops, decoder=bundle.tokenizer.stream)[0].text or ""
