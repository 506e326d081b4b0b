"""Preference learning without rollouts: of two answers to a prompt, the better one is to become likelier than the other.

All methods share one core: the log-probability that the model, and a frozen reference, give each document of a batch, whose
documents come in pairs side by side (chosen, rejected). A method is then what it makes of a pair's four numbers. DPO
(arXiv:2305.18290), its smoothed and robust forms (2403.00409), SLiC's hinge (2305.10425), IPO (2310.12036), KTO (2402.01306),
SimPO (2405.14734), ORPO (2403.07691). A prompt that both sides share is computed once, where the model can do so.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .logprobs import document_logprobs, lengths, pairs_of
from .objectives import Objective
from .reference import reference_logprobs

if TYPE_CHECKING:
    from ..data.batch import Batch

# What is shown of each pair. The last two tell learning from length: the accuracy where the chosen side is the longer, and where not.
PAIRS = ("chosen_reward", "rejected_reward", "margin", "accuracy", "chosen_logprob", "rejected_logprob", "chosen_length", "rejected_length")
SPLIT = ("accuracy_longer", "accuracy_shorter")


@dataclass(frozen=True)
class Sides:
    """Of each of P pairs, [P] each: the summed log-probability of either side's answer under the model, with gradients, the
    same under the reference (None where the method has none), and how many tokens were summed."""

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    chosen_reference: Tensor | None = None
    rejected_reference: Tensor | None = None

    def ratios(self) -> tuple[Tensor, Tensor]:
        """log (model / reference) of either side."""
        assert self.chosen_reference is not None and self.rejected_reference is not None
        return self.chosen - self.chosen_reference, self.rejected - self.rejected_reference

    def means(self) -> tuple[Tensor, Tensor]:
        """Log-probability per token of either side."""
        return self.chosen / self.chosen_length, self.rejected / self.rejected_length


class Preference(Objective):
    """What the methods of pairs share. A method says what it takes for the reward of a side, and its loss; the unit is the pair."""

    @property
    def refers(self) -> bool:
        """Whether there is a reference."""
        return True

    @property
    def measured(self) -> Collection[str]:
        return (*PAIRS, *SPLIT, *(("kl", "chosen_gain") if self.refers else ()))

    def rewards(self, sides: Sides) -> tuple[Tensor, Tensor]:
        """The implicit reward [P] of either side, in the units of the loss."""
        raise NotImplementedError

    def loss(self, sides: Sides) -> Tensor:
        """The loss [P] of each pair."""
        raise NotImplementedError

    def weights(self, batch: Batch) -> dict[str, float]:
        chosen, rejected = pairs_of(lengths(batch), batch)
        found = dict.fromkeys(("loss", *self.measured), float(len(chosen)))
        return {**found, "accuracy_longer": float((chosen > rejected).sum()), "accuracy_shorter": float((chosen < rejected).sum())}

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        sides = self.sides(model, batch)
        return {"loss": self.loss(sides).sum(), **self.measures(sides)}

    def sides(self, model: nn.Module, batch: Batch) -> Sides:
        """The pairs of `batch` under `model` and its reference."""
        chosen, rejected = pairs_of(document_logprobs(model, batch, pairs=True), batch)
        sizes = pairs_of(lengths(batch).to(chosen.dtype), batch)
        reference = pairs_of(reference_logprobs(model, batch), batch) if self.refers else (None, None)
        return Sides(chosen, rejected, *sizes, *reference)

    @torch.no_grad()
    def measures(self, sides: Sides) -> dict[str, Tensor]:
        """Sums over pairs. `kl` is the mean log-ratio of both sides: an estimate of the divergence from the reference, as far
        as the rows are such as the model would write. `chosen_gain` is that of the chosen sides: below 0, they became less likely."""
        good, bad = self.rewards(sides)
        right = (good > bad).to(good.dtype)
        longer, shorter = sides.chosen_length > sides.rejected_length, sides.chosen_length < sides.rejected_length
        each = (good, bad, good - bad, right, sides.chosen, sides.rejected, sides.chosen_length, sides.rejected_length)
        found = {name: value.sum() for name, value in zip(PAIRS, each, strict=True)}
        found |= {"accuracy_longer": right[longer].sum(), "accuracy_shorter": right[shorter].sum()}
        if self.refers:
            gained, other = sides.ratios()
            found |= {"kl": (gained + other).sum() / 2, "chosen_gain": gained.sum()}
        return found


class Scaled(Preference):
    """The reward is beta log (model / reference), as is the KL-regularized optimum's up to a constant of the prompt."""

    beta: float = Field(0.1, gt=0, description="how strongly the model is held to the reference")

    def rewards(self, sides: Sides) -> tuple[Tensor, Tensor]:
        chosen, rejected = sides.ratios()
        return self.beta * chosen, self.beta * rejected

    def margin(self, sides: Sides) -> Tensor:
        chosen, rejected = self.rewards(sides)
        return chosen - rejected


