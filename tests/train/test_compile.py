"""torch.compile as an option: the same training up to the last bits, and the model as it was afterwards."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trivium.core.errors import ConfigError
from trivium.train import history

from .toys import CONFIG, Bigram, model, train


def compare(directory: Path) -> None:
    """Train plainly and compiled, and hold the two together."""
    torch.set_num_threads(1)
    plain, _ = train(directory / "plain", of=model(lora=0.0), config=CONFIG.replace(steps=3))
    fast, _ = train(directory / "fast", of=model(lora=0.0), config=CONFIG.replace(steps=3, compile=True))
    for a, b in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    losses = [[row["loss"] for row in history.read(directory / name)] for name in ("plain", "fast")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 3
    assert all("feed" not in vars(layer) for layer in fast.layers)
    with pytest.raises(ConfigError, match=r"train.compile: was True, is now False"):
        train(directory / "fast", of=model(lora=0.0), config=CONFIG.replace(steps=3))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_training_is_the_same_up_to_rounding(tmp_path):
    """In a process of its own: the compiler's imports mind what other tests imported before."""
    code = f"from pathlib import Path; from tests.train.test_compile import compare; compare(Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_model_without_layers_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Bigram has no layers to compile"):
        train(tmp_path, of=Bigram(), config=CONFIG.replace(compile=True))
