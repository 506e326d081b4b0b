"""Golden losses: what a tiny run gave once, to the last bit on a machine that is written down, to 1e-6 elsewhere.

On torch alone: the native kernels, which a machine may lack, round in other places and need only come near.
`python -m tests.train.test_golden` adds this machine to golden.json; a change of the numbers there is a change of what training does.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from pathlib import Path

import pytest
import torch

from trivium.kernels import native
from trivium.train import history

from .toys import CONFIG, model, one_thread, train  # noqa: F401 - a fixture

GOLDEN = Path(__file__).with_name("golden.json")


def machine() -> str:
    """What the last bits depend on: the CPU's model and features, and torch."""
    info = Path("/proc/cpuinfo")
    lines = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines()) if info.exists() else {}
    about = {name.strip(): value.strip() for name, value in lines.items()}
    flags = hashlib.sha256(" ".join(sorted(about.get("flags", "").split())).encode()).hexdigest()[:8]
    name = f"{about.get('model name', platform.processor())} {about.get('model', '')}.{about.get('stepping', '')} {flags}"
    return f"{name} {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def losses(precision: str) -> list[float]:
    with tempfile.TemporaryDirectory() as directory:
        train(Path(directory), of=model(), config=CONFIG.replace(precision=precision, steps=10, save_every=None))
        rows = history.read(Path(directory))
    return [row["loss"] for row in rows] + [rows[-1]["validation"]["loss"]]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("precision", "elsewhere"), [("fp32", 1e-6), ("bf16", 1e-2)])
def test_losses_are_golden(precision, elsewhere):
    golden = json.loads(GOLDEN.read_text())
    with native.switched_off():
        found = losses(precision)
    if machine() in golden:
        assert found == golden[machine()][precision]
    for other in golden.values():
        assert found == pytest.approx(other[precision], rel=elsewhere)
    if native.available():
        assert losses(precision) == pytest.approx(found, rel=max(elsewhere, 1e-5))


if __name__ == "__main__":
    torch.set_num_threads(1)
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    with native.switched_off():
        known[machine()] = {precision: losses(precision) for precision in ("fp32", "bf16")}
    GOLDEN.write_text(json.dumps(known, indent=1) + "\n")
