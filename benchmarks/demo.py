"""The demo's gain on several seeds: what the untaught model, the taught model and look-up get, and how long teaching took.

Each seed draws its own data, adapter and order, in a fresh process and a folder of its own. Exact match is the figure that counts.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from trivium.core.log import layout

from . import common
from .common import Row

METRIC = "exact_match"
BEFORE, AFTER, BASELINE, SECONDS = 0.10, 0.80, 0.20, 300.0  # the goals: under, over, under, at most


class Run:
    """One run of the demo, as `trivium demo` makes it."""

    def __init__(self, *, threads: int):
        import torch

        torch.set_num_threads(threads)

    def demo(self, *, config: dict[str, Any]) -> dict[str, Any]:
        from trivium.core.spec import validate
        from trivium.recipes.demo import Demo, demo

        return json.loads(json.dumps(demo(validate(Demo, config)), default=str))


def _interval(measured: dict[str, Any]) -> str:
    value, low, high = (measured[key] for key in ("value", "low", "high"))
    return f"{value:.1%}" if low is None else f"{value:.1%} ({low:.1%} to {high:.1%})"


def main() -> None:
    parser = common.with_model(common.arguments(__doc__, rounds=1))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs (default: 0 1 2)")
    parser.add_argument("--out", type=Path, help="keep the runs here, and go on with what is there (default: a temporary folder)")
    options = parser.parse_args()
    machine = common.machine()
    sizes: dict[str, Any] = {}
    if options.quick:
        options.seeds, sizes = options.seeds[:1], {"train_rows": 8, "test_rows": 4, "length": 256}
    with tempfile.TemporaryDirectory(prefix="trivium-bench-") as scratch:
        root = Path(options.out or scratch).resolve()
        runs, peaks = {}, {}
        for seed in options.seeds:
            config = {"model": common.located(options.model), "out": str(root / f"seed-{seed}"), "seed": seed, **sizes}
            with common.Worker("benchmarks.demo:Run", threads=options.threads, options={"threads": options.threads}) as worker:
                runs[seed], peaks[seed] = worker.call("demo", config=config), worker.peak()
    _report(options, runs, peaks, machine)


def _report(options: Any, runs: dict[int, dict[str, Any]], peaks: dict[int, float], machine: dict[str, Any]) -> None:
    lines = [
        (
            seed,
            _interval(run["before"][METRIC]),
            _interval(run["after"][METRIC]),
            _interval(run["baseline"]),
            "yes" if run["gain"]["outside_intervals"] else "NO",
            run["seconds"]["teach"],
            round(sum(run["seconds"].values()), 1),
            run["answer"]["answer"],
        )
        for seed, run in runs.items()
    ]
    columns = ("seed", "before", "after", "look-up", "outside intervals", "teaching, s", "whole demo, s", "an answer")
    print("\nexact match (95% interval), by seed\n\n" + layout(columns, lines))
    figures = [
        Row("exact match before", "share", "less", [run["before"][METRIC]["value"] for run in runs.values()], goal=BEFORE),
        Row("exact match after", "share", "more", [run["after"][METRIC]["value"] for run in runs.values()], goal=AFTER),
        Row("exact match of look-up", "share", "less", [run["baseline"]["value"] for run in runs.values()], goal=BASELINE),
        Row("teaching", "s", "less", [run["seconds"]["teach"] for run in runs.values()], goal=SECONDS),
        Row("whole demo", "s", "less", [sum(run["seconds"].values()) for run in runs.values()]),
        Row("peak memory", "MB", "less", list(peaks.values())),
    ]
    facts = {f"metrics, seed {seed}": {name: {key: run[name][key]["value"] for key in run[name]} for name in ("before", "after")} for seed, run in runs.items()}
    notes = [
        "the table's spreads are over seeds; the goals hold for the median here, and the table by seed shows each",
        "teaching is the whole of `sft`: tokenizing, loading, training, validation, saving; peak memory is that of the whole demo",
    ]
    versions = common.versions("trivium", "torch", "transformers", "tokenizers")
    common.report("demo", options, figures, facts=facts, notes=notes, versions=versions, machine=machine)


if __name__ == "__main__":
    main()
