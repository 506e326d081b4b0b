"""torch.compile as an option: the same training up to the last bits, and the model as it was afterwards."""

from __future__ import annotations

import shutil

import pytest
import torch

from trivium.core.errors import ConfigError
from trivium.train import history

from .toys import CONFIG, Bigram, model, one_thread, train  # noqa: F401 - a fixture


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.usefixtures("one_thread")
def test_compiled_training_is_the_same_up_to_rounding(tmp_path):
    plain, _ = train(tmp_path / "plain", of=model(lora=0.0), config=CONFIG.replace(steps=3))
    fast, _ = train(tmp_path / "fast", of=model(lora=0.0), config=CONFIG.replace(steps=3, compile=True))
    for a, b in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    losses = [[row["loss"] for row in history.read(tmp_path / name)] for name in ("plain", "fast")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 3
    assert all("feed" not in vars(layer) for layer in fast.layers)
    with pytest.raises(ConfigError, match=r"train.compile: was True, is now False"):
        train(tmp_path / "fast", of=model(lora=0.0), config=CONFIG.replace(steps=3))


def test_a_model_without_layers_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Bigram has no layers to compile"):
        train(tmp_path, of=Bigram(), config=CONFIG.replace(compile=True))
