"""Attention kinds: normed queries and keys at high rates, latents at an equal cache, sinks under streaming, what sparse
patterns fit in a budget, what a relative bias costs, and memories of segments over a distance."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core.errors import TriviumError
from ...models.ledger import Ledger
from ...models.transformer import Transformer, TransformerModel, build, initialize
from ...nn import backends
from ...nn.attention import Attention, AttentionMixer
from ...nn.backends import NONE, Extras
from ...nn.inputs import Inputs
from ...nn.norms import RMS
from ...nn.patterns import Window
from ...nn.patterns_sparse import BlockSparse, SinkWindow
from ...nn.positions import Rope
from ...optim.schedules import Constant
from . import Result, experiment, small
from .recall import Task, accuracy, accuracy_by_distance, stack


class Probe:
    """An attention backend that is eager and remembers the largest score."""

    largest = 0.0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Any, extras: Extras = NONE) -> Tensor:
        grouped = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        self.largest = max(self.largest, float((q @ grouped.mT * scale).abs().max()))
        return backends.eager(q, k, v, scale=scale, causal=causal, mask=mask, extras=extras)


@torch.no_grad()
def largest_score(model: TransformerModel) -> float:
    """Over held-out rows."""
    probe = Probe()
    mixers = [module for module in model.modules() if isinstance(module, AttentionMixer)]
    for mixer in mixers:
        mixer.backend = probe  # type: ignore[assignment]
    tokens = torch.from_numpy(small.banks()[1].tokens[: 8 * small.LENGTH].astype("int64")).view(8, -1)
    model(Inputs(tokens), keep="none")
    for mixer in mixers:
        mixer.backend = "auto"
    return probe.largest


@experiment("qk-norm", "T01.09", question="At 10 to 30 times the rate, do scores diverge without QK-norm and stay bounded with it?")
def qk_norm(effort: float) -> Result:
    """Constant rates without warmup and without clipping, two seeds: the largest score and the loss after training."""
    steps, seeds, rates = small.steps_of(200, effort), (0, 1), (3e-3, 3e-2, 9e-2)
    numbers: dict[str, Any] = {"steps": steps}
    found: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for name, norm in (("without", None), ("with", RMS())):
        spec = small.shape(attention={"qk_norm": norm})
        found[name] = {}
        for rate in rates:
            rows = []
            for seed in seeds:
                try:
                    model = small.train(spec, steps=steps, seed=seed, lr=rate, schedule=Constant(), clip=None)[0]
                    rows.append((largest_score(model), small.held_out(model)))
                except TriviumError:
                    rows.append((math.inf, math.inf))
            found[name][rate] = rows
        numbers[name] = {str(rate): [[x if math.isfinite(x) else None for x in row] for row in rows] for rate, rows in found[name].items()}
    worst = {name: max(score for row in list(rates.values())[1:] for score, _ in row) for name, rates in found.items()}
    holds = worst["with"] < 0.3 * worst["without"]
    verdict = (
        f"{'Holds' if holds else 'Does not hold at this size'}: at 10 and 30 times the rate the largest score is {worst['without']:.3g} without and "
        f"{worst['with']:.3g} with QK-norm."
    )
    return Result(numbers, verdict, seeds)


@experiment(
    "latents", "T19.02", question="At an equal cache, is latent attention better than grouped attention, and how far from multi-head?"
)
def latents(effort: float) -> Result:
    """32 cached numbers a token and layer: one kv head of 16, or a latent of 24 with a rotary key of 8; and multi-head with 128. Five seeds."""
    from ...nn.latent import LatentAttention

    steps, seeds = small.steps_of(400, effort), tuple(range(5))
    specs = {
        "multi-head, 128": small.shape(attention={"heads": 4, "kv_heads": 4, "head_dim": 16}),
        "multi-query, 32": small.shape(attention={"heads": 4, "kv_heads": 1, "head_dim": 16}),
        "latent, 32": small.shape(mixer=LatentAttention(heads=4, kv_rank=24, head_dim=16, rope_dim=8, v_dim=16)),
    }
    losses: dict[str, list[float]] = {}
    numbers: dict[str, Any] = {"steps": steps}
    for name, spec in specs.items():
        models = [small.train(spec, steps=steps, seed=seed)[0] for seed in seeds]
        losses[name] = [small.held_out(model) for model in models]
        numbers[name] = {
            "held-out loss by seed": losses[name],
            "cache bytes per token": models[0].cache(1, 64).bytes // 64,
            "parameters": sum(p.numel() for p in models[0].parameters()),
        }
    gap = small.paired(losses["multi-query, 32"], losses["latent, 32"])
    far = small.paired(losses["multi-head, 128"], losses["latent, 32"])
    numbers |= {"latent less multi-query": gap, "latent less multi-head": far}
    verdict = (
        f"{'Holds' if gap['high'] < 0 else 'Not settled'} at an equal cache: latent less multi-query {gap['mean']:+.4f} ({gap['low']:+.4f} to "
        f"{gap['high']:+.4f}) nats; 'better than multi-head' {'holds' if far['high'] < 0 else 'does not hold'} at this size: {far['mean']:+.4f} "
        f"({far['low']:+.4f} to {far['high']:+.4f}), with a quarter of the cache (75% less; the published 93.3% is against DeepSeek 67B's "
        "grouped attention, with 6-bit entries)."
    )
    return Result(numbers, verdict, seeds)


@torch.no_grad()
def streamed(model: TransformerModel, ids: Tensor, *, piece: int = 64) -> Tensor:
    """Losses [n - 1] of a stream of ids [n], read through a cache."""
    store, losses, before = model.cache(1, len(ids)), [], None
    for part in ids.split(piece):
        logits = model(Inputs(part[None], cache=store)).logits
        assert logits is not None
        spoken = logits[0] if before is None else torch.cat([before, logits[0]])
        named = part[1:] if before is None else part
        losses.append(torch.nn.functional.cross_entropy(spoken[: len(named)], named, reduction="none"))
        before = logits[0, -1:]
    return torch.cat(losses)


@experiment("streaming", "X.09", question="Over 20 times the trained length, does a window with sinks hold where a window alone explodes?")
def streaming(effort: float) -> Result:
    """Trained at 128 tokens with full attention; streamed over 2,560: a rolling window of 124, four first tokens kept beside it with
    rotary places in the cache, and every token recomputed from its last 128 (the baseline). Three seeds."""
    steps, seeds = small.steps_of(800, effort), (0, 1, 2)
    length, window = (2560, small.LENGTH) if effort >= 1 else (192, 32)
    ids = torch.tensor([i for text in small.texts()[1] for i in small.tokenizer().encode(text, bos=False)][:length])
    numbers: dict[str, Any] = {"steps": steps, "length": length}
    ratios: dict[str, list[float]] = {"window": [], "window and sinks": []}
    masses = []
    for seed in seeds:
        trained = small.train(small.shape(), steps=steps, seed=seed)[0]
        with torch.no_grad():
            rows = ids.unfold(0, window, 1)
            last = torch.cat([trained(Inputs(part), keep="last").logits for part in rows[:-1].split(256)])  # type: ignore[list-item]
            recomputed = torch.nn.functional.cross_entropy(last, ids[window:], reduction="none")
            weights = trained(Inputs(ids[None, :window]), weights=True).aux.weights
            masses.append(small.mean(float(w[0, :, window // 2 :, 0].mean()) for w in weights.values()))
        base = float(recomputed.mean().exp())
        for name, pattern in (("window", Window(size=window)), ("window and sinks", SinkWindow(size=window - 4, first=4, rebase=True))):
            model = build(small.shape(attention={"pattern": pattern}), device="cpu")
            model.load_state_dict(trained.state_dict())
            losses = streamed(model.eval(), ids, piece=1)[window - 1 :]
            ratios[name].append(float(losses.mean().exp()) / base)
    numbers |= {"perplexity over the recomputed one": ratios, "attention mass on the first token": masses}
    held, lost = small.mean(ratios["window and sinks"]), small.mean(ratios["window"])
    verdict = (
        f"'Sinks stay within 10% of recomputing' {'holds' if held < 1.1 else 'does not hold'}: {held:.3f}; 'a window alone explodes' "
        f"{'holds' if lost > 1.5 else 'does not hold at this size'}: {lost:.3f} times the baseline's perplexity. The first token has "
        f"{small.mean(masses):.1%} of the attention in a model this small."
    )
    return Result(numbers, verdict, seeds)


def peak(spec: Transformer, length: int, *, backend: str) -> int:
    """Bytes at the worst moment of a forward and backward over one row, the weights aside."""
    model = initialize(build(spec, device="cpu"), seed=0)
    for module in model.modules():
        if isinstance(module, AttentionMixer):
            module.backend = backend
    x = torch.randint(0, small.VOCAB, (1, length), generator=torch.Generator().manual_seed(0))
    with Ledger() as ledger:
        ledger.note(model.parameters(), "weights")
        model(Inputs(x), keep="none").hidden.square().mean().backward()
        return ledger.peak["tensors"]


@experiment(
    "sparse-budget", "T13.06", question="Does block-sparse attention fit ten times the length of dense attention in the same memory?"
)
def sparse_budget(effort: float) -> Result:
    """One layer, forward and backward, 512 MB: the longest power of two times 1,024 (dense: eager; and torch's flash kernel for comparison)."""
    budget = 512e6 if effort >= 1 else 8e6
    kinds = {
        "dense": (small.shape(layers=1), "eager"),
        "flash kernel": (small.shape(layers=1), "sdpa"),
        "block sparse": (small.shape(layers=1, attention={"pattern": BlockSparse(size=64, local=2, first=1, random=2)}), "auto"),
    }
    numbers: dict[str, Any] = {"budget, bytes": budget}
    longest = {}
    for name, (spec, backend) in kinds.items():
        length, found = 256, {}
        while (found.setdefault(length, peak(spec, length, backend=backend))) <= budget and length < 131_072:
            length *= 2
        longest[name] = max((n for n, size in found.items() if size <= budget), default=0)
        numbers[name] = {"peak bytes by length": {str(n): size for n, size in found.items()}, "longest": longest[name]}
    ratio = longest["block sparse"] / max(1, longest["dense"])
    verdict = (
        f"{'Holds' if ratio >= 10 else 'Does not hold'}: {longest['block sparse']:,} tokens against {longest['dense']:,} dense ({ratio:.0f} times); "
        f"torch's flash kernel, which stores no scores, reaches {longest['flash kernel']:,}."
    )
    return Result(numbers, verdict, ())


@experiment("relative-cost", "T02.05", question="What do relative positions cost over length?")
def relative_cost(effort: float) -> Result:
    """One layer, forward, processor time over that of attention without positions: T5's bias, Shaw's vectors, ALiBi, rotary."""
    from ...nn.positions_relative import Alibi, Relative, RelativeBias
    from .lengths import cost

    lengths = (256, 512, 1024, 2048) if effort >= 1 else (64, 128)
    kinds = {"none": None, "rotary": Rope(), "alibi": Alibi(), "T5 bias": RelativeBias.tiny(), "Shaw": Relative.tiny()}
    seconds = {name: [cost(small.shape(layers=1, attention={"position": p}), n)[0] for n in lengths] for name, p in kinds.items()}
    over = {name: [a / b for a, b in zip(row, seconds["none"], strict=True)] for name, row in seconds.items()}
    numbers = {"lengths": lengths, "processor seconds": seconds, "over attention without positions": over}
    holds = over["T5 bias"][-1] > 1.2 and over["Shaw"][-1] > 1.2
    told = ", ".join(f"{name} {row[-1]:.2f}" for name, row in over.items())
    return Result(
        numbers, f"'More expensive for long sequences' {'holds' if holds else 'does not hold'}: times at {lengths[-1]}: {told}.", ()
    )


@experiment(
    "segments",
    "T13.07",
    question="Do memories of past segments recall what attention within a segment cannot, and lose detail?",
)
def segments(effort: float) -> Result:
    """Associative recall of 8 pairs told before the questions, segments of 8 tokens: no memory, Transformer-XL's, compressive and
    Infini's; two seeds. Accuracy by how far back the pair stands. (After 1,200 steps full attention had learned 21% only.)"""
    from ...nn.memory import Compressive
    from ...nn.memory_infini import Infini
    from ...nn.patterns import Chunk

    steps, seeds = small.steps_of(2500, effort), (0, 1)
    common: dict[str, Any] = {"heads": 4, "kv_heads": 4, "head_dim": 16, "position": Rope(), "size": 8}
    mixers = {
        "no memory": Attention(heads=4, kv_heads=4, head_dim=16, position=Rope(), pattern=Chunk(size=8)),
        "Transformer-XL, 8 tokens": Compressive(**common, memory=8),
        "compressive, 8 tokens and 4 entries of 4": Compressive(**common, memory=8, compressed=4, rate=4, pool="conv", through=True),
        "Infini": Infini(**common, through=True),
        "full attention": Attention(heads=4, kv_heads=4, head_dim=16, position=Rope()),
    }
    task = Task("recall", pairs=8)
    numbers: dict[str, Any] = {"steps": steps}
    means, ends = {}, {}
    for name, mixer in mixers.items():
        spec = stack(mixer, mixer)
        models = [small.train(spec, steps=steps, seed=seed, data=Task("recall", 8, 32, seed))[0] for seed in seeds]
        found = [accuracy(model, task) for model in models]
        far = [accuracy_by_distance(model, 8) for model in models]
        by_distance = {span: small.mean(one[span] for one in far) for span in far[0]}
        numbers[name], means[name] = {"accuracy by seed": found, "accuracy by distance": by_distance}, small.mean(found)
        near, *_, last = by_distance.values()
        ends[name] = (near, last)
    gains = [name for name in means if name not in ("no memory", "full attention") and means[name] > means["no memory"] + 0.05]
    fades = [name for name in gains if ends[name][1] < ends[name][0] - 0.05]
    behind = [name for name in gains if means[name] < means["full attention"] - 0.05]
    told = ", ".join(f"{name} {value:.1%} ({ends[name][0]:.1%} nearest, {ends[name][1]:.1%} farthest)" for name, value in means.items())
    verdict = (
        f"Memories that gain: {len(gains)} of 3; of those, {len(fades)} recall less over the farthest quarter than over the nearest, and "
        f"{len(behind)} less than full attention at the same steps: {told}."
    )
    return Result(numbers, verdict, seeds)
