"""A running mean through a whole run: validated, left in the model, resumed after a stop with the same bits."""

from __future__ import annotations

import signal

import pytest
import torch

from trivium.core.errors import ConfigError
from trivium.train import checkpoint
from trivium.train.loop import Interrupted

from .toys import CONFIG, Rows, Signalled, held_out, model, same, train, weights

EMA = CONFIG.replace(ema=0.7)


@pytest.mark.parametrize("lora", [0.1, None], ids=["adapter", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_result_is_the_mean_and_a_stop_changes_nothing(tmp_path, lora, precision):
    config = EMA.replace(precision=precision)
    whole, done = train(tmp_path / "whole", config=config, of=model(lora=lora))
    held = checkpoint.latest(tmp_path / "whole")
    mean, last = held.tensors("average"), held.tensors("parameters")
    for name, param in whole.named_parameters():
        if param.requires_grad:
            assert torch.equal(param, mean[name].to(param.dtype)) and not torch.equal(mean[name], last[name])
    assert done.metrics["validation.loss"] == held_out(whole.eval())["loss"], "what was validated is what is left"
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", config=config, of=model(lora=lora), rows=Signalled(at=3, number=signal.SIGINT))
    again, resumed = train(tmp_path / "stopped", config=config, of=model(lora=lora))
    assert resumed.resumed == 4 and same(weights(whole), weights(again))
    finished, once_more = train(tmp_path / "stopped", config=config, of=model(lora=lora))
    assert once_more.resumed == 6 and same(weights(whole), weights(finished))


def test_training_itself_is_the_same_without_it(tmp_path):
    plain, _ = train(tmp_path / "plain", rows=Rows())
    train(tmp_path / "mean", config=EMA)
    last = checkpoint.latest(tmp_path / "mean").tensors("parameters")
    assert all(torch.equal(param, last[name]) for name, param in plain.named_parameters() if param.requires_grad)


def test_another_decay_is_another_run(tmp_path):
    train(tmp_path, config=EMA)
    with pytest.raises(ConfigError, match=r"train\.ema: was 0\.7, is now 0\.8"):
        train(tmp_path, config=EMA.replace(ema=0.8))


def test_a_mean_of_the_start_is_said(tmp_path, capsys):
    train(tmp_path / "a", config=EMA.replace(ema=0.999))
    assert "make 100% of the mean" in capsys.readouterr().err
    train(tmp_path / "b", config=EMA.replace(ema=0.5))
    assert "of the mean" not in capsys.readouterr().err
