"""Objectives: what a batch is trained on, as sums and weights, so that micro-batches and ranks add up to one batch exactly.

`weights` needs no model: the loop adds it over the whole global batch before the first forward and gives each term of
`terms` its share. Supervised fine-tuning is next-token prediction on batches whose `targets` leave the prompts out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.registry import Registry
from ..core.spec import Part
from ..models.transformer import TransformerModel
from ..nn.heads import LanguageHead
from ..nn.inputs import Aux, Inputs
from ..nn.moe import MoELayer
from ..nn.routing import Correction
from .cross_entropy import cross_entropy_sum, linear_cross_entropy_sum

if TYPE_CHECKING:
    from ..data.batch import Batch


class Objective(Part, registry=Registry("objective", "trivium.train")):
    """Root of the objectives. Every term is a sum that is linear in rows, and its weight counts what was summed; a term that
    is not linear is declared in `exempt`. Terms that `measured` names are shown and not learned; a batch may hold none of theirs."""

    @property
    def measured(self) -> Collection[str]:
        """The terms without gradients."""
        return ()

    @property
    def coupled(self) -> str | None:
        """Why rows of a batch need each other, if they do: such a batch is never split."""
        return None

    def positions(self, batch: Batch) -> int:
        """At how many positions logits over the vocabulary are made, for the plan of a run."""
        return int(batch.targets.sum())

    def weights(self, batch: Batch) -> dict[str, float]:
        """By term: how much `batch` weighs, in the term's unit (targets, rows, ...)."""
        raise NotImplementedError

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """By term: the sum [] over `batch`, with gradients."""
        raise NotImplementedError

    def updated(self, model: nn.Module) -> None:
        """Called after each update of a model in training: what moves without a gradient moves now."""

    def moved(self, model: nn.Module) -> dict[str, Tensor]:
        """What `updated` moves, by name in the model, for checkpoints to hold beside what has gradients."""
        return {}


