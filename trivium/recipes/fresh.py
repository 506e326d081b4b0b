"""Logits of a model directory, computed in a process of its own by us or by transformers: what a reload is compared with.

`python -m trivium.recipes.fresh DIRECTORY IDS.json OUT.npy --by trivium|transformers`
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..core.errors import MissingExtra, TriviumError
from .load import load

BY = ("trivium", "transformers")


def logits(path: Path | str, ids: Sequence[int], *, by: str) -> np.ndarray:
    """float32 logits [T, V] for `ids`, computed in float32 by a new process that loads `path` itself."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, answer = Path(scratch) / "ids.json", Path(scratch) / "logits.npy"
        asked.write_text(json.dumps(list(ids)))
        command = [sys.executable, "-m", __spec__.name, str(path), str(asked), str(answer), "--by", by]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise TriviumError(f"{path}: a new process could not compute its logits by {by}: {last}")
        return np.load(answer)


def _compute(path: str, ids: list[int], by: str) -> np.ndarray:
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        if by == "trivium":
            return load(path, dtype="fp32").model(tokens).logits[0].numpy()
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            raise MissingExtra("transformers", "demo", "comparing with transformers") from None
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits[0].numpy()


def _main(argv: Sequence[str]) -> None:
    path, asked, answer, _, by = argv
    np.save(answer, _compute(path, json.loads(Path(asked).read_text()), by))


if __name__ == "__main__":
    _main(sys.argv[1:])
