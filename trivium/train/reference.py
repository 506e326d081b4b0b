"""What a run's model is compared with: itself, as it was before the run. Nothing is held twice.

Where adapters are trained, the reference is the same model with them off: one more forward pass. Else its log-probabilities of
all rows are computed once, before the first step, and kept on disk under the hashes of the weights and the rows that they are of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor, nn

from ..adapt.adapter import adapters
from ..core.errors import ConfigError, FileError
from ..data.batches import by_row
from ..io import files
from ..models.model import BuiltModel
from .logprobs import document_logprobs

if TYPE_CHECKING:
    from ..data.bank import Prepared
    from ..data.batch import Batch

VALUE = "reference"  # the name of its log-probabilities among a batch's values


def reference_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """The log-probability [B, D] of each document, which stand in pairs, under the reference: the one that came with the batch, or that of `model`
    with its adapters off. Raises `ConfigError` where there is neither."""
    if VALUE in batch.values:
        return batch.values[VALUE][:, : int(batch.segments.max()) + 1]
    if not (isinstance(model, BuiltModel) and adapters(model)):
        raise ConfigError(
            "the objective compares with a reference, and there is none: train an adapter, or compute the reference's log-probabilities first",
            field="reference",
        )
    with at_rest(model):
        return document_logprobs(model, batch, adapters=batch.tokens.new_full((len(batch.tokens),), -1), pairs=True)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; the model's mode is put back after."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def referred(model: nn.Module, prepared: Prepared, path: Path, *, weights: str, rows: int) -> Prepared:
    """`prepared` with the log-probability of each row under `model`, read from the file `path` or computed and written there.

    `weights` is the hash of what `model` is. A file of other weights, of other rows or one that is damaged is a `FileError`.
    The fingerprint stays: these numbers follow from it and from `weights`, which a run's identity holds beside it.
    """
    about = {"weights": weights, "data": prepared.fingerprint}
    found = _read(path, about) if path.exists() else None
    if found is None:
        found = logprobs_of(model, prepared, rows=rows, pairs=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_file(path) as sink:
            sink.write(safetensors.numpy.save({VALUE: found}, metadata={**about, "sha256": _hash(found)}))
    return replace(prepared, values={**prepared.values, VALUE: found})


def logprobs_of(model: nn.Module, prepared: Prepared, *, rows: int, pairs: bool = False) -> np.ndarray:
    """The log-probability of the targets of each row of `prepared` under `model`, [rows] fp32, `rows` bins at a time. `pairs`: see
    `document_logprobs`."""
    device = next(model.parameters()).device
    with at_rest(model):
        return by_row(prepared, lambda batch: document_logprobs(model, batch.to(device), pairs=pairs), rows=rows, what="reference")


def _read(path: Path, about: dict[str, str]) -> np.ndarray:
    try:
        with safetensors.safe_open(path, "np") as file:
            told, found = file.metadata() or {}, file.get_tensor(VALUE)
    except (OSError, safetensors.SafetensorError) as error:
        raise FileError(f"{path}: cannot be read ({error}); remove it, and it is computed again", value=str(path)) from None
    for key, what in (("weights", "weights"), ("data", "rows")):
        if told.get(key) != about[key]:
            raise FileError(
                f"{path}: holds a reference's log-probabilities of other {what} (sha256 {str(told.get(key))[:12]}, these are "
                f"{about[key][:12]}); remove it, or name another with --reference_file",
                value=str(path),
            )
    if told.get("sha256") != _hash(found):
        raise FileError(f"{path}: is damaged; remove it, and it is computed again", value=str(path))
    return found


def _hash(found: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(found).data).hexdigest()
