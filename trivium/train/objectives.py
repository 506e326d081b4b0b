"""Objectives: what a batch is trained on, as sums and weights, so that micro-batches and ranks add up to one batch exactly.

`weights` needs no model: the loop adds it over the whole global batch before the first forward and gives each term of
`terms` its share. Supervised fine-tuning is next-token prediction on batches whose `targets` leave the prompts out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..core.registry import Registry
from ..core.spec import Part
from ..models.transformer import TransformerModel
from ..nn.heads import LanguageHead
from ..nn.inputs import Inputs
from .cross_entropy import cross_entropy_sum, linear_cross_entropy_sum

if TYPE_CHECKING:
    from ..data.batch import Batch


class Objective(Part, registry=Registry("objective", "trivium.train")):
    """Root of the objectives. Every term is a sum that is linear in rows, and its weight counts what was summed."""

    def weights(self, batch: Batch) -> dict[str, float]:
        """By term: how much `batch` weighs, in the term's unit (targets, rows, ...)."""
        raise NotImplementedError

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """By term: the sum [] over `batch`, with gradients."""
        raise NotImplementedError


class NextToken(Objective):
    """Cross-entropy of each target token given what stands before it in its document; the unit is the target."""

    kind: Literal["next_token"] = "next_token"
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0, description="share of each target's probability spread over the whole vocabulary")

    @classmethod
    def tiny(cls) -> NextToken:
        return cls(label_smoothing=0.1)

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"loss": float(batch.targets.sum())}

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        keep = torch.zeros_like(batch.targets)
        keep[:, :-1] = batch.targets[:, 1:]  # a position's logits speak of the token after it
        inputs, labels = Inputs(batch.tokens, segments=batch.segments), batch.tokens[batch.targets]
        table = model.head.table(model.embed) if isinstance(model, TransformerModel) and isinstance(model.head, LanguageHead) else None
        if table is not None:
            hidden = model(inputs, keep="none").hidden[keep]  # [N, C]
            return {"loss": linear_cross_entropy_sum(hidden, table, labels, label_smoothing=self.label_smoothing)}
        logits = model(inputs, keep=keep).logits  # [N, V]
        return {"loss": cross_entropy_sum(logits, labels, label_smoothing=self.label_smoothing)}
