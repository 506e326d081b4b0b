"""A reward model from pairs: the same model with one number at the end of an answer in the place of its head, trained so that what
was chosen gets the higher one. Reported on held-out pairs: accuracy, and calibration, how far its confidence can be trusted.

It is saved as transformers' *ForSequenceClassification of one label where the family has one, with the adapter merged into it. An
ensemble is several runs with other seeds, which draw other heads and see the rows in other orders; `score` uses any of them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from ..adapt.adapter import adapters, merge
from ..adapt.passes import apply_passes
from ..core.errors import ConfigError
from ..core.log import log
from ..core.seed import generator
from ..data.bank import Prepared
from ..io import directory, files
from ..io.tensors import Lazy
from ..models.transformer import build
from ..nn.heads_task import Classifier, ClassifierHead, RewardHead
from ..optim.optimizers import AdamW, Optimizer
from ..train import history
from ..train.objectives import Objective
from ..train.rewards import BradleyTerry, calibration_error, reliability, rewards_of
from ..train.run import Run
from .load import Bundle
from .needs import announce, foresee
from .prefer import Pairs, described, doubts, prepared
from .sft import ALIASES as SFT_ALIASES
from .sft import keep_config, started, trained
from .task_model import family_of, padded

ENSEMBLE = "ensemble.json"
HEAD = Classifier(labels=1, pool="last", bias=False)  # what transformers' classes for it read

ALIASES = SFT_ALIASES | {"center_rewards_coefficient": "objective.center"}


class RewardModel(Pairs):
    """What one run is that trains a reward model. The resolved config is saved with the run and runs it again."""

    out: str = Field("runs/reward", description="the run's folder")
    objective: SerializeAsAny[Objective] = Field(BradleyTerry(), description="what is learned")
    optim: SerializeAsAny[Optimizer] = Field(AdamW(lr=1e-4), description="the optimizer")
    members: int = Field(1, ge=1, description="how many models, each with a seed of its own: where they disagree, none is sure")


def reward(config: RewardModel, *, bundle: Bundle | None = None) -> Run:
    """Train a reward model on the pairs in `config.data` and save it as a model directory, `out/model`; of several members, as
    `out/member-N/model` and a file that lists them, in `out`, which is then the `Run`'s path.

    The `Run`'s metrics hold `validation.accuracy` and `validation.calibration_error`, of what was saved (of several members, of
    their mean), if there are rows to validate on; `calibration.json` has the table. Raises what `prefer` raises.
    """
    check(config)
    if config.members == 1:
        return _trained(config, started(config, bundle))[0]
    out, members, found = Path(config.out), [], []
    for number in range(config.members):
        own = started(config, bundle)
        own = replace(own, model=copy.deepcopy(own.model)) if bundle else own
        one = config.replace(members=1, out=str(out / f"member-{number}"), train=config.train.replace(seed=config.train.seed + number))
        run, given = _trained(one, own)
        members.append({"path": str(run.path.relative_to(out)), "mean": float(given.mean())})
        found.append(given - given.mean())
    keep_config(config, out)
    files.write_json(out / ENSEMBLE, {"members": members})
    metrics = dict(run.metrics)
    if config.validation:
        centered = torch.stack(found)
        margins = centered[:, 0::2] - centered[:, 1::2]
        metrics |= _told(margins.mean(0), out, what=f"on held-out pairs, {config.members} members together")
        metrics["validation.agreement"] = float(((margins > 0).double().mean(0) - 0.5).abs().eq(0.5).double().mean())
        log.say(f"all members agree on {metrics['validation.agreement']:.1%} of the pairs")
    return Run(path=out, model=run.model, metrics=metrics)


def plan(config: RewardModel, *, bundle: Bundle | None = None) -> dict[str, Any]:
    """What `reward` would do for each member, without doing it: `data`, in pairs and tokens, and `needs`."""
    check(config)
    given = started(config, bundle)
    bundle = with_reward_head(given, seed=config.train.seed)
    train, _ = prepared(config, bundle)
    apply_passes(bundle.model, config.passes)
    needed = foresee(config, bundle.model, train, adapter=config.adapter)
    log.table("plan", ("what", "how much"), needed.rows())
    return {"data": described(train), "needs": needed.to_dict()}


def check(config: RewardModel) -> None:
    """Raises `ConfigError` for an objective that trains something else."""
    if not isinstance(config.objective, BradleyTerry):
        raise ConfigError(f"objective: {config.objective.kind!r} trains no reward model (bradley_terry does)", field="objective")


def _trained(config: RewardModel, given: Bundle) -> tuple[Run, Tensor]:
    """One member; and the rewards of the held-out rows, or of the (first) training set where there are none."""
    out = Path(config.out)
    bundle = with_reward_head(given, seed=config.train.seed)
    train, validation = prepared(config, bundle)
    apply_passes(bundle.model, config.passes)
    announce(foresee(config, bundle.model, train, adapter=config.adapter))
    validate = None if validation is None else lambda model: judged(model, validation, rows=config.train.rows)
    done = trained(config, bundle, train, validate=validate, head=True)
    for text in doubts(history.read(out), remedy="balance the rows"):
        log.warn(text)
    bundle.model.passes = tuple(step for step in bundle.passes if step.lasting)
    if config.adapter is not None:
        _merged(bundle, probe=train[0][0])
    bundle = padded(bundle)
    made = bundle.since("reward", config=config.to_dict(), base=bundle.digest)
    path = made.save(out / "model", family=family_of(bundle), overwrite=True)
    found = rewards_of(bundle.model, validation or train[0][0], rows=config.train.rows)
    metrics = dict(done.metrics)
    if validation is not None:
        metrics |= _told(found[0::2] - found[1::2], out, what="on held-out pairs")
    return Run(path=path, model=bundle.model, metrics=metrics), found


def with_reward_head(bundle: Bundle, *, seed: int) -> Bundle:
    """`bundle` with one number for each document in the place of its head; every other tensor is shared. One that has such a head, or
    one number at each token, is kept."""
    old = bundle.model
    if gives_rewards(bundle):
        return bundle
    model = apply_passes(build(old.spec.replace(head=HEAD)), bundle.passes)
    drawn = torch.randn(1, old.spec.dim, generator=generator(seed, "reward head")) / (old.spec.dim + 1) ** 0.5
    kept = {name: parameter.detach() for name, parameter in old.named_parameters() if not name.startswith("head.")}
    tensors = {**kept, "head.out.weight": drawn.to(old.dtype)}
    directory.fill(model, {name: Lazy.of(tensor) for name, tensor in tensors.items()}, device=old.device)
    return replace(bundle, model=model.eval())


def gives_rewards(bundle: Bundle) -> bool:
    """Whether the model's head gives a reward: one number for each document, or at each token."""
    head = bundle.model.head
    return isinstance(head, RewardHead) or (isinstance(head, ClassifierHead) and head.spec.labels == 1)


