"""What lets deep stacks train: residual connections, layer norm, where norms stand, warmup."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...core.errors import TriviumError
from ...models.transformer import Transformer, TransformerModel, build, initialize
from ...nn.activations import GELU
from ...nn.feedforward import MLP
from ...nn.inputs import Inputs
from ...nn.norms import Layer, NoNorm
from ...nn.residual import NoResidual, Plain
from ...optim.schedules import Constant
from . import Result, experiment, small


def unigram_entropy() -> float:
    """Of the training tokens, in nats: what a model knows that sees no context."""
    counts = torch.bincount(torch.from_numpy(small.banks()[0].tokens.astype("int64")), minlength=small.VOCAB).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


def gradient_ratio(model: TransformerModel) -> float:
    """The first layer's gradient norm over the last one's, on one batch; 0 where the last one's is 0 too."""
    batch = small.banks()[0]
    tokens = torch.from_numpy(batch.tokens[: 8 * small.LENGTH].astype("int64")).view(8, -1)
    model.zero_grad()
    logits = model(Inputs(tokens)).logits
    assert logits is not None
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    norms = [
        float(torch.stack([p.grad.square().sum() for p in layer.parameters() if p.grad is not None]).sum().sqrt())
        for layer in (model.layers[0], model.layers[-1])
    ]
    return norms[0] / norms[1] if norms[1] else 0.0


@experiment("residuals", "T01.06", question="Do residual connections let 100 layers train?")
def residuals(effort: float) -> Result:
    """The same 100 thin layers with and without residual connections, pre-norm, from GPT-2's start, seeds 0 and 1."""
    steps, floor = small.steps_of(400, effort), unigram_entropy()
    numbers: dict[str, Any] = {"layers": 100, "dim": 32, "steps": steps, "unigram entropy, nats": floor}
    found = {}
    for name, residual in (("with", Plain()), ("without", NoResidual())):
        spec = small.shape(dim=32, layers=100 if effort >= 1 else 8, residual=residual)
        models = [initialize(build(spec, device="cpu"), seed=seed) for seed in (0, 1)]
        ratios = [gradient_ratio(model) for model in models]
        losses = [
            small.held_out(small.train(spec, steps=steps, seed=seed, rows=8, lr=4e-3, model=model)[0]) for seed, model in enumerate(models)
        ]
        found[name] = (ratios, losses)
        numbers[name] = {"gradient norm, first over last layer, at the start": ratios, "held-out loss by seed": losses}
    return Result(numbers, verdict_on_residuals(found, floor), (0, 1))


def verdict_on_residuals(found: dict[str, tuple[list[float], list[float]]], floor: float) -> str:
    """Part by part. `found`: of each side, the gradient ratios and the losses by seed; "well below" is half a nat."""
    (ratios, losses), (broken, stuck) = found["with"], found["without"]
    low = sum(loss < floor - 0.5 for loss in losses)
    parts = {
        "with them, every seed ends below the unigram entropy": max(losses) < floor,
        "gradients of the first and last layer stay within 10 times": all(0.1 < ratio < 10 for ratio in ratios),
        "without them the gradient vanishes (under 1e-4 of the last layer's) and the loss stays at or over the unigram entropy": max(broken)
        < 1e-4
        and min(stuck) > floor - 0.1,
    }
    told = "; ".join(f"{what}: {'holds' if holds else 'does not hold'}" for what, holds in parts.items())
    by_seed = ", ".join(f"{loss:.2f}" for loss in losses)
    return (
        f"{told}; half a nat below it within these steps: {low} of {len(losses)} seeds. 100 layers reach {by_seed} nats with residual "
        f"connections and {small.mean(stuck):.2f} without (unigram entropy {floor:.2f})."
    )


def trains(spec: Transformer, lr: float, seed: int, steps: int, *, warmup: float = 0.0) -> float:
    """Held-out loss after training at a constant rate; infinite where a loss was not finite."""
    try:
        return small.held_out(small.train(spec, steps=steps, seed=seed, lr=lr, schedule=Constant(warmup=warmup), rows=8)[0])
    except TriviumError:
        return math.inf


