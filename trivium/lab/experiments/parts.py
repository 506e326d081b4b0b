"""Parts against each other in small language models: activations, heads that share keys and values, schedules, dropout."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from ...models.checkpointing import Recompute
from ...models.ledger import Ledger
from ...models.transformer import TransformerModel, build, initialize
from ...nn.activations import GELU, ReLU, SiLU
from ...nn.feedforward import MLP
from ...nn.inputs import Inputs
from ...nn.monitors import dead_units
from ...nn.norms import RMS, Layer
from ...optim.schedules import Constant, Cosine
from . import Result, experiment, small


@experiment("gated-activations", "T16.01", "T16.03", question="Do SwiGLU and GeGLU beat GELU at equal parameters?")
def gated_activations(effort: float) -> Result:
    """A plain GELU mlp of width 4d against gated ones of width 8d/3, six seeds, paired."""
    steps, seeds, dim = small.steps_of(400, effort), tuple(range(6)), small.DIM
    mlps = {
        "GELU": MLP(hidden=4 * dim, activation=GELU(), gated=False),
        "SwiGLU": MLP(hidden=dim * 8 // 3, activation=SiLU()),
        "GeGLU": MLP(hidden=dim * 8 // 3, activation=GELU()),
    }
    numbers: dict[str, Any] = {"steps": steps, "tokens": steps * small.ROWS * small.LENGTH}
    losses = {}
    for name, mlp in mlps.items():
        spec = small.shape(ffn=mlp)
        losses[name] = [small.held_out(small.train(spec, steps=steps, seed=seed)[0]) for seed in seeds]
        inside = sum(p.numel() for p in build(spec).layers[0].ffn.parameters())  # type: ignore[union-attr]
        numbers[name] = {"parameters of one mlp": inside, "held-out loss by seed": losses[name]}
    gaps = {name: small.paired(losses["GELU"], losses[name]) for name in ("SwiGLU", "GeGLU")}
    numbers["less than GELU, nats"] = gaps
    full = (build(small.shape(ffn=MLP(hidden=4 * dim))), build(small.shape(ffn=mlps["GELU"])))
    numbers["gated over plain parameters at equal width"] = sum(p.numel() for p in full[0].layers[0].ffn.parameters()) / sum(  # type: ignore[union-attr]
        p.numel()
        for p in full[1].layers[0].ffn.parameters()  # type: ignore[union-attr]
    )
    holds = all(gap["high"] < 0 for gap in gaps.values())
    told = "; ".join(f"{name} {gap['mean']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f})" for name, gap in gaps.items())
    return Result(numbers, f"{'Holds' if holds else 'Not settled at this size'}: held-out loss against GELU, paired: {told} nats.", seeds)


@experiment("dead-units", "T16.04", question="Do ReLU units die at a high learning rate, and GELU units not?")
def dead(effort: float) -> Result:
    """Plain mlps at ten times the usual rate without warmup; units that are exactly zero on 16,384 held-out tokens."""
    steps, seeds = small.steps_of(150, effort), (0, 1, 2)
    numbers: dict[str, Any] = {"steps": steps, "rate": 3e-2}
    shares = {}
    for name, activation in (("ReLU", ReLU()), ("GELU", GELU())):
        spec = small.shape(ffn=MLP(hidden=4 * small.DIM, activation=activation, gated=False))
        shares[name] = []
        for seed in seeds:
            model = small.train(spec, steps=steps, seed=seed, lr=3e-2, schedule=Constant())[0]
            with dead_units(model) as seen, torch.no_grad():
                small.loss_at(model, small.LENGTH)
            shares[name].append(small.mean(seen.fractions().values()))
        numbers[f"{name}: share of dead units by seed"] = shares[name]
    holds = min(shares["ReLU"]) > 0.001 and max(shares["GELU"]) < 0.001
    told = "; ".join(f"{name} {', '.join(f'{share:.1%}' for share in row)}" for name, row in shares.items())
    verdict = f"{'Holds' if holds else 'Does not hold'}: dead units by seed: {told}."
    return Result(numbers, verdict, seeds)


@experiment(
    "shared-heads",
    "T19.01",
    "T19.03",
    question="Does quality fall from multi-head over grouped to multi-query attention, on an equal budget?",
)
def shared_heads(effort: float) -> Result:
    """Eight heads with 8, 2 and 1 kv heads, five seeds paired, equal tokens; and the trained multi-head models turned into ones of two kv
    heads by the mean, by the first head and at random, before and after a short training."""
    steps, seeds = small.steps_of(400, effort), tuple(range(5))
    numbers: dict[str, Any] = {"steps": steps}
    losses, whole = {}, []
    for name, kv in (("multi-head", 8), ("grouped", 2), ("multi-query", 1)):
        spec = small.shape(attention={"heads": 8, "kv_heads": kv, "head_dim": 16})
        models = [small.train(spec, steps=steps, seed=seed)[0] for seed in seeds]
        whole = whole or models
        losses[name] = [small.held_out(model) for model in models]
        cache = models[0].cache(1, 16).bytes // 16
        numbers[name] = {"held-out loss by seed": losses[name], "cache bytes per token": cache}
    gaps = {
        "grouped less multi-head": small.paired(losses["multi-head"], losses["grouped"]),
        "multi-query less grouped": small.paired(losses["grouped"], losses["multi-query"]),
        "multi-query less multi-head": small.paired(losses["multi-head"], losses["multi-query"]),
    }
    made = uptrained(whole, max(3, steps // 5))
    mean = {how: small.paired(made[how]["after"], made["mean"]["after"]) for how in ("first", "random")}
    numbers |= {"nats": gaps, "two kv heads made of eight": made, "after training, the mean less": mean}
    ordered = gaps["grouped less multi-head"]["mean"] >= 0 and gaps["multi-query less grouped"]["mean"] >= 0
    clear = gaps["grouped less multi-head"]["low"] > 0 and gaps["multi-query less grouped"]["low"] > 0
    standing = "Holds" if clear else "The order holds, not every interval" if ordered else "Does not hold at this size"
    best = "holds" if all(gap["high"] < 0 for gap in mean.values()) else "does not hold for every interval"
    told, also = (
        "; ".join(f"{name} {gap['mean']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f})" for name, gap in row.items())
        for row in (gaps, mean)
    )
    verdict = (
        f"{standing}: {told} nats. Heads made by the mean end lower than by the first or at random: {best}: the mean less {also} nats."
    )
    return Result(numbers, verdict, seeds)


@torch.no_grad()
def pooled(model: TransformerModel, how: str) -> TransformerModel:
    """A model of two kv heads from one of eight: each the mean of four, their first, or drawn anew."""
    spec = small.shape(attention={"heads": 8, "kv_heads": 2, "head_dim": 16})
    made = initialize(build(spec, device="cpu"), seed=9)
    source, target = model.state_dict(), made.state_dict()
    for name, tensor in target.items():
        if name.endswith(("inp.k.weight", "inp.v.weight")):
            heads = source[name].unflatten(0, (2, 4, 16))  # [2, 4, D, C]
            if how == "mean":
                tensor.copy_(heads.mean(1).flatten(0, 1))
            elif how == "first":
                tensor.copy_(heads[:, 0].flatten(0, 1))
        else:
            tensor.copy_(source[name])
    return made


def uptrained(models: list[TransformerModel], steps: int) -> dict[str, dict[str, list[float]]]:
    """By how the heads are made: held-out losses of each model's conversion, before and after training."""
    found: dict[str, dict[str, list[float]]] = {}
    for how in ("mean", "first", "random"):
        made = [pooled(model, how) for model in models]
        before = [small.held_out(model.eval()) for model in made]
        after = [small.held_out(small.train(model.spec, steps=steps, seed=5, lr=1e-3, model=model)[0]) for model in made]
        found[how] = {"before": before, "after": after}
    return found