def judged(model: nn.Module, pairs: Prepared, *, rows: int) -> dict[str, float]:
    """What a reward model makes of held-out pairs."""
    found = rewards_of(model, pairs, rows=rows)
    return verdict(found[0::2] - found[1::2])


def verdict(margins: Tensor) -> dict[str, float]:
    """margins [P]: reward of chosen minus reward of rejected."""
    return {
        "accuracy": float((margins > 0).double().mean()),
        "calibration_error": calibration_error(margins),
        "loss": float(-torch.nn.functional.logsigmoid(margins).mean()),
        "margin": float(margins.mean()),
    }


def show(margins: Tensor, *, what: str) -> None:
    """Accuracy and the reliability table on the log."""
    found = verdict(margins)
    log.say(f"{what}: accuracy {found['accuracy']:.3f}, calibration error {found['calibration_error']:.3f}")
    cells = [(f"{r.low:.2f} to {r.high:.2f}", r.pairs, f"{r.confidence:.3f}", f"{r.accuracy:.3f}") for r in reliability(margins)]
    log.table("how sure it is, and how often right", ("confidence", "pairs", "mean confidence", "accuracy"), cells)


def _told(margins: Tensor, out: Path, *, what: str) -> Mapping[str, float]:
    """Shown, written beside the run, and as metrics."""
    show(margins, what=what)
    found = verdict(margins)
    files.write_json(out / "calibration.json", {**found, "reliability": [asdict(row) for row in reliability(margins)]})
    return {f"validation.{name}": value for name, value in found.items()}


def _merged(bundle: Bundle, *, probe: Prepared) -> None:
    """Put the adapter into the weights, where weights can say it; what that moves is measured on the first pair of `probe`."""
    (name,) = list(adapters(bundle.model))[-1:]
    first, second = (torch.from_numpy(probe.row(row)[0].astype("int64")) for row in (0, 1))
    width = min(len(first), len(second))
    tokens = torch.stack([first[:width], second[:width]]).to(bundle.model.device)
    try:
        found = merge(bundle.model, name, probe=tokens)
    except ConfigError as error:
        log.say(f"{error}; it is kept beside the base, in trivium's own format")
        return
    log.say(f"merged {found.maps} maps: rewards moved by at most {found.max_logit_difference:.2g} on the first pair")