@experiment("layer-norm", "T01.07", question="Does layer norm allow higher learning rates?")
def layer_norm(effort: float) -> Result:
    """The largest constant rate, in steps of a factor of about 3, at which a 6-layer model still ends below the unigram entropy."""
    steps, floor = small.steps_of(150, effort), unigram_entropy()
    rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    numbers: dict[str, Any] = {"steps": steps, "unigram entropy, nats": floor, "rates": rates}
    largest: dict[str, list[float]] = {}
    for name, norm in (("with", Layer()), ("without", NoNorm())):
        base = small.shape(layers=6, norm=norm)
        spec = base.replace(final_norm=norm)
        losses = {seed: [trains(spec, rate, seed, steps) for rate in rates] for seed in (0, 1, 2)}
        largest[name] = [max((r for r, loss in zip(rates, row, strict=True) if loss < floor - 0.3), default=0.0) for row in losses.values()]
        numbers[name] = {
            "held-out loss by seed and rate": {str(k): [x if math.isfinite(x) else None for x in v] for k, v in losses.items()}
        }
        numbers[name]["largest stable rate by seed"] = largest[name]
    holds = min(largest["with"]) > max(largest["without"])
    verdict = (
        f"{'Holds' if holds else 'Does not hold'}: the largest rate that trains is {largest['with']} with layer norm and {largest['without']} "
        f"without, by seed."
    )
    return Result(numbers, verdict, (0, 1, 2))


@experiment("norm-placement", "T17.03", "T10.05", question="Does post-norm need warmup where pre-norm does not?")
def norm_placement(effort: float) -> Result:
    """12 layers, pre and post norm, without warmup and with (a third of the steps), over learning rates; layer norm, GELU."""
    steps = small.steps_of(180, effort)
    rates, seeds = (1e-3, 3e-3, 6e-3), (0, 1, 2)
    numbers: dict[str, Any] = {"layers": 12, "steps": steps, "rates": rates}
    losses: dict[tuple[str, str], dict[float, list[float]]] = {}
    for norm_at in ("pre", "post"):
        mlp = MLP(hidden=256, activation=GELU(), gated=False)
        spec = small.shape(dim=64, layers=12, norm=Layer(), norm_at=norm_at, ffn=mlp).replace(
            final_norm=Layer() if norm_at == "pre" else NoNorm()
        )
        start = initialize(build(spec, device="cpu"), seed=0)
        numbers[f"{norm_at}: gradient norm, first over last layer, at the start"] = gradient_ratio(start)
        for name, warmup in (("none", 0.0), ("a third", 1 / 3)):
            losses[norm_at, name] = {rate: [trains(spec, rate, seed, steps, warmup=warmup) for seed in seeds] for rate in rates}
            numbers[f"{norm_at}, warmup {name}: held-out loss by rate and seed"] = {
                str(rate): [x if math.isfinite(x) else None for x in row] for rate, row in losses[norm_at, name].items()
            }
    floor = unigram_entropy()

    def failed(norm_at: str, warmup: str) -> int:
        return sum(loss > floor - 0.3 for row in losses[norm_at, warmup].values() for loss in row)

    cases = len(rates) * len(seeds)
    counts = {f"{n}, warmup {w}": failed(n, w) for n in ("pre", "post") for w in ("none", "a third")}
    numbers["runs that end near the unigram entropy or diverge"] = counts
    holds = failed("post", "none") > failed("post", "a third") and failed("pre", "none") == 0
    listed = ", ".join(f"{name} {count} of {cases}" for name, count in counts.items())
    return Result(numbers, f"{'Holds' if holds else 'Does not hold at this size'}: runs that fail to train: {listed}.", seeds)


@experiment("attention-scale", "T01.01", question="Does dividing by sqrt(d) keep the variance of scores at one?")
def attention_scale(effort: float) -> Result:
    """Queries and keys drawn from a unit normal; entropy of softmax over 512 keys."""
    numbers: dict[str, Any] = {}
    worst, saturated = 0.0, math.inf
    for dim in (16, 64, 256, 1024):
        torch.manual_seed(dim)
        q, k = torch.randn(1024, dim, dtype=torch.float64), torch.randn(512, dim, dtype=torch.float64)
        scores = q @ k.T
        entropies = [float(-(w * w.clamp_min(1e-300).log()).sum(-1).mean()) for w in (scores.softmax(-1), (scores / dim**0.5).softmax(-1))]
        numbers[str(dim)] = {
            "variance": float(scores.var()),
            "variance, scaled": float(scores.var() / dim),
            "entropy": entropies[0],
            "entropy, scaled": entropies[1],
        }
        worst = max(worst, abs(float(scores.var()) / dim - 1))
        saturated = min(saturated, entropies[0])
    holds = worst < 0.05 and saturated < 0.2
    verdict = (
        f"{'Holds' if holds else 'Does not hold'}: scaled variance is 1 within {worst:.1%}; unscaled softmax over 512 keys falls to "
        f"{saturated:.3f} nats."
    )
    return Result(numbers, verdict, (16, 64, 256, 1024))
