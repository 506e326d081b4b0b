"""The loop: accumulation, metrics, refusals, signals, resumption."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import nn

from trivium.core.errors import ConfigError, DataError, FileError, TriviumError
from trivium.data.batch import Batch
from trivium.optim.optimizers import AdamW, Optimizer
from trivium.optim.schedules import Constant, Cosine
from trivium.train import checkpoint, history
from trivium.train.loop import Interrupted
from trivium.train.objectives import NextToken

from .toys import CONFIG, Bigram, Rows, Signalled, held_out, model, same, train, weights


class Kept(torch.optim.Optimizer):
    """Moves nothing and keeps each update's gradients."""

    def __init__(self, params, names):
        super().__init__(params, {"lr": 0.0})
        self.names, self.seen = names, []

    def step(self):
        self.seen.append({name: p.grad.clone() for name, p in zip(self.names, self.param_groups[0]["params"], strict=True)})


class KeepGradients(Optimizer):
    kind: Literal["test-keep-gradients"] = "test-keep-gradients"

    def build(self, params):
        BUILT.append(Kept(list(params.values()), list(params)))
        return BUILT[-1]


BUILT: list[Kept] = []


class Uneven(Rows):
    """Row 0 has one target, the others many: where a mean of means goes wrong."""

    def batch(self, i: int) -> Batch:
        batch = super().batch(i)
        targets = batch.targets.clone()
        targets[0] = False
        targets[0, 2] = True
        return replace(batch, targets=targets)


def gradients(directory, *, micro: int | None, precision: str, steps: int = 1) -> dict[str, torch.Tensor]:
    config = CONFIG.replace(steps=steps, micro=micro, clip=None, precision=precision)
    train(directory, of=model(), rows=Uneven(), optim=KeepGradients(lr=1.0), config=config, validate=None)
    assert len(BUILT[-1].seen) == steps
    return BUILT[-1].seen[0]


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).norm() / b[name].norm()).item() for name in a)


@pytest.mark.concept("T10.03", part="train/loop.py")
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_accumulated_is_one_batch(tmp_path, micro):
    whole = gradients(tmp_path / "whole", micro=None, precision="fp32")
    split = gradients(tmp_path / "split", micro=micro, precision="fp32")
    assert apart(split, whole) < 1e-6
    batch, trained = Uneven().batch(0), model()
    for part in batch.split(4):  # the known bug: the mean of the micro-batches' means
        (NextToken(label_smoothing=0.1).terms(trained, part)["loss"] / part.targets.sum() / 4).backward()
    assert apart({name: p.grad for name, p in trained.named_parameters()}, whole) > 0.1


@pytest.mark.concept("T10.03", part="train/loop.py")
def test_accumulated_bf16_is_as_near_as_one_bf16_batch(tmp_path):
    exact = gradients(tmp_path / "exact", micro=None, precision="fp32")
    one = apart(gradients(tmp_path / "one", micro=None, precision="bf16"), exact)
    accumulated = apart(gradients(tmp_path / "split", micro=1, precision="bf16"), exact)
    assert 0 < accumulated < 1.5 * one < 0.2


@pytest.mark.concept("T10.03", part="train/loop.py")
def test_updates_and_memory_do_not_depend_on_the_number_of_micro_batches(tmp_path):
    """Bytes that autograd holds at once, by rows per update, with one row per micro-batch."""
    most = []
    for rows in (2, 8):
        held = peak = 0

        class Counted:
            def __init__(self, tensor):
                nonlocal held, peak
                self.tensor = tensor
                held += tensor.nbytes
                peak = max(peak, held)

            def __del__(self):
                nonlocal held
                held -= self.tensor.nbytes

        with torch.autograd.graph.saved_tensors_hooks(Counted, lambda counted: counted.tensor):
            config = CONFIG.replace(steps=3, micro=1, save_every=None)
            train(tmp_path / str(rows), of=Bigram(), rows=Fixed(rows=rows), config=config, optim=KeepGradients(lr=1.0), validate=None)
        assert len(BUILT[-1].seen) == 3
        most.append(peak)
    assert most[0] == most[1] > 0


class Fixed(Rows):
    """The same row over and over."""

    def batch(self, i: int) -> Batch:
        batch = super().batch(0)
        return Batch(*(getattr(batch, name)[:1].expand(self.rows, -1) for name in ("tokens", "segments", "targets")))


