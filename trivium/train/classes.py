"""Classifiers: cross-entropy of each document's class, whatever stands beside it in its row.

The head reads a state of each document (its last token's in a causal model, the first one's in an encoder), so packed rows need
nothing of their own. Radford et al. 2018; arXiv:1810.04805.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..data.classes import VALUE
from ..models.transformer import TransformerModel
from ..nn.heads_task import ClassifierHead
from ..nn.inputs import Inputs
from .objectives import Objective

if TYPE_CHECKING:
    from ..data.batch import Batch


class Classes(Objective):
    """Cross-entropy of the class of each document; the unit is the document. Trains a model whose head is `classifier`."""

    kind: Literal["classes"] = "classes"
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0, description="share of each document's probability spread over all classes")

    @classmethod
    def tiny(cls) -> Classes:
        return cls(label_smoothing=0.1)

    @property
    def measured(self) -> Collection[str]:
        return ("accuracy",)

    def weights(self, batch: Batch) -> dict[str, float]:
        documents = float((batch.segments.amax(1) + 1).sum())
        return {"loss": documents, "accuracy": documents}

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if not isinstance(model, TransformerModel) or not isinstance(model.head, ClassifierHead):
            raise ConfigError(
                "objective: 'classes' trains a classifier, and this model has another head (trivium classify)", field="objective"
            )
        if VALUE not in batch.values:
            raise ConfigError("objective: 'classes' needs rows with a label, and these have none (trivium classify)", field="objective")
        logits = model(Inputs(batch.tokens, segments=batch.segments)).logits  # [N, labels]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        found = batch.segments.amax(1, keepdim=True) + 1  # documents by row
        values = batch.values[VALUE]
        labels = values[torch.arange(values.shape[1], device=values.device) < found].long()
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(1) == labels).sum().to(loss.dtype)}
