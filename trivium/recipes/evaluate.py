"""Measure a model on a task, keep the result with everything that it depended on, and tell two results apart."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import Field, SerializeAsAny

from ..core.log import log
from ..core.spec import Spec
from ..evaluate import results
from ..evaluate.results import Result
from ..evaluate.task import Subject, Task
from .load import Bundle, load


class Eval(Spec):
    """One measurement."""

    model: str = Field("smollm2", description="name, model directory, GGUF file, adapter directory or hub repository")
    adapter: str | None = Field(None, description="adapter directory to put on the model")
    extend: str | None = Field(None, description="how the model's context is made longer: KIND:FACTOR, such as yarn:4")
    task: SerializeAsAny[Task] = Field(description="what is measured")
    out: str = Field("runs/eval/result.json", pattern=r"\.json$", description="the result file; samples lie beside it")
    dtype: str | None = Field(None, description="dtype to compute in; as stored by default")
    tokens: int = Field(2048, gt=0, description="most tokens in one scoring forward")
    batch: int = Field(16, gt=0, description="rows that are answered at a time")
    seed: int = Field(0, ge=0, description="of the bootstrap")


ALIASES = {
    "num_fewshot": "task.shots",
    "limit": "task.limit",
    "batch_size": "batch",
    "model_name_or_path": "model",
    "output_path": "out",
    "tasks": "task.kind",
}


def evaluate(config: Eval, *, bundle: Bundle | None = None) -> Result:
    """Run `config.task` and write the result and its samples. `bundle`: the model, already loaded."""
    bundle = bundle or load(config.model, adapter=config.adapter, dtype=config.dtype, extend=config.extend)
    subject = Subject(bundle.model, bundle.tokenizer, bundle.prompt, tokens=config.tokens, batch=config.batch)
    name = str(bundle.path) if bundle.adapter is None else f"{bundle.path} with {bundle.adapter}"
    name += "" if bundle.extended is None else f", extended by {bundle.extended}"
    result, samples = results.measure(config.task, subject, model=name, weights=bundle.weights(), command=sys.argv, seed=config.seed)
    return results.save(Path(config.out), result, samples)


def table(result: Result) -> list[dict[str, object]]:
    """Metrics with their intervals."""
    return [
        {
            "metric": name,
            "value": round(m.value, 4),
            "95% interval": None if m.low is None else f"{m.low:.4f} to {m.high:.4f}",
            "rows": m.rows,
        }
        for name, m in result.metrics.items()
    ]


def show(result: Result, *, title: str = "measured") -> None:
    """`table`, on the log."""
    rows = table(result)
    log.table(f"{title}: {result.model}", list(rows[0]), [["" if cell is None else cell for cell in row.values()] for row in rows])
