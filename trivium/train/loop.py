"""The one loop: whatever is trained, `fit` trains it.

Weights are added up over the global batch before any forward, so that micro-batches of unequal size add up to the one batch exactly.
Batch i and the dropout of each forward are pure functions of the seed, so a run that was killed goes on as if it had not been,
bit for bit. Left out until something needs it: more than one process.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from ..core.config import diff
from ..core.device import dtype
from ..core.errors import ConfigError, DataError, TriviumError
from ..core.log import log
from ..core.seed import derive
from ..core.spec import Spec
from ..models.checkpointing import Recompute
from ..models.compiling import compiled
from ..models.transformer import TransformerModel
from ..optim.masters import Masters
from ..optim.optimizers import Optimizer
from ..optim.schedules import Schedule
from . import checkpoint, history
from .objectives import Objective
from .trackers import TensorBoard, Tracker, Trackers, flat

if TYPE_CHECKING:
    from ..data.batch import Batch

# What may change between a run and its resumption, because no later row or weight depends on it.
FREE = ("save_every", "keep_last", "track", "recompute")


class TrainConfig(Spec):
    """How long and how a run trains; what it trains on, with which objective, optimizer and schedule stands beside it."""

    epochs: float = Field(1.0, gt=0.0, description="passes over the data")
    steps: int | None = Field(None, gt=0, description="updates, instead of epochs")
    rows: int = Field(8, gt=0, description="rows per update")
    micro: int | None = Field(None, gt=0, description="rows per forward and backward; none given: all rows of the update at once")
    clip: float | None = Field(1.0, gt=0.0, description="largest norm of the gradient; null: not clipped")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="dtype of the model; with bf16, what is trained has fp32 masters")
    recompute: Recompute | None = Field(None, description="gradient checkpointing: what the backward computes again instead of keeping it")
    ema: float | None = Field(
        None, gt=0.0, lt=1.0, description="decay of a running mean of what is trained (0.999): the result is that mean"
    )
    seed: int = Field(0, description="of the order of the rows and of dropout")
    validate_every: int | None = Field(None, gt=0, description="updates between validations; none given: after the last one only")
    save_every: int | None = Field(None, gt=0, description="updates between checkpoints; none given: after the last one only")
    keep_last: int | None = Field(2, gt=0, description="how many checkpoints stay; null: all")
    compile: bool = Field(False, description="compile each layer's feed-forward half: slow first steps, then faster or not; measure")
    track: tuple[SerializeAsAny[Tracker], ...] = Field((TensorBoard(),), description="where numbers go beside metrics.jsonl")


class Source(Protocol):
    """Where batches come from (`data.Batches`): batch i is a pure function of `fingerprint` and i."""

    fingerprint: str

    def batch(self, i: int, /) -> Batch:
        """Batch number `i`, for any i from 0."""

    def steps(self, epochs: float, /) -> int:
        """How many batches `epochs` passes over the data are."""


@dataclass(frozen=True)
class Fit:
    """A finished run: `step` updates were made, going on from `resumed` (0: from the start). `metrics`: the last row's numbers, by name."""

    step: int
    resumed: int
    checkpoint: Path
    metrics: dict[str, float]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP: the step was finished and saved as `checkpoint`; the same call goes on from there."""

    def __init__(self, step: int, saved: Path):
        super().__init__(f"interrupted after step {step}, which is saved in {saved}; run the same again to go on")
        self.step = step
        self.checkpoint = saved


def fit(
    model: nn.Module,
    batches: Source,
    *,
    objective: Objective,
    optim: Optimizer,
    schedule: Schedule,
    config: TrainConfig,
    directory: Path | str,
    validate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Fit:
    """Trains what of `model` requires gradients, in place, and leaves checkpoints and `metrics.jsonl` in `directory`.

    If `directory` holds a checkpoint of this same run, training goes on from it; of another run, that is a `ConfigError` that
    names what differs. `identity` is what else the run depends on (JSON: hashes of weights, adapter specs). `validate` is given the
    model in eval mode without gradients. With `config.ema`, what is validated, and left in `model`, is the running mean; the last
    weights are in the last checkpoint beside it. Raises `DataError` for a batch with nothing to learn, `TriviumError` for a loss or
    gradient that is not finite, `FileError` for what cannot be written, `Interrupted` after Ctrl-C.
    """
    directory = Path(directory)
    total = config.steps or batches.steps(config.epochs)
    about = {
        "train": {key: value for key, value in config.to_dict(defaults=True).items() if key not in FREE},
        "objective": objective.to_dict(),
        "optim": optim.to_dict(),
        "schedule": schedule.to_dict(),
        "data": batches.fingerprint,
        "steps": total,
        **(identity or {}),
    }
    _ready(model, objective, config, total=total)
    faster = compiled(model) if config.compile else nullcontext()
    with checkpoint.locked(directory), _own_randomness(model), faster, _signals() as interrupted:
        checkpoint.clean(directory)
        masters = Masters(model, optim, dtype=dtype(config.precision), ema=config.ema)
        step = start = _resume(directory, masters, about, moved=objective.moved(model))
        checkpoint.prune(directory, step, keep=config.keep_last)  # the save may have been the last thing done
        update = _Update(model, masters, batches, objective=objective, schedule=schedule, config=config, total=total)
        saved = directory / f"checkpoint-{step}"
        tracked = Trackers(config.track if step < total else (), directory, step=step, config=about)
        with closing(tracked), history.History(directory, step=step) as rows, log.progress("training", total - step) as progress:
            while step < total:
                row = update(step)
                step += 1
                if validate is not None and _due(step, config.validate_every, total):
                    with masters.averaged():
                        row["validation"] = _validate(model, validate)
                rows.append(row)
                tracked.row(row)
                progress.advance(1, **{name: row[name] for name in ("loss", "targets_per_second") if name in row})
                if interrupted() or _due(step, config.save_every, total):
                    rows.sync()  # before the checkpoint that vouches for them
                    saved = _save(directory, step, masters, about, moved=objective.moved(model))
                    checkpoint.prune(directory, step, keep=config.keep_last)
                if interrupted():
                    raise Interrupted(step, saved)
        masters.settle()
    last = history.read(directory)[-1:]
    return Fit(step, start, saved, _numbers(last[0]) if last else {})


def _ready(model: nn.Module, objective: Objective, config: TrainConfig, *, total: int) -> None:
    """Sets the model to what the config says of it. Raises for what cannot be trained so; a mean in which the start of the run weighs
    much is said."""
    if config.recompute is not None and not isinstance(model, TransformerModel):
        raise ConfigError("train.recompute: only the layers of a transformer can be computed again", field="train.recompute")
    if objective.coupled and config.micro is not None and config.micro < config.rows:
        raise ConfigError(f"train.micro: the rows of an update cannot be taken apart: {objective.coupled}", field="train.micro")
    if config.ema is not None and (share := config.ema ** (total - 1)) > 0.1:
        log.warn(
            f"train.ema: after {total} updates the weights after the first one make {share:.0%} of the mean; lower it, or train longer"
        )
    if isinstance(model, TransformerModel):
        model.recompute = config.recompute


class _Update:
    """One update of the model, as a function of the number of updates already made."""

    def __init__(
        self,
        model: nn.Module,
        masters: Masters,
        batches: Source,
        *,
        objective: Objective,
        schedule: Schedule,
        config: TrainConfig,
        total: int,
    ):
        self.model, self.masters, self.batches = model, masters, batches
        self.objective, self.schedule, self.config, self.total = objective, schedule, config, total
        self.device = next(model.parameters()).device
        model.train()

    def __call__(self, step: int) -> dict[str, Any]:
        """Makes update number `step` (from 0) and returns its row of metrics."""
        began = time.perf_counter()
        batch = self.batches.batch(step)
        rows = batch.tokens.shape[0]
        micros = batch.split(math.ceil(rows / (self.config.micro or rows)))
        weights = [self.objective.weights(micro) for micro in micros]
        totals = {name: sum(weight[name] for weight in weights) for name in weights[0]}
        if empty := [name for name, weight in totals.items() if weight <= 0 and name not in self.objective.measured]:
            names = ", ".join(empty)
            raise DataError(f"batch {step} has nothing to learn: the weight of {names} is 0; look at its rows with `trivium data inspect`")
        means = self._gradients(step, micros, totals)
        norm = self.masters.clip(self.config.clip).item()
        self._check(step, {**means, "gradient norm": norm})
        factor = self.schedule.factor(step, self.total)
        self.masters.step(factor)
        self.objective.updated(self.model)
        seconds = time.perf_counter() - began
        targets, tokens = int(batch.targets.sum()), int((batch.segments >= 0).sum())
        return {
            "step": step + 1,
            **means,
            "lr": self.masters.base_lr * factor,
            "grad_norm": norm,
            "targets": targets,
            "tokens": tokens,
            "seconds": seconds,
            "targets_per_second": targets / seconds,
            "tokens_per_second": tokens / seconds,
        }

    def _gradients(self, step: int, micros: list[Batch], totals: dict[str, float]) -> dict[str, float]:
        """Adds up the gradients of the global mean of each term; returns those means."""
        sums = {name: torch.zeros((), dtype=torch.float64, device=self.device) for name in totals}
        for index, micro in enumerate(micros):
            torch.manual_seed(derive(self.config.seed, "dropout", step, index))
            terms = self.objective.terms(self.model, micro.to(self.device))
            learned = [term / totals[name] for name, term in terms.items() if name not in self.objective.measured]
            torch.stack(learned).sum().backward()
            self.masters.accumulate()
            for name, term in terms.items():
                sums[name] += term.detach()
        return {name: value.item() / totals[name] for name, value in sums.items() if totals[name]}

    def _check(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise TriviumError(
                    f"the {name} of step {step + 1} is {value}; nothing of this step was applied or saved. "
                    "Lower optim.lr, lengthen schedule.warmup, or set train.clip; the last checkpoint is whole"
                )


@torch.no_grad()
def _resume(directory: Path, masters: Masters, about: Mapping[str, Any], *, moved: Mapping[str, Tensor]) -> int:
    """Restores the newest whole checkpoint, if there is one; returns the number of updates made so far."""
    found = checkpoint.latest(directory)
    if found is None:
        return 0
    if changed := diff(found.state["about"], about):
        lines = "\n".join(f"  {path}: was {was!r}, is now {now!r}" for path, was, now in changed)
        message = f"{found.path} belongs to another run; change these back, or give another directory:\n{lines}"
        raise ConfigError(message, field=changed[0][0])
    for path, was, now in diff(found.state["machine"], _machine()):
        log.warn(f"resuming with another {path} ({was} before, {now} now): results can differ in their last bits")
    masters.load({name: found.tensors(name) for name in masters.state()})
    if moved:
        held = found.tensors("moved")
        for name, tensor in moved.items():
            tensor.copy_(held[name])
    log.say(f"going on from {found.path}")
    return found.step


def _save(directory: Path, step: int, masters: Masters, about: Mapping[str, Any], *, moved: Mapping[str, Tensor]) -> Path:
    tensors = masters.state() | ({"moved": dict(moved)} if moved else {})
    for name, tensor in tensors["parameters"].items():
        if not tensor.isfinite().all():
            raise TriviumError(f"after step {step} the parameter {name} is not finite; it was not saved. Lower optim.lr")
    return checkpoint.save(directory, step, state={"step": step, "about": about, "machine": _machine()}, tensors=tensors)


def _machine() -> dict[str, Any]:
    """What the last bits of a result depend on beside the run itself."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cpu = torch.backends.cpu.get_cpu_capability()
    return {"torch": str(torch.__version__), "threads": torch.get_num_threads(), "cpu": cpu, "cuda": cuda}


def _validate(model: nn.Module, validate: Callable[[nn.Module], Mapping[str, float]]) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        found = dict(validate(model))
    model.train()
    return found


def _due(step: int, every: int | None, total: int) -> bool:
    return step == total or (every is not None and step % every == 0)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers, those of validation as `validation.<name>`."""
    return {name: value for name, value in flat(row).items() if isinstance(value, int | float)}


@contextmanager
def _own_randomness(model: nn.Module) -> Iterator[None]:
    """Dropout draws from torch's global generators: they are given back, and the model's mode too, as they were."""
    device, training = next(model.parameters()).device, model.training
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            model.train(training)


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether SIGINT, SIGTERM or SIGHUP (the terminal went away) came. The second one acts at once. One that
    is ignored, as nohup and shells do for what runs in the background, stays ignored."""
    caught: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def handle(number: int, _frame: object) -> None:
        caught.append(number)
        for known, handler in before.items():
            signal.signal(known, handler)
        log.say("finishing this step and saving it; once more stops at once")

    if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
        heeded = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
        before.update({number: signal.signal(number, handle) for number in heeded})
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
