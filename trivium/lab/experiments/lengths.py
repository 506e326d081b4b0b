"""Lengths beyond those that were trained: positions, rotary scalings, sinks under streaming; and how costs grow with length."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...models.transformer import Transformer, TransformerModel, build
from ...nn.inputs import Inputs
from ...nn.positions import Position, Rope
from ...nn.positions_absolute import Absolute, Learned, Sinusoidal
from . import Result, experiment, small

TIMES = (1, 2, 4, 8)


def with_position(position: Position | None, absolute: Absolute | None = None) -> Transformer:
    spec = small.shape(attention={"position": position})
    return spec.replace(embed=spec.embed.replace(positions=absolute))


def perplexities(model: TransformerModel, times: tuple[int, ...] = TIMES) -> dict[int, float]:
    return {n: math.exp(small.loss_at(model, n * small.LENGTH)) for n in times}


@experiment("extrapolation", "T02.01", "T02.02", "T02.04", "T02.06", question="Which positions hold beyond the trained length?")
def extrapolation(effort: float) -> Result:
    """Trained at 128 tokens, read at 1 to 8 times that, the same text; three seeds. Learned positions have a table of 1,024 rows, of
    which 128 were trained."""
    from ...nn.positions_relative import Alibi

    steps, seeds = small.steps_of(600, effort), (0, 1, 2)
    kinds = {
        "rope": with_position(Rope()),
        "alibi": with_position(Alibi()),
        "sinusoidal": with_position(None, Sinusoidal()),
        "learned": with_position(None, Learned(size=max(TIMES) * small.LENGTH)),
        "none": with_position(None),
    }
    numbers: dict[str, Any] = {"trained length": small.LENGTH, "steps": steps}
    growth = {}
    for name, spec in kinds.items():
        found = [perplexities(small.train(spec, steps=steps, seed=seed)[0]) for seed in seeds]
        numbers[name] = {f"{n}x": [row[n] for row in found] for n in TIMES}
        growth[name] = {n: small.mean(row[n] / row[1] for row in found) for n in TIMES}
    numbers["perplexity over that at the trained length"] = growth
    alibi, others = growth["alibi"][8] <= 1.05, min(growth["learned"][8], growth["sinusoidal"][8]) > 1.5
    told = ", ".join(f"{name} {row[8]:.2f}" for name, row in growth.items())
    verdict = (
        f"ALiBi's claim {'holds' if alibi else 'does not hold'} (at most 1.05 times at 8 times the length); learned and sinusoidal "
        f"{'blow up' if others else 'do not both blow up'} (over 1.5 times); 'good extrapolation' of RoPE "
        f"{'holds' if growth['rope'][8] < 1.1 else 'does not hold'}. Perplexity at 8 times over that at the trained length: {told}."
    )
    return Result(numbers, verdict, seeds)


@experiment(
    "context-extension",
    "T13.02",
    "T13.03",
    "T13.04",
    question="Which rotary scaling extends a model best, as it is and tuned?",
)
def context_extension(effort: float) -> Result:
    """Trained at 128 tokens with RoPE; read at 4 times that with each scaling for factor 4, as it is and after tuning on rows of 512
    tokens for 6% of the steps; two seeds."""
    from ...nn.rope_scaling import LinearScaling, NTKScaling, YarnScaling

    steps, seeds, factor = small.steps_of(800, effort), (0, 1), 4
    length = factor * small.LENGTH
    scalings = {
        "none": None,
        "linear (PI)": LinearScaling(factor=factor),
        "ntk": NTKScaling(factor=factor),
        "yarn": YarnScaling(factor=factor, original_max_position_embeddings=small.LENGTH),
    }
    long = small.banks(length)[0]
    numbers: dict[str, Any] = {"steps": steps, "factor": factor}
    results: dict[str, dict[str, list[float]]] = {name: {"as it is": [], "tuned": [], "trained length": []} for name in scalings}
    for seed in seeds:
        trained = small.train(small.shape(), steps=steps, seed=seed)[0]
        for name, scaling in scalings.items():
            spec = small.shape(attention={"position": Rope(scaling=scaling)})
            model = build(spec, device="cpu")
            model.load_state_dict(trained.state_dict())
            model.eval()
            results[name]["trained length"].append(math.exp(small.loss_at(model, small.LENGTH)))
            results[name]["as it is"].append(math.exp(small.loss_at(model, length)))
            tuned = small.train(spec, steps=max(3, round(steps * 0.06)), seed=seed, lr=5e-4, data=long, rows=2, model=model)[0]
            results[name]["tuned"].append(math.exp(small.loss_at(tuned, length)))
    numbers |= results
    means = {name: {k: small.mean(v) for k, v in row.items()} for name, row in results.items()}
    numbers["means"] = means
    order = sorted(("linear (PI)", "ntk", "yarn"), key=lambda name: means[name]["as it is"])
    tuned = sorted(("none", "linear (PI)", "ntk", "yarn"), key=lambda name: means[name]["tuned"])
    as_is, after = (", ".join(f"{name} {row[k]:.1f}" for name, row in means.items()) for k in ("as it is", "tuned"))
    verdict = (
        f"At 4 times the length, perplexity as it is: {as_is}; tuned: {after}. YaRN ahead of NTK and PI {_standing(order[0] == 'yarn')} as it is and "
        f"{_standing(tuned[0] == 'yarn')} tuned."
    )
    return Result(numbers, verdict, seeds)


def _standing(holds: bool) -> str:  # noqa: FBT001 - a word for a fact
    return "holds" if holds else "does not hold"


def cost(spec: Transformer, length: int) -> tuple[float, int]:
    """Processor seconds of a forward over one row, least of three, and the largest tensor's bytes."""
    import time

    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
            return out

    from ...models.transformer import initialize

    model = initialize(build(spec, device="cpu"), seed=0).eval()
    x = torch.randint(0, small.VOCAB, (1, length), generator=torch.Generator().manual_seed(0))
    seconds = []
    with torch.no_grad():
        for _ in range(3):
            start = time.process_time()
            model(Inputs(x), keep="last")
            seconds.append(time.process_time() - start)
        with Largest() as largest:
            model(Inputs(x), keep="last")
    return min(seconds), largest.bytes


