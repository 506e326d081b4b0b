"""Result files: what was measured, on what exactly, and every row's terms, so that two results can be compared row by row.

A result is one JSON file: metrics with intervals, the whole task, hashes of weights, tokenizer, template and data, the first prompt's ids,
versions, machine and command. Its samples stand beside it in JSONL. `diff` lists the settings that differ, pairs the rows by content and
gives each metric's difference with an interval, and the rows that flipped.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..checks import bootstrap
from ..checks.bootstrap import Interval, Method
from ..checks.metrics import Term
from ..core import config
from ..core.errors import DataError, FileError
from ..core.spec import Spec, validate
from ..data import rows
from ..io import files
from .task import Finish, Sample, Subject, Task

PACKAGES = ("trivium", "torch", "numpy", "tokenizers", "jinja2", "safetensors")
STATISTICS: dict[Finish, bootstrap.Statistic] = {"ratio": bootstrap.ratio, "exp_ratio": bootstrap.exp_ratio}
_PAIRED_BY = ("task", "hashes", "settings", "versions", "machine", "model")


class Measured(Spec):
    """One metric's value; `low` and `high` bound it at `level`, or are absent where one row was measured."""

    value: float
    low: float | None
    high: float | None
    level: float
    method: Method
    rows: int
    finish: Finish


class Result(Spec):
    """What a result file holds. `metrics` has the main metric first; `samples` is the name of the file beside this one."""

    format: Literal[1] = 1
    model: str
    task: Mapping[str, Any]
    metrics: Mapping[str, Measured]
    report: Mapping[str, Any]
    hashes: Mapping[str, str]
    first_prompt: tuple[int, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    command: tuple[str, ...]
    created: str
    seconds: float
    samples: str = ""


def measure(
    task: Task, subject: Subject, *, model: str, weights: str, command: Sequence[str], seed: int = 0
) -> tuple[Result, list[Sample]]:
    """Run the task. `model` names what was measured, `weights` is the hash of its weights; `seed` is the bootstrap's."""
    started = time.perf_counter()
    samples = task.run(subject, task.records())
    data = {f"data/{path.name}": files.sha256(path) for path in rows.files(task.data)}
    result = Result(
        model=model,
        task=task.to_dict(defaults=True),
        metrics=summarize(samples, task.metrics(), seed=seed),
        report=task.report(samples),
        hashes={"weights": weights, "tokenizer": subject.tokenizer.digest(), "template": subject.prompt.digest(), **data},
        first_prompt=samples[0].prompt,
        settings={
            "dtype": str(subject.model.dtype).removeprefix("torch."),
            "tokens": subject.tokens,
            "batch": subject.batch,
            "bootstrap_seed": seed,
        },
        versions=versions(),
        machine=machine(subject.model.device),
        command=tuple(command),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 3),
    )
    return result, samples


def summarize(samples: Sequence[Sample], finishes: Mapping[str, Finish], *, seed: int = 0) -> dict[str, Measured]:
    """Every metric over all samples, with BCa intervals over rows."""
    found = {}
    for name, finish in finishes.items():
        terms = np.array([sample.terms[name] for sample in samples])
        statistic = STATISTICS[finish]
        if len(terms) > 1:
            one = bootstrap.interval(terms, statistic, seed=seed)
            found[name] = Measured(**asdict(one), rows=len(terms), finish=finish)
        else:
            value = float(statistic(terms[None])[0])
            found[name] = Measured(value=value, low=None, high=None, level=0.95, method="bca", rows=len(terms), finish=finish)
    return found


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were computed on; no names of hosts or users."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": name,
    }


def save(path: Path, result: Result, samples: Sequence[Sample]) -> Result:
    """Write `path` (.json) and `<stem>.samples.jsonl` beside it; the result comes last, so that one that exists is complete."""
    if path.suffix != ".json":
        raise FileError(f"{path}: a result file ends in .json")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".samples.jsonl")
    with files.atomic_file(beside) as file:
        for sample in samples:
            file.write((json.dumps(asdict(sample), ensure_ascii=False) + "\n").encode())
    complete = result.replace(samples=beside.name)
    with files.atomic_file(path) as file:
        file.write((json.dumps(complete.to_dict(defaults=True), indent=2, ensure_ascii=False) + "\n").encode())
    return complete


def load(path: Path) -> tuple[Result, list[Sample]]:
    """A result and its samples, as `save` wrote them."""
    result: Result = validate(Result, files.read_json(path), where=str(path))
    beside = path.with_name(Path(result.samples).name)
    samples = []
    for record in rows.read(beside):
        try:
            terms = {name: Term(*map(float, term)) for name, term in record.value["terms"].items()}
            samples.append(Sample(record.value["key"], tuple(record.value["prompt"]), terms, record.value["shown"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileError(f"{record.where}: is no sample of a result: {error!r}") from None
    return result, samples


@dataclass(frozen=True)
class Flip:
    """A row whose value of `metric` went from `a` to `b`, and what each side showed."""

    key: str
    metric: str
    a: float
    b: float
    shown_a: dict[str, Any]
    shown_b: dict[str, Any]


@dataclass(frozen=True)
class Diff:
    """Two results compared: settings that differ as (path, a, b); differences b - a over the `rows` that both measured; rows that flipped."""

    settings: list[tuple[str, Any, Any]]
    rows: int
    only_a: int
    only_b: int
    metrics: dict[str, Interval]
    flips: list[Flip]


def diff(a: Path, b: Path, *, seed: int = 0) -> Diff:
    """Compare two result files. Metrics that only one of them has are left out; no row or no metric in common is a `DataError`."""
    (one, samples_a), (two, samples_b) = load(a), load(b)
    left, right = _keyed(samples_a), _keyed(samples_b)
    shared = [key for key in left if key in right]
    names = [name for name in one.metrics if name in two.metrics and one.metrics[name].finish == two.metrics[name].finish]
    if len(shared) < 2 or not names:
        raise DataError(f"{a} and {b} share {len(shared)} rows and {len(names)} metrics; a comparison needs two rows and one metric")
    metrics, flips = {}, []
    for name in names:
        terms_a, terms_b = (np.array([side[key].terms[name] for key in shared]) for side in (left, right))
        metrics[name] = bootstrap.paired(terms_a, terms_b, STATISTICS[one.metrics[name].finish], seed=seed)
    for key in shared:
        x, y = left[key], right[key]
        if _right(x.terms[names[0]]) != _right(y.terms[names[0]]):
            flips.append(Flip(key[0], names[0], _value(x.terms[names[0]]), _value(y.terms[names[0]]), x.shown, y.shown))
    settings = config.diff(*({part: getattr(side, part) for part in _PAIRED_BY} for side in (one, two)))
    return Diff(settings, len(shared), len(left) - len(shared), len(right) - len(shared), metrics, flips)


def _keyed(samples: Sequence[Sample]) -> dict[tuple[str, int], Sample]:
    """Samples by content, the n-th of equal rows as (key, n)."""
    seen: Counter[str] = Counter()
    found = {}
    for sample in samples:
        found[sample.key, seen[sample.key]] = sample
        seen[sample.key] += 1
    return found


def _value(term: Term) -> float:
    return term.numerator / term.denominator if term.denominator else 0.0


def _right(term: Term) -> bool:
    """Whether a row counts as right: all of what it could score. A row's perplexity term is neither, and never flips."""
    return term.numerator == term.denominator