def test_metrics_are_sums_over_weights(tmp_path):
    trained, done = train(tmp_path, config=CONFIG.replace(steps=4), schedule=Cosine(warmup=2, minimum=0.5), of=model())
    rows = history.read(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["lr"] for row in rows] == pytest.approx([0.0, 0.005, 0.01, 0.0075])
    assert ["validation" in row for row in rows] == [False, False, True, True]
    first, start = Rows().batch(0), model()
    objective = NextToken(label_smoothing=0.1)
    assert rows[0]["loss"] == pytest.approx(objective.terms(start, first)["loss"].item() / float(first.targets.sum()), rel=1e-6)
    assert rows[0]["targets"] == int(first.targets.sum()) and rows[0]["tokens"] == int((first.segments >= 0).sum())
    assert rows[0]["tokens_per_second"] == pytest.approx(rows[0]["tokens"] / rows[0]["seconds"])
    trained.eval()
    assert done.metrics["validation.loss"] == pytest.approx(held_out(trained)["loss"], rel=1e-6)
    assert done.metrics["loss"] == rows[-1]["loss"]
    assert done.step == 4 and done.checkpoint == tmp_path / "checkpoint-4"


def test_epochs_count_steps(tmp_path):
    assert train(tmp_path, config=CONFIG.replace(steps=None, epochs=0.6), of=Bigram())[1].step == 3


def test_the_callers_randomness_and_modes_are_given_back(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    trained = model(lora=0.1).eval()
    torch.manual_seed(5)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(tmp_path, of=trained)
    assert torch.equal(torch.rand(3), expected)
    assert not trained.training
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_dropout_depends_on_seed_step_and_micro_batch(tmp_path):
    def losses(name: str, seed: int, dropout: float) -> list[float]:
        config = CONFIG.replace(seed=seed)
        train(tmp_path / name, of=model(lora=dropout), rows=Fixed(), optim=KeepGradients(lr=1.0), config=config)
        return [row["loss"] for row in history.read(tmp_path / name)]

    assert len(set(losses("a", 0, 0.3))) == 6
    assert losses("b", 1, 0.3) == losses("c", 1, 0.3) != losses("d", 2, 0.3)
    assert len(set(losses("e", 0, 0.0))) == 1


def test_only_adapters_move_and_bf16_is_what_was_asked_for(tmp_path):
    before = weights(model(lora=0.0))
    trained, _ = train(tmp_path, of=model(lora=0.0), config=CONFIG.replace(precision="bf16"))
    for name, param in trained.named_parameters():
        assert param.dtype == torch.bfloat16
        assert torch.equal(param, before[name].bfloat16()) == (".lora." not in name), name
    saved = checkpoint.latest(tmp_path).tensors("parameters")
    assert saved.keys() == {name for name in before if ".lora." in name}
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())


def test_a_finished_run_is_not_run_again(tmp_path):
    trained, done = train(tmp_path)

    class Untouchable(Rows):
        def batch(self, i):
            raise AssertionError

    again, second = train(tmp_path, rows=Untouchable())
    assert same(weights(trained), weights(again))
    assert second.resumed == 6 and second.metrics == done.metrics


@pytest.mark.parametrize(
    ("changed", "path"),
    [
        ({"optim": AdamW(lr=2e-2)}, "optim.lr: was 0.01, is now 0.02"),
        ({"config": CONFIG.replace(seed=4)}, "train.seed"),
        ({"rows": Rows(seed=1)}, "data: was 'rows-4-18-0'"),
        ({"schedule": Constant()}, "schedule.kind: was 'cosine', is now 'constant'"),
        ({"objective": NextToken()}, "objective.label_smoothing"),
        ({"identity": {"model": {"name": "other"}}}, "model.name: was 'toy', is now 'other'"),
    ],
)
def test_another_run_is_refused_by_name_of_what_differs(tmp_path, changed, path):
    train(tmp_path)
    before = (tmp_path / history.NAME).read_bytes()
    with pytest.raises(ConfigError, match=path):
        train(tmp_path, **changed)
    assert (tmp_path / history.NAME).read_bytes() == before


def test_how_often_to_save_may_change(tmp_path):
    whole, _ = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "run", rows=Signalled(at=2))
    again, done = train(tmp_path / "run", config=CONFIG.replace(save_every=1, keep_last=None))
    assert same(weights(whole), weights(again)) and done.resumed == 3
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 3, 4, 5, 6)]


