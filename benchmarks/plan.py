"""What `plan` says a run will need, beside what the run needed: peak memory over models, methods, batches and precisions.

Each case plans and then trains three steps in one fresh process, as the recipes do; the peak is the kernel's own account. A
plan's time is what the machine's measured rates give; processor time stands beside it, which a busy machine disturbs less.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trivium.core.log import layout, log

from . import common

if TYPE_CHECKING:
    from trivium.data.batch import Batch
    from trivium.models.transformer import Transformer

RESULTS = Path(__file__).with_name("results") / "plan.json"
WITHIN = 0.15


@dataclass(frozen=True)
class Point:
    """One case. `documents` of equal length make a row; `again`: layers per stretch of gradient checkpointing."""

    model: str
    rows: int
    length: int
    documents: int
    precision: Literal["bf16", "fp32"]
    lora: bool = False
    again: int | None = None
    micro: int | None = None

    def __str__(self) -> str:
        extra = f"{'' if self.again is None else f' recompute {self.again}'}{'' if self.micro is None else f' micro {self.micro}'}"
        return f"{self.model} {'LoRA' if self.lora else 'full'} {self.rows}x{self.length}/{self.documents} {self.precision}{extra}"


GRID = (
    Point("tiny", 4, 64, 2, "fp32"),
    Point("tiny", 2, 32, 1, "bf16", lora=True),
    Point("8M", 4, 256, 1, "bf16"),
    Point("8M", 4, 256, 4, "fp32"),
    Point("8M", 8, 512, 2, "bf16"),
    Point("8M", 8, 512, 2, "bf16", again=1),
    Point("8M", 8, 512, 2, "bf16", micro=2),
    Point("30M", 2, 512, 1, "bf16"),
    Point("30M", 4, 256, 1, "fp32", again=2),
    Point("30M", 2, 512, 2, "fp32", lora=True),
    Point("135M", 2, 256, 1, "bf16", lora=True),
    Point("135M", 2, 512, 4, "bf16", lora=True),
    Point("135M", 2, 512, 4, "bf16", lora=True, again=1),
    Point("135M", 1, 256, 1, "bf16"),
)


def shape(name: str) -> Transformer:
    from trivium.models.presets import llama, presets

    shapes: dict[str, Callable[[], Transformer]] = {
        "tiny": presets.get("tiny-llama"),
        "8M": lambda: llama(dim=256, layers=8, heads=8, kv_heads=4, hidden=704, vocab=4096, tied=True),
        "30M": lambda: llama(dim=448, layers=10, heads=7, kv_heads=7, hidden=1216, vocab=8192),
        "135M": presets.get("smollm2-135m"),
    }
    return shapes[name]()


class Source:
    """Batches in which every token but the first of a document is a target."""

    fingerprint = "plan"

    def __init__(self, point: Point, vocab: int):
        self.point, self.vocab = point, vocab

    def steps(self, _epochs: float) -> int:
        return 3

    def batch(self, i: int) -> Batch:
        import torch

        from trivium.core.seed import generator
        from trivium.data.batch import Batch

        point = self.point
        segments = torch.arange(point.documents).repeat_interleave(point.length // point.documents)[None].repeat(point.rows, 1)
        targets = torch.zeros_like(segments, dtype=torch.bool)
        targets[:, 1:] = segments[:, 1:] == segments[:, :-1]
        return Batch(torch.randint(0, self.vocab, segments.shape, generator=generator(i)), segments, targets)


class Case:
    """Lives in a process of its own."""

    def __init__(self, **point: Any):
        import torch

        from trivium.adapt.lora import LoRA
        from trivium.models.checkpointing import Recompute
        from trivium.optim.optimizers import AdamW
        from trivium.recipes.needs import Training
        from trivium.train.loop import TrainConfig
        from trivium.train.objectives import NextToken

        torch.set_num_threads(1)
        self.point = Point(**point)
        recompute = None if self.point.again is None else Recompute(every=self.point.again)
        spec = shape(self.point.model)
        self.source = Source(self.point, spec.vocab)
        first = self.source.batch(0)
        self.training = Training(
            spec=spec,
            passes=(LoRA(rank=16),) if self.point.lora else (),
            batch=first,
            steps=3,
            tokens=3 * first.tokens.numel(),
            objective=NextToken(),
            optim=AdamW(lr=1e-4),
            train=TrainConfig(steps=3, rows=self.point.rows, micro=self.point.micro, precision=self.point.precision, recompute=recompute),
            out=Path(tempfile.gettempdir()),
        )

    def plan(self) -> dict[str, Any]:
        from trivium.recipes.needs import needs

        begun = time.perf_counter()
        return {**needs(self.training).to_dict(), "planning": time.perf_counter() - begun}

    def train(self) -> float:
        """Three steps; the processor seconds of them."""
        from trivium.adapt.lora import initialize_adapter
        from trivium.adapt.passes import apply_passes
        from trivium.core.device import dtype
        from trivium.models.transformer import build, initialize
        from trivium.optim.schedules import Cosine
        from trivium.train.loop import fit

        job = self.training
        model = apply_passes(initialize(build(job.spec, device="cpu", dtype=dtype(job.train.precision)), seed=0), job.passes)
        if job.passes:
            initialize_adapter(model, seed=0)
        begun = time.process_time()
        with tempfile.TemporaryDirectory() as out:
            fit(model, self.source, objective=job.objective, optim=job.optim, schedule=Cosine(), config=job.train, directory=out)
        return time.process_time() - begun


def measure(point: Point) -> dict[str, Any]:
    with common.Worker("benchmarks.plan:Case", threads=1, options=asdict(point)) as worker:
        planned = worker.call("plan")
        seconds = worker.call("train")
        peak = worker.call("peak")
    error = planned["peak"] / peak - 1
    log.say(f"{point}: planned {planned['peak'] / 1e6:,.0f} MB, peak {peak / 1e6:,.0f} MB, {error:+.1%}")
    return {"case": asdict(point), "planned": planned, "peak": peak, "error": error, "cpu_seconds": seconds}


def main() -> None:
    parser = common.arguments(__doc__, rounds=1)
    parser.set_defaults(json=RESULTS)
    options = parser.parse_args()
    machine = common.machine()
    found = [measure(point) for point in (GRID[:2] if options.quick else GRID)]
    rows = [
        (
            Point(**one["case"]),
            f"{one['planned']['peak'] / 1e6:,.0f}",
            f"{one['peak'] / 1e6:,.0f}",
            f"{one['error']:+.1%}",
            f"{one['planned']['seconds']:.1f}",
            f"{one['cpu_seconds']:.1f}",
            f"{one['planned']['planning']:.1f}",
        )
        for one in found
    ]
    columns = ("case: rows x length / documents in a row", "planned MB", "peak MB", "error", "planned s", "cpu s", "planning s")
    print("\n" + layout(("machine", ""), list(machine.items())))
    print("\n" + layout(columns, rows))
    worst = max(abs(one["error"]) for one in found)
    print(f"\nworst error of planned peak memory: {worst:.1%} (goal: {WITHIN:.0%})")
    if options.json is not None and not options.quick:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        versions = common.versions("trivium", "torch")
        whole = {"benchmark": "plan", "machine": machine, "versions": versions, "worst": worst, "goal": WITHIN, "cases": found}
        options.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
