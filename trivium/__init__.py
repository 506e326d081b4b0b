"""Trivium builds, adapts, measures and runs language models.

Names are resolved on first use, so that `import trivium` costs nothing and imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "load": "trivium.recipes.load",
    "Bundle": "trivium.recipes.load",
    "pretrain": "trivium.recipes.pretrain",
    "Pretrain": "trivium.recipes.pretrain",
    "Sampling": "trivium.infer.sampling",
    "sft": "trivium.recipes.sft",
    "SFT": "trivium.recipes.sft",
    "TrainConfig": "trivium.train.loop",
    "Run": "trivium.train.run",
    "Inputs": "trivium.nn.inputs",
    "Output": "trivium.nn.inputs",
    "Transformer": "trivium.models.transformer",
    "TriviumError": "trivium.core.errors",
}
__all__ = [*_HOME, "__version__"]  # noqa: PLE0604 - resolved lazily below

if TYPE_CHECKING:
    from .core.errors import TriviumError as TriviumError
    from .infer.sampling import Sampling as Sampling
    from .models.transformer import Transformer as Transformer
    from .nn.inputs import Inputs as Inputs
    from .nn.inputs import Output as Output
    from .recipes.load import Bundle as Bundle
    from .recipes.load import load as load
    from .recipes.pretrain import Pretrain as Pretrain
    from .recipes.pretrain import pretrain as pretrain
    from .recipes.sft import SFT as SFT
    from .recipes.sft import sft as sft
    from .train.loop import TrainConfig as TrainConfig
    from .train.run import Run as Run


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'trivium' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