def test_an_interrupt_saves_and_a_second_one_stops_at_once(tmp_path):
    config = CONFIG.replace(save_every=None)
    with pytest.raises(Interrupted, match="step 4") as caught:
        train(tmp_path, rows=Signalled(at=3), config=config)
    assert caught.value.checkpoint == tmp_path / "checkpoint-4" and isinstance(caught.value, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt) as second:
        train(tmp_path, rows=Signalled(at=5, times=2), config=config)
    assert not isinstance(second.value, Interrupted)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_an_ignored_signal_stays_ignored(tmp_path):
    """nohup ignores SIGHUP: what it runs goes on when the terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train(tmp_path, rows=Signalled(at=3, number=signal.SIGHUP))[1].step == CONFIG.steps
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_stops_and_saves_nothing(tmp_path, value):
    class Broken(Bigram):
        def forward(self, inputs, *, keep):
            output = super().forward(inputs, keep=keep)
            self.calls = getattr(self, "calls", 0) + 1
            return replace(output, logits=output.logits * value) if self.calls > 5 else output

    with pytest.raises(TriviumError, match="the loss of step 3 is nan"):
        train(tmp_path, of=Broken(), validate=None)
    assert [row["step"] for row in history.read(tmp_path)] == [1, 2]
    again, done = train(tmp_path, of=Bigram(), validate=None)
    assert done.resumed == 2
    assert same(weights(again), weights(train(tmp_path / "whole", of=Bigram(), validate=None)[0]))


def test_gradients_and_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.inf

    class Broken(Bigram):
        def forward(self, inputs, *, keep):
            output = super().forward(inputs, keep=keep)
            return replace(output, logits=Steep.apply(output.logits))

    with pytest.raises(TriviumError, match="the gradient norm of step 1 is"):
        train(tmp_path / "a", of=Broken())
    with pytest.raises(TriviumError, match="the parameter embed is not finite"):
        train(tmp_path / "b", of=Bigram(), optim=AdamW(lr=1e300), schedule=Constant(), config=CONFIG.replace(steps=1), validate=None)
    assert not list(tmp_path.glob("*/checkpoint-*"))


def test_a_batch_with_nothing_to_learn_is_an_error(tmp_path):
    class Empty(Rows):
        def batch(self, i):
            batch = super().batch(i)
            return replace(batch, targets=torch.zeros_like(batch.targets)) if i == 1 else batch

    with pytest.raises(DataError, match="batch 1 has nothing to learn"):
        train(tmp_path, rows=Empty())


def test_a_micro_batch_with_nothing_to_learn_is_none(tmp_path):
    class Half(Rows):
        def batch(self, i):
            batch = super().batch(i)
            targets = batch.targets.clone()
            targets[:2] = False
            return replace(batch, targets=targets)

    a, _ = train(tmp_path / "a", rows=Half(), of=model(), config=CONFIG.replace(micro=2, steps=2))
    b, _ = train(tmp_path / "b", rows=Half(), of=model(), config=CONFIG.replace(micro=None, steps=2))
    assert all((x - y).abs().max() < 1e-5 for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


def test_two_runs_do_not_share_a_folder(tmp_path):
    with checkpoint.locked(tmp_path), pytest.raises(FileError, match="another run is writing"):
        train(tmp_path)
    train(tmp_path, of=Bigram())


def test_clipping(tmp_path):
    train(tmp_path / "a", optim=KeepGradients(lr=1.0), of=model(), config=CONFIG.replace(clip=0.25, steps=1), validate=None)
    clipped = BUILT[-1].seen[0]
    assert math.sqrt(sum(grad.square().sum() for grad in clipped.values())) == pytest.approx(0.25, rel=1e-4)
    assert history.read(tmp_path / "a")[0]["grad_norm"] > 1.0


def test_nothing_to_train(tmp_path):
    frozen: nn.Module = model().requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        train(tmp_path, of=frozen)


def test_a_row_cut_short_is_dropped(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path, rows=Signalled(at=2))
    file = tmp_path / history.NAME
    whole = file.read_bytes()
    for tail in (b'{"step": 4, "loss"', b'{"step": 4, "loss": 1.0}', b'{"step": 4, "loss": 1.0}\n', b"\0\0\0\0", b"7\n"):
        file.write_bytes(whole + tail)
        with history.History(tmp_path, step=3):
            assert file.read_bytes() == whole
    assert [json.loads(line)["step"] for line in whole.splitlines()] == [1, 2, 3]
