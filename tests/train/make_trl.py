"""Writes trl.json: TRL's preference losses, and their gradients, of the random numbers of `numbers`.

Run in an environment of its own, which the tests do not need:
    pip install torch trl==1.16.0 && python tests/train/make_trl.py
Its trainers' own functions are called, on a stand-in for the trainer and a model that answers with given log-probabilities.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

TARGET = Path(__file__).with_name("trl.json")
PAIRS, LONGEST = 6, 7

ACCELERATOR = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
# name in trl.json: what DPOTrainer is set to
DPO = {
    "dpo": {"loss_types": ["sigmoid"], "beta": 0.3},
    "dpo_per_token": {"loss_types": ["sigmoid_norm"], "beta": 2.0},
    "hinge": {"loss_types": ["hinge"], "beta": 0.2},
    "ipo": {"loss_types": ["ipo"], "beta": 0.4},
    "robust_dpo": {"loss_types": ["robust"], "beta": 0.3, "label_smoothing": 0.2},
}


def numbers() -> dict[str, Tensor]:
    """Log-probabilities of tokens [2 P, T], chosen first, under model and reference, 0 beyond a row's end; lengths; more."""
    draws = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, LONGEST + 1, (2 * PAIRS,), generator=draws)
    mask = (torch.arange(LONGEST) < lengths[:, None]).float()
    logps, reference = (-2 * torch.rand(2 * PAIRS, LONGEST, generator=draws) * mask for _ in range(2))
    rewards, margin = torch.randn(2 * PAIRS, generator=draws), torch.rand(PAIRS, generator=draws)
    return {"mask": mask, "logps": logps, "reference": reference, "rewards": rewards, "margin": margin}


def graded(loss: Tensor, leaf: Tensor, rewards: tuple[float, float] | None = None) -> dict[str, object]:
    """The loss, its gradients and, where the trainer shows them, the mean rewards of chosen and rejected."""
    return {"loss": loss.item(), "grad": torch.autograd.grad(loss, leaf)[0].tolist(), **({"rewards": rewards} if rewards else {})}


def shown(trainer: SimpleNamespace) -> tuple[float, float]:
    """The mean rewards that a trainer noted."""
    chosen, rejected = (trainer._metrics["train"][f"rewards/{side}"][-1] for side in ("chosen", "rejected"))
    return chosen, rejected


def answering(logps: Tensor):
    """A model whose answer is `logps`."""
    nothing = torch.zeros_like(logps)
    return lambda **_: SimpleNamespace(log_probs=logps, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


def shared(**settings: object) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "model": SimpleNamespace(training=True),
            "accelerator": ACCELERATOR,
            "aux_loss_enabled": False,
            "precompute_ref_logps": True,
            "_metrics": {"train": defaultdict(list)},
            "_total_train_tokens": 0,
            "_tp_size": 1,
            "loss_weights": [1.0],
            "label_smoothing": 0.0,
            "f_divergence_type": "reverse_kl",
            "ld_alpha": None,
            "use_weighting": False,
            **settings,
        }
    )


def dpo(drawn: dict[str, Tensor], **settings: object) -> dict[str, object]:
    logps = drawn["logps"].clone().requires_grad_()
    mask = torch.nn.functional.pad(drawn["mask"], (1, 0)).long()  # a prompt of one token
    chosen, rejected = drawn["reference"].sum(1).chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    trainer = shared(**settings)
    return graded(DPOTrainer._compute_loss(trainer, answering(logps), inputs, return_outputs=False), logps, shown(trainer))


def kto(drawn: dict[str, Tensor], *, labels: list[bool], **settings: object) -> dict[str, object]:
    """The first half of the rows are the answers, the second their mismatches."""
    logps = drawn["logps"].clone().requires_grad_()
    own, other = logps.chunk(2)
    reference, other_reference = drawn["reference"].sum(1).chunk(2)
    mask = torch.nn.functional.pad(drawn["mask"][:PAIRS], (1, 0)).long()
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": torch.tensor(labels),
        "ref_logps": reference,
        "ref_KL_logps": other_reference,
    }
    trainer = shared(calculate_KL=True, loss_type="kto", _compute_kl_logps=lambda *_: other.detach().sum(1), **settings)
    return graded(KTOTrainer._compute_loss(trainer, answering(own), inputs, return_outputs=False), logps, shown(trainer))


def cpo(drawn: dict[str, Tensor], **settings: object) -> dict[str, object]:
    """SimPO of means over tokens; or cDPO, which the DPO trainer of this release cannot smooth, of log-ratios."""
    logps = drawn["logps"].clone().requires_grad_()
    trainer = SimpleNamespace(**{"accelerator": ACCELERATOR, "alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.5, **settings})
    given = logps.sum(1) / drawn["mask"].sum(1) if trainer.loss_type == "simpo" else (logps - drawn["reference"]).sum(1)
    losses, *rewards = CPOTrainer.cpo_loss(trainer, *given.chunk(2))
    return graded(losses.mean(), logps, (rewards[0].mean().item(), rewards[1].mean().item()))


def orpo(drawn: dict[str, Tensor]) -> dict[str, object]:
    logps = drawn["logps"].clone().requires_grad_()
    trainer = SimpleNamespace(accelerator=ACCELERATOR, beta=0.5)
    losses = ORPOTrainer.odds_ratio_loss(trainer, *(logps.sum(1) / drawn["mask"].sum(1)).chunk(2))[0]
    return graded(-losses.mean(), logps)


def reward(drawn: dict[str, Tensor], *, margin: bool, center: float | None) -> dict[str, object]:
    rewards = drawn["rewards"].clone().requires_grad_()
    trainer = shared(args=SimpleNamespace(center_rewards_coefficient=center))
    inputs = {"attention_mask": torch.ones(1), **({"margin": drawn["margin"]} if margin else {})}

    def model(**_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=rewards[:, None])

    return graded(RewardTrainer.compute_loss(trainer, model, inputs), rewards)


def main() -> None:
    drawn = numbers()
    found = {name: dpo(drawn, **settings) for name, settings in DPO.items()}
    found["kto"] = kto(drawn, labels=[True, False, True, True, False, False], beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
    found["cdpo"] = cpo(drawn, loss_type="sigmoid", beta=0.3, label_smoothing=0.1)
    found["simpo"] = cpo(drawn, loss_type="simpo", beta=2.0)
    found["simpo_smoothed"] = cpo(drawn, loss_type="simpo", beta=2.0, label_smoothing=0.1)
    found["orpo"] = orpo(drawn)
    found["reward"] = reward(drawn, margin=False, center=None)
    found["reward_margin"] = reward(drawn, margin=True, center=None)
    found["reward_centered"] = reward(drawn, margin=False, center=0.01)
    made = {
        "versions": {name: importlib.metadata.version(name) for name in ("trl", "torch")},
        "numbers": {name: tensor.tolist() for name, tensor in drawn.items()},
        "found": found,
    }
    TARGET.write_text(json.dumps(made) + "\n")


if __name__ == "__main__":
    main()