@experiment("cosine", "T10.06", question="Does cosine decay beat a constant rate at equal steps?")
def cosine(effort: float) -> Result:
    """Warmup of 5% on both sides, five seeds paired, at three peak rates; each side at its best rate."""
    steps, seeds, rates = small.steps_of(400, effort), tuple(range(5)), (1e-3, 3e-3, 6e-3)
    losses = {
        name: {
            rate: [small.held_out(small.train(small.shape(), steps=steps, seed=seed, lr=rate, schedule=schedule)[0]) for seed in seeds]
            for rate in rates
        }
        for name, schedule in (("constant", Constant(warmup=0.05)), ("cosine", Cosine(warmup=0.05, minimum=0.1)))
    }
    best = {name: min(row.values(), key=small.mean) for name, row in losses.items()}
    gap = small.paired(best["constant"], best["cosine"])
    numbers = {
        "steps": steps,
        "held-out loss by rate and seed": {n: {str(r): v for r, v in row.items()} for n, row in losses.items()},
        "gap, nats": gap,
    }
    holds = gap["high"] < 0
    told = f"{gap['mean']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f}) nats"
    verdict = f"{'Holds' if holds else 'Does not hold at this size'}: cosine less constant, each at its best rate: {told}."
    return Result(numbers, verdict, seeds)