class DPO(Scaled):
    """-log sigmoid of the margin of rewards (arXiv:2305.18290). `label_smoothing`: the share of pairs believed to be the wrong
    way round (cDPO). `per_token`: rewards are divided by their answers' lengths."""

    kind: Literal["dpo"] = "dpo"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs believed to be the wrong way round (cDPO)")
    per_token: bool = Field(False, description="divide rewards by length, so that beta is per token")

    @classmethod
    def tiny(cls) -> DPO:
        return cls(beta=0.3, label_smoothing=0.1)

    def rewards(self, sides: Sides) -> tuple[Tensor, Tensor]:
        chosen, rejected = super().rewards(sides)
        return (chosen / sides.chosen_length, rejected / sides.rejected_length) if self.per_token else (chosen, rejected)

    def loss(self, sides: Sides) -> Tensor:
        return smoothed(self.margin(sides), self.label_smoothing)


class RobustDPO(Scaled):
    """DPO whose expected loss is that of clean labels, if the share `flipped` of the labels is (arXiv:2403.00409)."""

    kind: Literal["robust_dpo"] = "robust_dpo"
    flipped: float = Field(0.1, ge=0, lt=0.5, description="share of labels that are the wrong way round")

    @classmethod
    def tiny(cls) -> RobustDPO:
        return cls(flipped=0.2)

    def loss(self, sides: Sides) -> Tensor:
        margin = self.margin(sides)
        return (self.flipped * F.logsigmoid(-margin) - (1 - self.flipped) * F.logsigmoid(margin)) / (1 - 2 * self.flipped)


class Hinge(Scaled):
    """max(0, 1 - margin): pairs that are apart far enough teach no more (SLiC, arXiv:2305.10425)."""

    kind: Literal["hinge"] = "hinge"

    @classmethod
    def tiny(cls) -> Hinge:
        return cls(beta=0.05)

    def loss(self, sides: Sides) -> Tensor:
        return torch.relu(1 - self.margin(sides))


class IPO(Scaled):
    """(difference of log-ratios - 1 / (2 beta))^2: a target instead of a limit, so that pairs which all agree do not drive the
    model away from the reference without end (arXiv:2310.12036). `per_token`, as its authors ran it, takes means over tokens."""

    kind: Literal["ipo"] = "ipo"
    per_token: bool = Field(True, description="log-ratios are means over an answer's tokens, not sums")

    @classmethod
    def tiny(cls) -> IPO:
        return cls()

    def rewards(self, sides: Sides) -> tuple[Tensor, Tensor]:
        chosen, rejected = super().rewards(sides)
        return (chosen / sides.chosen_length, rejected / sides.rejected_length) if self.per_token else (chosen, rejected)

    def loss(self, sides: Sides) -> Tensor:
        return (self.margin(sides) / self.beta - 1 / (2 * self.beta)) ** 2


class SimPO(Preference):
    """-log sigmoid(beta (difference of log-probabilities per token) - gamma), without a reference (arXiv:2405.14734)."""

    kind: Literal["simpo"] = "simpo"
    beta: float = Field(2.0, gt=0, description="what a log-probability per token is multiplied by")
    gamma: float = Field(1.0, ge=0, description="the margin that is asked for")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs believed to be the wrong way round")

    @classmethod
    def tiny(cls) -> SimPO:
        return cls(gamma=0.5)

    @property
    def refers(self) -> bool:
        return False

    def rewards(self, sides: Sides) -> tuple[Tensor, Tensor]:
        chosen, rejected = sides.means()
        return self.beta * chosen, self.beta * rejected

    def loss(self, sides: Sides) -> Tensor:
        chosen, rejected = self.rewards(sides)
        return smoothed(chosen - rejected - self.gamma, self.label_smoothing)


