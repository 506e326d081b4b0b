"""Whole stacks: several residual streams, weights of three values over model size, an encoder-decoder that learns to transcribe."""

from __future__ import annotations

from typing import Any

import torch

from ...adapt.low_bit import LowBit
from ...core.seed import generator
from ...models.block import Block
from ...models.encoder_decoder import EncoderDecoder, EncoderDecoderModel
from ...models.transformer import Transformer, build, initialize
from ...nn.attention import Attention
from ...nn.cross import CrossAttention
from ...nn.feedforward import MLP
from ...nn.heads import LMHead, NoHead
from ...nn.hyper import Hyper
from ...nn.inputs import Inputs
from ...nn.positions import Rope
from ...nn.residual import Plain
from ...optim.schedules import Cosine
from . import Result, experiment, small


@experiment("hyper-connections", "X.02", question="Do constrained hyper-connections train better than one residual stream?")
def hyper_connections(effort: float) -> Result:
    """Eight layers, four streams against one, equal tokens, three seeds paired."""
    steps, seeds = small.steps_of(400, effort), (0, 1, 2)
    losses = {
        name: [small.held_out(small.train(small.shape(layers=8, residual=residual), steps=steps, seed=seed)[0]) for seed in seeds]
        for name, residual in (("plain", Plain()), ("constrained", Hyper(streams=4)), ("free", Hyper(streams=4, constrained=False)))
    }
    gaps = {name: small.paired(losses["plain"], losses[name]) for name in ("constrained", "free")}
    told = "; ".join(f"{name} {gap['mean']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f})" for name, gap in gaps.items())
    standing = "Better" if gaps["constrained"]["high"] < 0 else "Worse" if gaps["constrained"]["low"] > 0 else "Not settled at this size"
    numbers = {"steps": steps, "held-out loss by seed": losses, "against plain, nats": gaps}
    return Result(numbers, f"{standing}: against one stream: {told} nats.", seeds)


@experiment("ternary", "X.27", question="Does the gap of ternary weights to full ones shrink with model size?")
def ternary(effort: float) -> Result:
    """Widths 32, 64 and 128, trained from the start with and without ternary weights and 8-bit activations, two seeds."""
    steps, seeds, widths = small.steps_of(500, effort), (0, 1), (32, 64, 128)
    numbers: dict[str, Any] = {"steps": steps}
    gaps = []
    for dim in widths:
        spec = small.shape(dim=dim)
        full = [small.held_out(small.train(spec, steps=steps, seed=seed)[0]) for seed in seeds]
        low = []
        for seed in seeds:
            model = LowBit().apply(initialize(build(spec, device="cpu"), seed=seed))
            low.append(small.held_out(small.train(spec, steps=steps, seed=seed, model=model)[0]))
        gaps.append(small.mean(low) - small.mean(full))
        numbers[str(dim)] = {"full": full, "ternary": low, "gap, nats": gaps[-1]}
    holds = gaps[0] > gaps[1] > gaps[2]
    told = ", ".join(f"{dim}: {gap:+.3f}" for dim, gap in zip(widths, gaps, strict=True))
    return Result(numbers, f"{'Holds' if holds else 'Does not hold at these sizes'}: gap in nats by width: {told}.", seeds)


def transcriber(vocab: int) -> EncoderDecoder:
    attention, mlp = Attention(heads=4, kv_heads=4, head_dim=16, position=Rope()), MLP(hidden=128)
    cross = CrossAttention(heads=4, kv_heads=4, head_dim=16)
    encoder = Transformer(
        dim=64, vocab=vocab, layers=("a", "a"), blocks={"a": Block(mixer=attention, ffn=mlp)}, causal=False, head=NoHead()
    )
    decoder = Transformer(
        dim=64, vocab=vocab, layers=("a", "a"), blocks={"a": Block(mixer=attention, cross=cross, ffn=mlp)}, head=LMHead(tied=True)
    )
    return EncoderDecoder(encoder=encoder, decoder=decoder)


def words(task: str, rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sources [B, 10], their segments, and targets [B, 12] of start (1), what the task makes of them, end (2) and blanks (0)."""
    g = generator(seed, task)
    lengths = torch.randint(4, 11, (rows,), generator=g)
    source = torch.randint(3, 29, (rows, 10), generator=g)
    real = torch.arange(10) < lengths[:, None]
    table = torch.randperm(26, generator=generator(0, "table")) + 3
    target = torch.zeros(rows, 12, dtype=torch.int64)
    target[:, 0] = 1
    for row, n in enumerate(lengths.tolist()):
        own = source[row, :n]
        made = {"reverse": own.flip(0), "sort": own.sort().values, "transliterate": table[own - 3]}[task]
        target[row, 1 : n + 1], target[row, n + 1] = made, 2
    return source.masked_fill(~real, 0), torch.where(real, 0, -1), target


def learn(model: EncoderDecoderModel, task: str, *, steps: int, seed: int) -> float:
    """Share of 256 new sources whose greedy transcription is right in full, after training on fresh ones."""

    def loss(step: int) -> torch.Tensor:
        source, segments, target = words(task, 64, seed * 1_000_000 + step)
        logits = model(Inputs(target[:, :-1], source=Inputs(source, segments=segments))).logits
        assert logits is not None
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=0)

    small.descend(model, loss, steps=steps, lr=2e-3, schedule=Cosine(warmup=0.05, minimum=0.05))
    source, segments, target = words(task, 256, 10**9 + seed)
    with torch.no_grad():
        written, inputs = torch.ones(256, 1, dtype=torch.int64), Inputs(source, segments=segments)
        memory = model.encode(inputs)
        for _ in range(11):
            logits = model(Inputs(written, memory=memory, memory_segments=segments), keep="last").logits
            assert logits is not None
            written = torch.cat([written, logits.argmax(-1, keepdim=True)], 1)
    real = target != 0
    return float(((written == target) | ~real).all(1).float().mean())


@experiment("transcription", "T03.03", question="Does a small encoder-decoder learn to reverse, sort and transliterate in full?")
def transcription(effort: float) -> Result:
    """Strings of 4 to 10 of 26 letters, two layers on each side, greedy; two seeds. Claim: over 95% exact. (900 steps at a
    constant rate were too few: 91%, 79% and 92%.)"""
    steps, seeds = small.steps_of(2000, effort), (0, 1)
    numbers: dict[str, Any] = {"steps": steps}
    for task in ("reverse", "sort", "transliterate"):
        numbers[task] = []
        for seed in seeds:
            model = initialize(build(transcriber(32), device="cpu"), seed=seed).train()
            assert isinstance(model, EncoderDecoderModel)
            numbers[task].append(learn(model, task, steps=steps, seed=seed))
    least = {task: min(numbers[task]) for task in ("reverse", "sort", "transliterate")}
    holds = min(least.values()) > 0.95
    return Result(numbers, f"{'Holds' if holds else 'Does not hold in full'}: least exact match over seeds {least}.", seeds)
