"""Reward models: a number for a whole answer, learned from which of two answers is preferred (Bradley and Terry 1952;
arXiv:2009.01325, 2203.02155), and what such numbers are worth: accuracy, calibration, agreement of several models.

The reward is read at a document's last token. Only differences count, so a constant may be added to all; `center` keeps it near 0.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..data.batches import by_row
from ..nn.inputs import Inputs
from .logprobs import lengths, pairs_of
from .objectives import Objective
from .preference import SPLIT
from .reference import at_rest

if TYPE_CHECKING:
    from ..data.bank import Prepared
    from ..data.batch import Batch


class BradleyTerry(Objective):
    """-log sigmoid(reward of chosen - reward of rejected - margin of the pair), the margin being 0 where rows have none
    (arXiv:2307.09288). Trains a model whose head is `reward`; the unit is the pair."""

    kind: Literal["bradley_terry"] = "bradley_terry"
    center: float = Field(0.0, ge=0, description="coefficient of the squared sum of a pair's rewards (arXiv:2312.09244: 0.01)")

    @classmethod
    def tiny(cls) -> BradleyTerry:
        return cls(center=0.01)

    @property
    def measured(self) -> Collection[str]:
        return ("chosen_reward", "rejected_reward", "margin", "accuracy", *SPLIT)

    def weights(self, batch: Batch) -> dict[str, float]:
        chosen, rejected = pairs_of(lengths(batch), batch)
        found = dict.fromkeys(("loss", *self.measured), float(len(chosen)))
        return {**found, "accuracy_longer": float((chosen > rejected).sum()), "accuracy_shorter": float((chosen < rejected).sum())}

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        chosen, rejected = pairs_of(document_rewards(model, batch), batch)
        asked = pairs_of(batch.values["margin"], batch)[0] if "margin" in batch.values else None
        with torch.no_grad():
            size, other = pairs_of(lengths(batch), batch)
            right = (chosen > rejected).to(chosen.dtype)
            found = {
                "chosen_reward": chosen.sum(),
                "rejected_reward": rejected.sum(),
                "margin": (chosen - rejected).sum(),
                "accuracy": right.sum(),
                "accuracy_longer": right[size > other].sum(),
                "accuracy_shorter": right[size < other].sum(),
            }
        return {"loss": self.loss(chosen, rejected, asked).sum(), **found}

    def loss(self, chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
        """The loss [P] of rewards [P]."""
        ahead = chosen - rejected if margin is None else chosen - rejected - margin
        loss = -F.logsigmoid(ahead)
        return loss + self.center * (chosen + rejected) ** 2 if self.center else loss


def document_rewards(model: nn.Module, batch: Batch) -> Tensor:
    """The reward [B, D] at the last token of each document, fp32 at least; 0 where a row has fewer. Raises `ConfigError` if
    the model's head gives anything but one number."""
    ends = batch.segments >= 0
    ends[:, :-1] &= batch.segments[:, :-1] != batch.segments[:, 1:]
    found = model(Inputs(batch.tokens, segments=batch.segments), keep=ends).logits
    if found.dim() == 2 and found.shape[1] == 1:  # a classifier of one class, which gives a row for each document
        found = found[:, 0]
    if found.dim() != 1:
        raise ConfigError("the model has no reward head: its head gives more than one number a token", field="head")
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    row, _ = ends.nonzero(as_tuple=True)
    documents = int(batch.segments.max()) + 1
    place = row * documents + batch.segments[ends]
    return found.new_zeros(len(ends) * documents).index_put((place,), found).view(len(ends), documents)


@dataclass(frozen=True)
class Reliability:
    """How a model's choices with a confidence from `low` to `high` came out: how many there were, their mean confidence, and how
    often they were right."""

    low: float
    high: float
    pairs: int
    confidence: float
    accuracy: float


def reliability(margins: Tensor, *, bins: int = 10) -> list[Reliability]:
    """A row for each of `bins` of equal width of sigmoid(|margin|), the chance that a model gives to its own choice; bins without
    a pair are left out. margins [P]: reward of chosen minus reward of rejected."""
    confidence, right = torch.sigmoid(margins.abs()).double(), (margins > 0).double()
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    counts, sure, won = (torch.zeros(bins, dtype=torch.float64).index_add(0, place, x) for x in (torch.ones_like(right), confidence, right))
    edges = [0.5 + 0.5 * edge / bins for edge in range(bins + 1)]
    return [
        Reliability(edges[i], edges[i + 1], int(count), float(sure[i] / count), float(won[i] / count))
        for i, count in enumerate(counts.tolist())
        if count
    ]


def calibration_error(margins: Tensor, *, bins: int = 10) -> float:
    """Expected calibration error: how far confidence is from accuracy, by the rows of `reliability`, weighted by their pairs."""
    return sum(row.pairs * abs(row.accuracy - row.confidence) for row in reliability(margins, bins=bins)) / len(margins)


def rewards_of(model: nn.Module, prepared: Prepared, *, rows: int) -> Tensor:
    """The reward of each row, [rows] fp32 on the CPU in the rows' order, `rows` bins at a time."""
    device = next(model.parameters()).device
    with at_rest(model):
        return torch.from_numpy(by_row(prepared, lambda batch: document_rewards(model, batch.to(device)), rows=rows, what="rewards"))


def pessimistic(rewards: Tensor, *, caution: float = 1.0) -> Tensor:
    """Of rewards [M, N] by M models, the mean less `caution` standard deviations, [N]: low where they disagree
    (arXiv:2310.02743). Each model's rewards should have been centered, as they are known up to a constant."""
    return rewards.mean(0) - caution * rewards.std(0, correction=0)