@experiment("growth", "T19.05", "T19.06", "T13.06", question="Do window, block-sparse and linear attention grow linearly with length?")
def growth(effort: float) -> Result:
    """One layer without the mlp's share (width 64), forward over 1,024 to 16,384 tokens: processor time and the largest tensor."""
    from ...nn.linear_attention import LinearAttention
    from ...nn.patterns import Window
    from ...nn.patterns_sparse import BlockSparse

    lengths = (2048, 4096, 8192, 16384) if effort >= 1 else (256, 512)
    kinds = {
        "full": small.shape(layers=1),
        "window 128": small.shape(layers=1, attention={"pattern": Window(size=128)}),
        "block sparse": small.shape(layers=1, attention={"pattern": BlockSparse(size=64, local=2, first=1, random=2)}),
        "linear": small.shape(layers=1, mixer=LinearAttention(heads=4, head_dim=16)),
    }
    numbers: dict[str, Any] = {"lengths": lengths}
    slopes = {}
    for name, spec in kinds.items():
        costs = [cost(spec, n) for n in lengths]
        slopes[name] = {
            "time": small.exponent(lengths, [c[0] for c in costs]),
            "largest tensor": small.exponent(lengths, [c[1] for c in costs]),
        }
        numbers[name] = {
            "processor seconds": [c[0] for c in costs],
            "largest tensor, bytes": [c[1] for c in costs],
            "exponents": slopes[name],
        }
    linear = all(slopes[name]["time"] < 1.35 for name in ("window 128", "block sparse", "linear"))
    told = ", ".join(f"{name} {row['time']:.2f}" for name, row in slopes.items())
    return Result(
        numbers, f"{'Holds' if linear else 'Does not hold'}: exponents of time over length: {told} (the rest of the layer is linear).", ()
    )
