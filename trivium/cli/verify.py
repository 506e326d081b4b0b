"""`trivium verify`: is this model what it claims to be?"""

from __future__ import annotations

from pathlib import Path

from . import FAILURE
from .options import answer


def verify(model: str, /, *, source: Path | None = None, dtype: str = "fp32", json: bool = False) -> int:
    """Compares a model with independent readers and with itself, and says by how much each pair differs.

    Stored tensors with the safetensors and gguf packages, token ids with jinja2 and tokenizers called directly, cached,
    batched and packed computation with the plain forward. The status is 1 if any difference is above its tolerance.

    Try:
      trivium verify smollm2
      trivium verify models/smollm2 --json

    Parameters
    ----------
    model
        What to verify: a known name, a model directory, a GGUF file, an adapter directory.
    source
        The GGUF file that a model directory was made from, if it moved.
    dtype
        What to compute in; fp32 tells rounding from error.
    json
        Answer as JSON: a list of check, against, difference, tolerance, unit, pass.
    """
    from ..recipes.verify import verify as run

    checks = run(model, source=source, dtype=dtype)
    answer([check.to_dict() for check in checks], as_json=json)
    return 0 if all(check.passed for check in checks) else FAILURE
