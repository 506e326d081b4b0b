"""The demo's gain on several seeds: what the untaught model, the taught model and look-up get, and how long teaching took.

Each seed draws its own data, adapter and order, in a fresh process and a folder of its own. Exact match is the figure that counts.
"""

from __future__ import annotations

import json
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
        from trivium.train import history

        facts = demo(validate(Demo, config))
        steps = history.read(Path(config["out"]) / "run")
        facts["steps"] = {key: sum(row[key] for row in steps) for key in ("seconds", "tokens", "targets")}
        return json.loads(json.dumps(facts, default=str))


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
            round(run["steps"]["seconds"], 1),
            run["steps"]["tokens"],
            round(run["steps"]["tokens"] / run["steps"]["seconds"]),
            round(sum(run["seconds"].values()), 1),
        )
        for seed, run in runs.items()
    ]
    columns = ("seed", "before", "after", "look-up", "outside intervals", "training, s", "tokens", "tokens/s", "whole demo, s")
    print("\nexact match (95% interval), by seed\n\n" + layout(columns, lines))
    figures = [
        Row("exact match before", "share", "less", [run["before"][METRIC]["value"] for run in runs.values()], goal=BEFORE),
        Row("exact match after", "share", "more", [run["after"][METRIC]["value"] for run in runs.values()], goal=AFTER),
        Row("exact match of look-up", "share", "less", [run["baseline"]["value"] for run in runs.values()], goal=BASELINE),
        Row("training", "s", "less", [run["steps"]["seconds"] for run in runs.values()], goal=SECONDS),
        Row("whole demo", "s", "less", [sum(run["seconds"].values()) for run in runs.values()]),
        Row("peak memory", "MB", "less", list(peaks.values())),
    ]
    facts: dict[str, Any] = {}
    for seed, run in runs.items():
        for name in ("before", "after"):
            facts[f"seed {seed}, {name}"] = ", ".join(f"{key} {measured['value']:.3f}" for key, measured in run[name].items())
        facts[f"seed {seed}, merging moved"] = f"{run['merge']['mean_kl']:.2g} nats of mean KL"
        facts[f"seed {seed}, seconds by step"] = run["seconds"]
    notes = [
        "the last table's spreads are over seeds, and its goals hold for the median; the first table shows each seed",
        "training is the time of all updates, by metrics.jsonl; the rest is in the whole; a run found in --out counts as it is",
        "peak memory is that of the process that ran the whole demo",
    ]
    versions = common.versions("trivium", "torch", "transformers", "tokenizers")
    common.report("demo", options, figures, facts=facts, notes=notes, versions=versions, machine=machine)


if __name__ == "__main__":
    main()
