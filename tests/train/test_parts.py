"""What every registered objective must keep, and that the loop takes the house's own batches."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from torch import nn

from tests.data.fakes import FakePrompt
from trivium.data.batch import Batch
from trivium.data.batches import Batches
from trivium.data.prepare import prepare
from trivium.models.presets import llama
from trivium.models.transformer import build, initialize
from trivium.nn.heads_task import Classifier, Reward
from trivium.optim.optimizers import AdamW
from trivium.optim.schedules import Constant
from trivium.train import history
from trivium.train.classes import Classes
from trivium.train.loop import Interrupted, TrainConfig, fit
from trivium.train.objectives import NextToken, Objective
from trivium.train.rewards import BradleyTerry

from .toys import Rows, Signalled, model, same, weights

every_objective = pytest.mark.parametrize("spec", [part.tiny() for _, part in Objective.registry.items()], ids=lambda spec: spec.kind)


def host(spec: Objective) -> nn.Module:
    """A model that `spec` can train."""
    heads = {BradleyTerry: Reward(), Classes: Classifier(labels=3, pool="last")}
    return model(head=heads.get(type(spec)))


@every_objective
def test_terms_are_sums_that_are_linear_in_rows(spec):
    batch, trained = Rows().batch(0), host(spec)
    whole = spec.terms(trained, batch)
    assert whole.keys() == spec.weights(batch).keys() and all(term.dim() == 0 and term.isfinite() for term in whole.values())
    assert all(whole[name].requires_grad != (name in spec.measured) for name in whole)
    parts = [batch] if spec.coupled else batch.split(3)
    for name, term in whole.items():
        assert sum(spec.terms(trained, part)[name] for part in parts).item() == pytest.approx(term.item(), rel=1e-5)
        assert sum(spec.weights(part)[name] for part in parts) == pytest.approx(spec.weights(batch)[name])


@every_objective
def test_every_parameter_gets_a_finite_gradient(spec):
    trained = host(spec)
    sum(spec.terms(trained, Rows().batch(0)).values()).backward()
    assert all(param.grad is not None and param.grad.isfinite().all() and param.grad.any() for param in trained.parameters())


@dataclass
class Stopped:
    """The house's batches, and a signal at batch 3."""

    batches: Batches

    @property
    def fingerprint(self) -> str:
        return self.batches.fingerprint

    def steps(self, epochs: float) -> int:
        return self.batches.steps(epochs)

    def batch(self, i: int) -> Batch:
        Signalled(at=3).batch(i)
        return self.batches.batch(i)


def test_prepared_data_trains_and_resumes(tmp_path):
    texts = [{"prompt": f"{n} and {n}: ", "completion": str(2 * n)} for n in range(30)]
    spec = llama(dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, hidden=24, vocab=128)
    config = TrainConfig(epochs=2, rows=4, micro=2, precision="bf16", seed=1)

    def run(name: str, batches: Batches | Stopped):
        trained = initialize(build(spec, device="cpu"), seed=0)
        settings = {"objective": NextToken(), "optim": AdamW(lr=1e-2), "schedule": Constant(), "config": config}
        return trained, fit(trained, batches, directory=tmp_path / name, **settings)

    def batches() -> Batches:
        return Batches([(prepare(texts, FakePrompt(), length=48), 1)], seed=config.seed, rows=config.rows)

    whole, done = run("whole", batches())
    assert done.step == batches().steps(2) > 4
    rows = history.read(tmp_path / "whole")
    assert sum(row["targets"] for row in rows[: batches().steps(1)]) >= sum(len(text["completion"]) + 1 for text in texts)
    assert rows[-1]["loss"] < rows[0]["loss"]
    with pytest.raises(Interrupted):
        run("stopped", Stopped(batches()))
    again, done = run("stopped", batches())
    assert done.resumed == 4 and same(weights(whole), weights(again))