class ORPO(Preference):
    """Next-token prediction of the chosen answers (`loss`, per token) and `weight` times -log sigmoid of the log odds ratio of
    the two sides (`odds`, per pair), whose probabilities are geometric means over tokens (arXiv:2403.07691)."""

    kind: Literal["orpo"] = "orpo"
    weight: float = Field(0.1, gt=0, description="of the odds ratio's term")

    @classmethod
    def tiny(cls) -> ORPO:
        return cls(weight=0.5)

    @property
    def refers(self) -> bool:
        return False

    def rewards(self, sides: Sides) -> tuple[Tensor, Tensor]:
        chosen, rejected = sides.means()
        return self.weight * chosen, self.weight * rejected

    def loss(self, sides: Sides) -> Tensor:
        """The odds ratio's part."""
        chosen, rejected = sides.means()
        return -self.weight * F.logsigmoid(log_odds(chosen) - log_odds(rejected))

    def weights(self, batch: Batch) -> dict[str, float]:
        found = super().weights(batch)
        return {**found, "loss": float(pairs_of(lengths(batch), batch)[0].sum()), "odds": found["loss"]}

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        sides = self.sides(model, batch)
        return {"loss": -sides.chosen.sum(), "odds": self.loss(sides).sum(), **self.measures(sides)}


class KTO(Objective):
    """Answers that were liked or not, each by itself (arXiv:2402.01306): 1 - sigmoid of the log-ratio above (liked) or below
    (disliked) a point of reference, the divergence from the reference as prompts with answers to other prompts show it.

    In a batch's pairs the first document is the answer, whose `label` is 1 or -1, the second such a mismatch.
    """

    kind: Literal["kto"] = "kto"
    beta: float = Field(0.1, gt=0, description="how strongly the model is held to the reference")
    desirable: float = Field(1.0, gt=0, description="weight of answers that were liked")
    undesirable: float = Field(1.0, gt=0, description="weight of answers that were not; with few of one kind, raise its weight")

    @classmethod
    def tiny(cls) -> KTO:
        return cls(undesirable=1.5)

    @property
    def coupled(self) -> str:
        return "all of them share KTO's point of reference"

    @property
    def measured(self) -> Collection[str]:
        return ("chosen_reward", "rejected_reward", "accuracy", "chosen_logprob", "chosen_gain", "chosen_length", "rejected_length", "kl")

    def weights(self, batch: Batch) -> dict[str, float]:
        liked = pairs_of(batch.values["label"], batch)[0] > 0
        counts = {"chosen": float(liked.sum()), "rejected": float((~liked).sum())}
        return {name: counts.get(name.partition("_")[0], float(len(liked))) for name in ("loss", *self.measured)}

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logprobs, other = pairs_of(document_logprobs(model, batch, pairs=True), batch)
        reference, other_reference = pairs_of(reference_logprobs(model, batch), batch)
        liked = pairs_of(batch.values["label"], batch)[0] > 0
        ratios = logprobs - reference
        point = (other - other_reference).detach().mean().clamp(min=0)
        with torch.no_grad():
            size = pairs_of(lengths(batch).to(ratios.dtype), batch)[0]
            found = {
                "chosen_reward": self.beta * ratios[liked].sum(),
                "rejected_reward": self.beta * ratios[~liked].sum(),
                "accuracy": ((ratios > point) == liked).to(ratios.dtype).sum(),
                "chosen_logprob": logprobs[liked].sum(),
                "chosen_gain": ratios[liked].sum(),
                "chosen_length": size[liked].sum(),
                "rejected_length": size[~liked].sum(),
                "kl": point * len(ratios),
            }
        return {"loss": self.loss(ratios, liked, point).sum(), **found}

    def loss(self, ratios: Tensor, liked: Tensor, point: Tensor) -> Tensor:
        """The loss [N] of log-ratios [N], of which those in `liked` [N] were; `point` [] is the point of reference."""
        value = self.beta * torch.where(liked, ratios - point, point - ratios)
        return torch.where(liked, self.desirable, self.undesirable) * (1 - torch.sigmoid(value))


def smoothed(margin: Tensor, smoothing: float) -> Tensor:
    """-log sigmoid(margin), were the share `smoothing` of the pairs the wrong way round. [P]."""
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def log_odds(logprob: Tensor) -> Tensor:
    """log (p / (1 - p)) of a log-probability; exact where p is nearly 1 or nearly 0. At p = 1 it is that of the number below."""
    logprob = logprob.clamp(max=-torch.finfo(logprob.dtype).tiny)
    return logprob - torch.log(-torch.expm1(logprob))
