"""A reward model from pairs: the same model with a `reward` head in the place of its own, trained so that what was chosen gets
the higher number. Reported on held-out pairs: accuracy, and calibration, how far its confidence can be trusted.

An ensemble is several runs with other seeds, which draw other heads and see the rows in other orders; `train.rewards.pessimistic`
puts their numbers together.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from ..adapt.adapter import initialize_adapter
from ..adapt.passes import apply_passes
from ..core.device import dtype
from ..core.errors import ConfigError
from ..core.log import log
from ..core.seed import generator
from ..data.bank import Prepared
from ..data.batches import Batches, ordered
from ..io import directory
from ..io.tensors import Lazy
from ..models.transformer import build
from ..nn.heads_task import Reward, RewardHead
from ..optim.optimizers import AdamW, Optimizer
from ..train.logprobs import pairs_of
from ..train.loop import fit
from ..train.objectives import Objective
from ..train.reference import at_rest
from ..train.rewards import BradleyTerry, calibration_error, document_rewards
from ..train.run import Run
from .load import Bundle, load
from .needs import announce, foresee
from .prefer import Pairs, prepared
from .sft import CONFIG, keep_config


class RewardModel(Pairs):
    """What one run is that trains a reward model. The resolved config is saved with the run and runs it again."""

    out: str = Field("runs/reward", description="the run's folder")
    objective: SerializeAsAny[Objective] = Field(BradleyTerry(), description="what is learned")
    optim: SerializeAsAny[Optimizer] = Field(AdamW(lr=1e-4), description="the optimizer")


def reward(config: RewardModel, *, bundle: Bundle | None = None) -> Run:
    """Train a reward model on the pairs in `config.data` and save it, adapter included, as a model directory in `config.out`.

    The `Run`'s metrics hold `validation.accuracy` and `validation.calibration_error`, if there are rows to validate on. Raises
    what `prefer` raises.
    """
    out = Path(config.out)
    if not isinstance(config.objective, BradleyTerry):
        raise ConfigError(f"objective: {config.objective.kind!r} trains no reward model (bradley_terry does)", field="objective")
    given = bundle or load(config.model, dtype=config.train.precision, extend=config.extend)
    bundle = with_reward_head(given, seed=config.train.seed)
    train, validation = prepared(config, bundle)
    apply_passes(bundle.model, config.passes)
    announce(foresee(config, bundle.model, train, adapter=config.adapter))
    if config.adapter is not None:
        config.adapter.apply(bundle.model)
        initialize_adapter(bundle.model, config.adapter.name, seed=config.train.seed)
        bundle.model.head.requires_grad_(True)
    if not (out / CONFIG).exists():
        keep_config(config, out)
    done = fit(
        bundle.model.to(dtype(config.train.precision)),
        Batches([(train, 1)], seed=config.train.seed, rows=config.train.rows),
        objective=config.objective,
        optim=config.optim,
        schedule=config.schedule,
        config=config.train,
        directory=out,
        validate=None if validation is None else lambda model: judged(model, validation, rows=config.train.rows),
        identity={
            "model": bundle.spec.digest(),
            "weights": bundle.digest,
            "adapter": None if config.adapter is None else config.adapter.to_dict(),
            **({"passes": [step.to_dict() for step in config.passes]} if config.passes else {}),
        },
    )
    keep_config(config, out)
    bundle.model.eval()
    bundle.model.passes = tuple(done for done in bundle.passes if done.lasting)
    made = bundle.since("reward", config=config.to_dict(), base=bundle.digest)
    path = made.save(out / "model", family=directory.NATIVE, overwrite=True)
    if validation is not None and "validation.accuracy" in done.metrics:
        told = (done.metrics[f"validation.{name}"] for name in ("accuracy", "calibration_error"))
        log.say("on held-out pairs: accuracy {:.3f}, calibration error {:.3f}".format(*told))
    return Run(path=path, model=bundle.model, metrics=done.metrics)


def with_reward_head(bundle: Bundle, *, seed: int) -> Bundle:
    """`bundle` with a reward head in the place of its own; every other tensor is shared. One that has such a head is kept."""
    old = bundle.model
    if isinstance(old.head, RewardHead):
        return bundle
    model = apply_passes(build(old.spec.replace(head=Reward())), bundle.passes)
    drawn = torch.randn(1, old.spec.dim, generator=generator(seed, "reward head")) / (old.spec.dim + 1) ** 0.5
    kept = {name: parameter.detach() for name, parameter in old.named_parameters() if not name.startswith("head.")}
    tensors = {**kept, "head.out.weight": drawn.to(old.dtype)}
    directory.fill(model, {name: Lazy.of(tensor) for name, tensor in tensors.items()}, device=old.device)
    return replace(bundle, model=model.eval(), family=directory.NATIVE)


def margins(model: nn.Module, pairs: Prepared, *, rows: int) -> Tensor:
    """Reward of chosen minus reward of rejected for each pair, [P] on the CPU, in the order of the bins."""
    device = next(model.parameters()).device
    with at_rest(model):
        found = [pairs_of(document_rewards(model, batch.to(device)), batch.to(device)) for batch in ordered(pairs, rows=rows)]
    return torch.cat([chosen - rejected for chosen, rejected in found]).cpu()


def judged(model: nn.Module, pairs: Prepared, *, rows: int) -> dict[str, float]:
    """What a reward model makes of held-out pairs."""
    found = margins(model, pairs, rows=rows)
    return {
        "accuracy": float((found > 0).double().mean()),
        "calibration_error": calibration_error(found),
        "loss": float(-torch.nn.functional.logsigmoid(found).mean()),
        "margin": float(found.mean()),
    }
