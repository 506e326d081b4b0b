"""Mixtures of experts: their loss at the compute of one dense mlp, and what balancing does to the experts' loads."""

from __future__ import annotations

from typing import Any

import torch

from ...models import count
from ...models.transformer import TransformerModel
from ...nn.feedforward import MLP
from ...nn.inputs import Inputs
from ...nn.moe import MoE
from ...nn.routing import load_entropy
from ...train.objectives import NextToken
from . import Result, experiment, small


@torch.no_grad()
def entropy(model: TransformerModel) -> float:
    """Of the experts' loads on held-out text as a share of the largest there is, mean over layers."""
    tokens = torch.from_numpy(small.banks()[1].tokens[:8192].astype("int64")).view(-1, small.LENGTH)
    loads = model(Inputs(tokens), keep="none").aux.loads
    return small.mean(load_entropy(load) for load in loads.values())


@experiment(
    "experts", "T03.04", question="At equal FLOPs, does a mixture of experts beat a dense mlp, and does balancing keep its experts busy?"
)
def experts(effort: float) -> Result:
    """A dense mlp of width 160 against 8 experts of width 80, two for each token, five seeds paired; balanced by a loss, by correction,
    and not at all."""
    steps, seeds = small.steps_of(500, effort), tuple(range(5))
    moe = MoE(experts=8, top_k=2, expert=MLP(hidden=80))
    sides: dict[str, tuple[Any, NextToken]] = {
        "dense": (MLP(hidden=160), NextToken()),
        "balance loss": (moe, NextToken(balance=0.01)),
        "correction": (moe.replace(correction=True), NextToken(correction_speed=0.01)),
        "not balanced": (moe, NextToken()),
    }
    numbers: dict[str, Any] = {"steps": steps}
    losses: dict[str, list[float]] = {}
    entropies: dict[str, list[float]] = {}
    for name, (ffn, objective) in sides.items():
        models = [small.train(small.shape(ffn=ffn), steps=steps, seed=seed, objective=objective)[0] for seed in seeds]
        losses[name] = [small.held_out(model) for model in models]
        numbers[name] = {
            "held-out loss by seed": losses[name],
            "parameters": count.parameters(models[0]).total,
            "FLOPs of a token": count.decoding_flops(models[0], held=0),
        }
        if name != "dense":
            entropies[name] = numbers[name]["load entropy by seed"] = [entropy(model) for model in models]
    gap = small.paired(losses["dense"], losses["balance loss"])
    numbers["balanced less dense, nats"] = gap
    busy, idle = min(entropies["balance loss"]), small.mean(entropies["not balanced"])
    return Result(numbers, verdict_on_experts(gap, busy, min(entropies["correction"]), idle), seeds)


def verdict_on_experts(gap: dict[str, float], busy: float, corrected: float, idle: float) -> str:
    """`gap`: balanced less dense. Load entropies as shares of the largest: the least with each way of balancing, the mean without."""
    return (
        f"{'Holds' if gap['high'] < 0 else 'Not settled at this size'}: at equal FLOPs, {gap['mean']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f}) "
        f"nats against dense. Load entropy is at least {busy:.2f} of the largest with the balance loss (over 0.9 "
        f"{'holds' if busy > 0.9 else 'does not hold'}), {corrected:.2f} with the correction, {idle:.2f} without: collapse without "
        f"balancing {'holds' if idle < 0.5 else 'does not hold at this size'}."
    )