class NextToken(Objective):
    """Cross-entropy of each target token given what stands before it in its document; the unit is the target.

    With `prompt_weight`, tokens that are context alone (prompts, turns that are not trained) count too, each as so much of a
    target: instruction modelling (arXiv:2405.14394) beside instruction masking. What each kind loses by itself is then measured,
    as `answer_loss` and `prompt_loss`. For mixtures of experts: `balance` and `router_z`, summed over layers, whose unit is the
    token (padding apart), and the correction that balances without a loss.
    """

    kind: Literal["next_token"] = "next_token"
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0, description="share of each target's probability spread over the whole vocabulary")
    prompt_weight: float = Field(
        0.0, ge=0, description="what a token of a prompt counts, as a share of a target; 0: prompts are not learned"
    )
    balance: float = Field(0.0, ge=0, description="coefficient of the routers' balance loss (Switch: 0.01); 0: none")
    router_z: float = Field(0.0, ge=0, description="coefficient of the routers' z loss (ST-MoE: 0.001); 0: none")
    correction_speed: float = Field(0.0, ge=0, description="what routers' corrections move by after each update (DeepSeek-V3: 0.001)")

    @classmethod
    def tiny(cls) -> NextToken:
        return cls(label_smoothing=0.1)

    @classmethod
    def exempted(cls) -> NextToken:
        return cls(balance=0.01)

    @property
    def exempt(self) -> Mapping[str, str]:
        why = "balance: the loss of a micro-batch is of its own loads and mean scores, so a batch's is not the sum of theirs"
        return {"linear in rows": why} if self.balance else {}

    @property
    def measured(self) -> Collection[str]:
        return ("answer_loss", "prompt_loss") if self.prompt_weight else ()

    def positions(self, batch: Batch) -> int:
        return super().positions(batch) + (int(prompts(batch).sum()) if self.prompt_weight else 0)

    def weights(self, batch: Batch) -> dict[str, float]:
        answers, found = float(batch.targets.sum()), {}
        if self.prompt_weight:
            asked = float(prompts(batch).sum())
            found = {"answer_loss": answers, "prompt_loss": asked}
            answers += self.prompt_weight * asked
        return {"loss": answers, **found, **dict.fromkeys(self._routed(), float((batch.segments >= 0).sum()))}

    def _routed(self) -> dict[str, float]:
        """The routers' terms that are asked for, with their coefficients."""
        return {name: c for name, c in (("balance", self.balance), ("router_z", self.router_z)) if c}

    def updated(self, model: nn.Module) -> None:
        if self.correction_speed:
            for correction in corrections(model).values():
                correction.move(self.correction_speed)

    def moved(self, model: nn.Module) -> dict[str, Tensor]:
        return {f"{name}.weight": one.weight.detach() for name, one in corrections(model).items()} if self.correction_speed else {}

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        kinds = {"answer_loss": batch.targets, **({"prompt_loss": prompts(batch)} if self.prompt_weight else {})}
        losses, aux = self._losses(model, batch, kinds)
        if self.correction_speed and model.training:
            self._see(model, aux)
        loss, found = losses["answer_loss"], {}
        if self.prompt_weight:
            found = {name: part.detach() for name, part in losses.items()}
            loss = loss + self.prompt_weight * losses["prompt_loss"]
        return {"loss": loss, **found, **{name: c * self._total(aux, name) for name, c in self._routed().items()}}

    def _losses(self, model: nn.Module, batch: Batch, kinds: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Aux]:
        """The summed cross-entropy of the tokens that each selector [B, T] of `kinds` chooses, in one forward."""
        inputs, smoothing = Inputs(batch.tokens, segments=batch.segments), self.label_smoothing
        before = {name: _before(chosen) for name, chosen in kinds.items()}
        table = model.head.table(model.embed) if isinstance(model, TransformerModel) and isinstance(model.head, LanguageHead) else None
        if table is not None:
            output = model(inputs, keep="none")
            losses = {
                name: linear_cross_entropy_sum(output.hidden[before[name]], table, batch.tokens[chosen], label_smoothing=smoothing)
                for name, chosen in kinds.items()
            }
        else:
            every = torch.stack(list(before.values())).any(0)
            output = model(inputs, keep=every)
            logits = {name: output.logits if len(kinds) == 1 else output.logits[own[every]] for name, own in before.items()}
            losses = {
                name: cross_entropy_sum(logits[name], batch.tokens[chosen], label_smoothing=smoothing) for name, chosen in kinds.items()
            }
        return losses, output.aux

    def _total(self, aux: Aux, name: str) -> Tensor:
        total = aux.total(name)
        if total is None:
            raise ConfigError(f"objective.{name}: this model has no router; leave {name} out, or use a mixture of experts", field=name)
        return total

    def _see(self, model: nn.Module, aux: Aux) -> None:
        """Count in the loads of the layers whose routers have a correction."""
        routed = [module for module in model.modules() if isinstance(module, MoELayer) and module.router.correction is not None]
        if not routed:
            raise ConfigError(
                "objective.correction_speed: no router of this model has a correction; leave it out, or set ffn.correction",
                field="correction_speed",
            )
        for layer in routed:
            assert layer.router.correction is not None
            layer.router.correction.see(aux.loads[layer.layer])


def prompts(batch: Batch) -> Tensor:
    """Which tokens [B, T] stand in a document after its first, and are no targets."""
    inside = batch.segments >= 0
    inside[:, 1:] &= batch.segments[:, 1:] == batch.segments[:, :-1]
    inside[:, 0] = False
    return inside & ~batch.targets


def _before(chosen: Tensor) -> Tensor:
    """The positions [B, T] whose logits speak of the tokens that `chosen` selects: those before them."""
    found = torch.zeros_like(chosen)
    found[:, :-1] = chosen[:, 1:]
    return found


def corrections(model: nn.Module) -> dict[str, Correction]:
    """The corrections of the model's routers, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Correction)}
