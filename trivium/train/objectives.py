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

    For mixtures of experts: `balance` and `router_z`, summed over layers, whose unit is the token (padding apart), and the
    correction that balances without a loss.
    """

    kind: Literal["next_token"] = "next_token"
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0, description="share of each target's probability spread over the whole vocabulary")
    balance: float = Field(0.0, ge=0, description="coefficient of the routers' balance loss (Switch: 0.01); 0: none")
    router_z: float = Field(0.0, ge=0, description="coefficient of the routers' z loss (ST-MoE: 0.001); 0: none")
    correction_speed: float = Field(0.0, ge=0, description="what routers' corrections move by after each update (DeepSeek-V3: 0.001)")

    @classmethod
    def tiny(cls) -> NextToken:
        return cls(label_smoothing=0.1)

    @property
    def exempt(self) -> Mapping[str, str]:
        why = "balance: the loss of a micro-batch is of its own loads and mean scores, so a batch's is not the sum of theirs"
        return {"linear in rows": why} if self.balance else {}

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"loss": float(batch.targets.sum()), **dict.fromkeys(self._routed(), float((batch.segments >= 0).sum()))}

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
        keep = torch.zeros_like(batch.targets)
        keep[:, :-1] = batch.targets[:, 1:]  # a position's logits speak of the token after it
        inputs, labels = Inputs(batch.tokens, segments=batch.segments), batch.tokens[batch.targets]
        table = model.head.table(model.embed) if isinstance(model, TransformerModel) and isinstance(model.head, LanguageHead) else None
        if table is not None:
            output = model(inputs, keep="none")
            loss = linear_cross_entropy_sum(output.hidden[keep], table, labels, label_smoothing=self.label_smoothing)
        else:
            output = model(inputs, keep=keep)
            loss = cross_entropy_sum(output.logits, labels, label_smoothing=self.label_smoothing)
        if self.correction_speed and model.training:
            self._see(model, output.aux)
        return {"loss": loss, **{name: c * self._total(output.aux, name) for name, c in self._routed().items()}}

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


def corrections(model: nn.Module) -> dict[str, Correction]:
    """The corrections of the model's routers, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Correction)}