@experiment("dropout", "T17.04", question="Does dropout help on a small corpus that is read many times, and hurt in a single epoch?")
def dropout(effort: float) -> Result:
    """Dropout 0.1 on embeddings, attention and sublayers: 60 kB read many times, and fresh text read once."""
    seeds = (0, 1, 2)
    numbers: dict[str, Any] = {}
    gaps = {}
    for regime, megabytes, steps in (("overfit", 0.06, small.steps_of(900, effort)), ("single epoch", 3.0, small.steps_of(600, effort))):
        data = small.banks(small.LENGTH, megabytes)[0]
        sides = []
        for p in (0.0, 0.1):
            spec = small.shape(attention={"dropout": p}, dropout=p)
            spec = spec.replace(embed=spec.embed.replace(dropout=p))
            sides.append([small.held_out(small.train(spec, steps=steps, seed=seed, data=data)[0]) for seed in seeds])
        gaps[regime] = small.paired(*sides)
        epochs = steps * small.ROWS / len(data.bins)
        numbers[regime] = {"epochs": epochs, "without": sides[0], "with": sides[1], "gap, nats": gaps[regime]}
    holds = gaps["overfit"]["high"] < 0 < gaps["single epoch"]["low"]
    told = "; ".join(f"{name} {gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})" for name, gap in gaps.items())
    return Result(numbers, f"{'Holds' if holds else 'Does not hold in full'}: held-out loss with dropout less without: {told} nats.", seeds)


@experiment("norm-speed", "T17.01", question="Is RMSNorm 10 to 20% faster than LayerNorm, at the same loss?")
def norm_speed(effort: float) -> Result:
    """Forward and backward of [2,048, 576] in fp32 and bf16, the library's modules, medians of alternating rounds; and small language
    models with either, three seeds."""
    numbers: dict[str, Any] = {}
    ratios = {}
    for dtype in (torch.float32, torch.bfloat16):
        modules = {"layer": Layer(bias=True).build(576), "rms": RMS().build(576)}
        for module in modules.values():
            module.to(dtype).reset()  # type: ignore[operator]
        x = torch.randn(2048, 576).to(dtype).requires_grad_()
        times: dict[str, list[float]] = {name: [] for name in modules}
        for _ in range(small.steps_of(200, effort)):
            for name, module in modules.items():
                start = time.process_time()
                module(x).sum().backward()
                times[name].append(time.process_time() - start)
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratios[str(dtype)[6:]] = medians["layer"] / medians["rms"]
        numbers[f"{str(dtype)[6:]}: processor seconds"] = medians
    steps, seeds = small.steps_of(200, effort), (0, 1, 2)
    losses = {
        name: [small.held_out(small.train(small.shape(norm=norm).replace(final_norm=norm), steps=steps, seed=s)[0]) for s in seeds]
        for name, norm in (("layer", Layer()), ("rms", RMS()))
    }
    gap = small.paired(losses["layer"], losses["rms"])
    numbers |= {"layer's time over rms's": ratios, "held-out loss": losses, "rms less layer, nats": gap}
    faster = min(ratios.values()) > 1.1
    told = " and ".join(f"{ratio:.2f} ({dtype})" for dtype, ratio in ratios.items())
    verdict = (
        f"{'Holds' if faster else 'Does not hold here'} for speed: LayerNorm takes {told} times RMSNorm's processor time alone; the loss "
        f"differs by {gap['mean']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f}) nats. No GPU."
    )
    return Result(numbers, verdict, seeds)


@experiment("recompute", "T10.02", question="What does gradient checkpointing save, and what does it cost?")
def recompute(effort: float) -> Result:
    """16 layers of width 256 on 2,048 tokens: bytes that a forward leaves for its backward, and time of a step; alternating rounds."""
    spec = small.shape(dim=256, layers=16)
    model = initialize(build(spec, device="cpu"), seed=0)
    tokens = torch.randint(0, small.VOCAB, (8, 256), generator=torch.Generator().manual_seed(0))
    policies = {"none": None, "every layer": Recompute(), "every 4": Recompute(every=4)}
    held, times = {}, {name: [] for name in policies}  # type: ignore[var-annotated]
    for name, policy in policies.items():
        model.recompute = policy
        with Ledger() as ledger:
            ledger.note(model.parameters(), "weights")
            out = model(Inputs(tokens), keep="none").hidden
            held[name] = ledger.live["tensors"]
            del out
    for _ in range(small.steps_of(12, effort)):
        for name, policy in policies.items():
            model.recompute = policy
            start = time.process_time()
            model(Inputs(tokens), keep="none").hidden.square().mean().backward()
            times[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    slower = {name: medians[name] / medians["none"] - 1 for name in policies}
    numbers = {"bytes held after the forward": held, "processor seconds of a step": medians, "slower by": slower}
    verdict = (
        f"{'Holds' if 0.15 < slower['every layer'] < 0.4 else 'Differs'} on a CPU: recomputing every layer holds "
        f"{held['every layer'] / held['none']:.1%} of the bytes and is {slower['every layer']:.0%} slower (claimed 20 to 30%). No GPU."
    )
    return Result(numbers, verdict, (0,))
