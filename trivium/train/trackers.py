"""Where a run's numbers go beside `metrics.jsonl`: TensorBoard files by default; wandb, mlflow and trackio on request.

A tracker is told the run's config once and each row as it is made. Nothing leaves the machine unless its own settings
say so: wandb is offline and mlflow a local folder by default. A tracker that fails stops the run at its start, not later.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from ..core.errors import MissingExtra
from ..core.log import log
from ..core.registry import Registry
from ..core.spec import Part
from .tensorboard import EventFile


class Sink(Protocol):
    """An open tracker."""

    def row(self, step: int, numbers: Mapping[str, float]) -> None:
        """What was measured at `step`, by dotted name."""

    def close(self) -> None: ...


class Tracker(Part, registry=Registry("tracker", "trivium.train")):
    """Root of the trackers."""

    def open(self, directory: Path, *, step: int, config: Mapping[str, Any]) -> Sink:
        """Start tracking the run in `directory`, which has made `step` steps. Raises `MissingExtra`."""
        raise AssertionError


class TensorBoard(Tracker):
    """Event files in the run's folder: tensorboard --logdir runs"""

    kind: Literal["tensorboard"] = "tensorboard"

    def open(self, directory: Path, *, step: int, config: Mapping[str, Any]) -> Sink:
        return _TensorBoard(EventFile(directory / "tensorboard", step=step))


class _TensorBoard:
    def __init__(self, file: EventFile):
        self.file = file

    def row(self, step: int, numbers: Mapping[str, float]) -> None:
        self.file.scalars(step, numbers)

    def close(self) -> None:
        self.file.close()


class Wandb(Tracker):
    """Weights & Biases. `offline` writes into the run's folder; `wandb sync` sends it when you say so."""

    kind: Literal["wandb"] = "wandb"
    project: str = Field("trivium", description="where runs are gathered")
    mode: Literal["offline", "online"] = Field("offline", description="online sends every row to wandb's servers")

    def open(self, directory: Path, *, step: int, config: Mapping[str, Any]) -> Sink:
        wandb = _need("wandb")
        run = wandb.init(project=self.project, name=directory.name, dir=str(directory), mode=self.mode, config=dict(config), resume="allow")
        return _Wandb(run)


class _Wandb:
    def __init__(self, run: Any):
        self.run = run

    def row(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step, commit=True)

    def close(self) -> None:
        self.run.finish()


class Mlflow(Tracker):
    """MLflow, in a local folder or on a server of yours."""

    kind: Literal["mlflow"] = "mlflow"
    uri: str | None = Field(None, description="tracking server or folder; a folder in the run's own by default")
    experiment: str = Field("trivium", description="where runs are gathered")

    def open(self, directory: Path, *, step: int, config: Mapping[str, Any]) -> Sink:
        mlflow = _need("mlflow")
        client = mlflow.MlflowClient(tracking_uri=self.uri or f"sqlite:///{(directory / 'mlflow.db').resolve()}")
        found = client.get_experiment_by_name(self.experiment)
        experiment = found.experiment_id if found else client.create_experiment(self.experiment)
        run = client.create_run(experiment, run_name=directory.name)
        for name, value in flat(config).items():
            client.log_param(run.info.run_id, name, str(value)[:500])
        return _Mlflow(client, run.info.run_id)


class _Mlflow:
    def __init__(self, client: Any, run: str):
        self.client, self.run = client, run

    def row(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.client.log_metric(self.run, name, value, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.run)


class Trackio(Tracker):
    """Trackio, Hugging Face's local dashboard: trackio show"""

    kind: Literal["trackio"] = "trackio"
    project: str = Field("trivium", description="where runs are gathered")

    def open(self, directory: Path, *, step: int, config: Mapping[str, Any]) -> Sink:
        trackio = _need("trackio")
        return _Trackio(trackio.init(project=self.project, name=directory.name, config=dict(config), resume="allow"))


class _Trackio:
    def __init__(self, run: Any):
        self.run = run

    def row(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        self.run.finish()


def _need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingExtra(package, package, f"tracking with {package}") from None


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted name."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = value
    return found


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers by dotted name, its step left out."""
    return {name: float(value) for name, value in flat(row).items() if name != "step" and isinstance(value, int | float)}


class Trackers:
    """All of a run's sinks. One that fails once training runs is said and left; the run goes on."""

    def __init__(self, trackers: tuple[Tracker, ...], directory: Path, *, step: int, config: Mapping[str, Any]):
        self.sinks = {tracker.kind: tracker.open(directory, step=step, config=config) for tracker in trackers}

    def row(self, row: Mapping[str, Any]) -> None:
        for kind, sink in list(self.sinks.items()):
            try:
                sink.row(row["step"], numbers(row))
            except Exception as error:
                log.warn(f"tracking with {kind} failed and is over for this run: {error}")
                del self.sinks[kind]

    def close(self) -> None:
        for sink in self.sinks.values():
            sink.close()
