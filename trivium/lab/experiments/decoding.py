"""Decoding from a small trained model: repetition, truncation at high temperatures, the cache, exposure to its own words."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

import torch

from ...infer.generate import generate
from ...infer.sampling import Sampling
from ...models.transformer import TransformerModel, build, initialize
from ...nn.inputs import Inputs
from ...nn.store import Store
from . import Result, experiment, small


@cache
def model(effort: float) -> TransformerModel:
    return small.train(small.shape(dim=192), steps=small.steps_of(900, effort), seed=0)[0]


def prompts(count: int, length: int = 24) -> list[list[int]]:
    """Beginnings of held-out lines, `length` tokens each."""
    ids = [i for text in small.texts()[1] for i in small.tokenizer().encode(text, bos=False)]
    step = len(ids) // (count + 1)
    return [ids[n * step : n * step + length] for n in range(count)]


def continued(of: TransformerModel, sampling: Sampling, *, count: int, seed: int = 0) -> list[list[int]]:
    done = generate(of, prompts(count), sampling.replace(seed=seed), stops=(), decoder=small.tokenizer().stream)
    return [list(each.ids) for each in done]


def distinct(rows: list[list[int]], n: int) -> float:
    """Different n-grams over all n-grams."""
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def repeated(rows: list[list[int]], n: int = 4) -> float:
    """rep-n: the share of a continuation's n-grams that stood in it before; mean over rows (arXiv:1908.04319)."""
    shares = []
    for row in rows:
        counts = Counter(tuple(row[i : i + n]) for i in range(len(row) - n + 1))
        total = sum(counts.values())
        if total:
            shares.append(1 - len(counts) / total)
    return small.mean(shares)


@torch.no_grad()
def judged(judge: TransformerModel, rows: list[list[int]], count: int) -> float:
    """Mean loss that `judge`, trained on other data order and longer, gives to the continuations: lower is more like the text."""
    total, tokens = 0.0, 0
    for prompt, row in zip(prompts(count), rows, strict=True):
        x = torch.tensor([prompt + row])
        logits = judge(Inputs(x)).logits
        assert logits is not None
        losses = torch.nn.functional.cross_entropy(logits[0, :-1], x[0, 1:], reduction="none")
        total, tokens = total + float(losses[len(prompt) - 1 :].sum()), tokens + len(row)
    return total / tokens


@experiment("repetition", "T09.01", question="Does greedy decoding repeat itself more than nucleus sampling?")
def repetition(effort: float) -> Result:
    """64 continuations of 96 tokens each way."""
    count, length = (64, 96) if effort >= 1 else (4, 12)
    numbers = {}
    for name, sampling in (("greedy", Sampling(temperature=0)), ("nucleus 0.9", Sampling(temperature=1, top_p=0.9))):
        rows = continued(model(effort), sampling.replace(max_tokens=length), count=count)
        numbers[name] = {"rep-4": repeated(rows), "distinct-2": distinct(rows, 2), "distinct-4": distinct(rows, 4)}
    holds = numbers["greedy"]["rep-4"] > 1.5 * numbers["nucleus 0.9"]["rep-4"]
    greedy, nucleus = numbers["greedy"]["rep-4"], numbers["nucleus 0.9"]["rep-4"]
    verdict = f"{'Holds' if holds else 'Does not hold'}: rep-4 {greedy:.1%} greedy, {nucleus:.1%} nucleus."
    return Result(numbers, verdict, (0,))


@experiment("min-p", "T09.05", question="At high temperatures, is min-p more coherent than top-p at equal diversity?")
def min_p(effort: float) -> Result:
    """Continuations at temperatures 1.5 to 3, scored by the loss that the model itself gives them at temperature 1 and by distinct-2;
    curves of both, and the loss at equal diversity by interpolation."""
    count, length = (48, 64) if effort >= 1 else (4, 12)
    subject = model(effort)
    curves: dict[str, list[tuple[float, float, str]]] = {"top-p": [], "min-p": []}
    for temperature in (1.5, 2.0, 3.0):
        for value in (0.5, 0.7, 0.9, 0.95):
            rows = continued(subject, Sampling(temperature=temperature, top_p=value, max_tokens=length), count=count)
            curves["top-p"].append((distinct(rows, 2), judged(subject, rows, count), f"T {temperature}, p {value}"))
        for value in (0.3, 0.2, 0.1, 0.05):
            rows = continued(subject, Sampling(temperature=temperature, min_p=value, max_tokens=length), count=count)
            curves["min-p"].append((distinct(rows, 2), judged(subject, rows, count), f"T {temperature}, p {value}"))

    def at(name: str, diversity: float) -> float | None:
        points = sorted(curves[name])
        for (x0, y0, _), (x1, y1, _) in pairwise(points):
            if x0 <= diversity <= x1:
                return y0 + (y1 - y0) * (diversity - x0) / max(1e-9, x1 - x0)
        return None

    grid = [d / 20 for d in range(2, 20)]
    pairs = [(d, a, b) for d in grid if (a := at("top-p", d)) is not None and (b := at("min-p", d)) is not None]
    numbers = {"points (distinct-2, loss, setting)": curves, "loss at equal distinct-2 (distinct-2, top-p, min-p)": pairs}
    better = sum(b < a for _, a, b in pairs)
    holds = bool(pairs) and better > 0.7 * len(pairs)
    verdict = f"{'Holds' if holds else 'Does not hold clearly'}: min-p has the lower loss at {better} of {len(pairs)} diversities."
    return Result(numbers, verdict, (0,))


@experiment("cache-speed", "T08.01", question="Does decoding with a cache cost O(n) a token, and without O(n^2)?")
def cache_speed(effort: float) -> Result:
    """Processor time of one more token after n tokens, with and without the cache."""
    subject = model(effort)
    lengths = (128, 256, 512, 1024, 2048, 4096) if effort >= 1 else (32, 64)
    times: dict[str, list[float]] = {"with": [], "without": []}
    with torch.inference_mode():
        for n in lengths:
            x = torch.randint(0, small.VOCAB, (1, n), generator=torch.Generator().manual_seed(n))
            store = subject.cache(1, n + 8)
            subject(Inputs(x, cache=store), keep="last")
            times["with"].append(min(_seconds(lambda s=store, y=x: subject(Inputs(y[:, :1], cache=s), keep="last")) for _ in range(5)))
            times["without"].append(min(_seconds(lambda y=x: subject(Inputs(y), keep="last")) for _ in range(3)))
    faster = [b / a for a, b in zip(times["with"], times["without"], strict=True)]
    growth = {k: small.exponent(lengths[-3:], v[-3:]) for k, v in times.items()}
    numbers = {"lengths": lengths, "processor seconds of a token": times, "faster by": faster, "growth": growth}
    verdict = (
        f"{'Holds' if faster[-1] > 10 else 'Does not hold'}: a token with a cache is {faster[0]:.0f} times faster at {lengths[0]} and "
        f"{faster[-1]:.0f} times at {lengths[-1]}; growth exponents over the last lengths: "
        f"{growth['with']:.2f} with, {growth['without']:.2f} without."
    )
    return Result(numbers, verdict, (0,))


def _seconds(run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@experiment(
    "decode-throughput", "T19.03", question="At long context, how much faster does multi-query attention decode than multi-head attention?"
)
def decode_throughput(effort: float) -> Result:
    """Two layers of width 512 with 16 heads of 32 and 16, 4 and 1 kv heads, fp32; four rows of 2,048 and 8,192 cached tokens; tokens a
    second of wall time, medians over rounds that alternate."""
    lengths, rows, rounds, tokens = ((2048, 8192), 4, 15, 4) if effort >= 1 else ((64, 128), 2, 2, 2)
    kinds = {"multi-head": 16, "grouped": 4, "multi-query": 1}
    numbers: dict[str, Any] = {"rows": rows}
    faster: dict[int, dict[str, float]] = {}
    for length in lengths:
        stores, seconds = {}, {name: [] for name in kinds}  # type: ignore[var-annotated]
        for name, kv in kinds.items():
            spec = small.shape(dim=512, layers=2, attention={"heads": 16, "kv_heads": kv, "head_dim": 32})
            subject = initialize(build(spec, device="cpu"), seed=0).eval()
            store = subject.cache(rows, length + tokens)
            x = torch.randint(0, small.VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))
            with torch.inference_mode():
                for part in x.split(512, 1):
                    subject(Inputs(part, cache=store), keep="none")
            stores[name] = (subject, store)
        for _ in range(rounds):
            for name, (subject, store) in stores.items():
                seconds[name].append(_decoded(subject, store, tokens))
        speeds = {name: rows * tokens / statistics.median(values) for name, values in seconds.items()}
        faster[length] = {name: speeds[name] / speeds["multi-head"] for name in kinds}
        numbers[f"{length} cached tokens"] = {
            "tokens a second": speeds,
            "times multi-head": faster[length],
            "bytes of cache": {name: store.bytes for name, (_, store) in stores.items()},
        }
    last = faster[lengths[-1]]
    standing = (
        "Holds" if last["multi-query"] > last["grouped"] > 1 else "Faster, but not in order" if last["multi-query"] > 1 else "Does not hold"
    )
    told = "; ".join(f"at {n:,}: grouped {row['grouped']:.2f}, multi-query {row['multi-query']:.2f}" for n, row in faster.items())
    return Result(numbers, f"{standing} on this CPU: tokens a second, times multi-head's, {told} (caches of 1/4 and 1/16). No GPU.", ())


@torch.inference_mode()
def _decoded(subject: TransformerModel, store: Store, tokens: int) -> float:
    """Seconds of so many tokens of every row, which are then forgotten."""
    word = torch.ones(store.rows, 1, dtype=torch.int64)
    start = time.perf_counter()
    for _ in range(tokens):
        subject(Inputs(word, cache=store), keep="last")
    taken = time.perf_counter() - start
    store.drop_last(tokens)
    return taken


@experiment("exposure", "X.18", question="How much worse does a model predict after its own words than after the text's?")
def exposure(effort: float) -> Result:
    """Loss on 32 tokens of real text after a context of 64: real words, or 24 real ones and 40 sampled from the model."""
    count = 64 if effort >= 1 else 4
    subject = model(effort)
    ids = [i for text in small.texts()[1] for i in small.tokenizer().encode(text, bos=False)]
    step = len(ids) // (count + 1)
    rows = [ids[n * step : n * step + 96] for n in range(count)]
    own = continued(subject, Sampling(temperature=1, max_tokens=40), count=count)
    sides = {"real": rows, "own": [row[:24] + words + row[64:] for row, words in zip(rows, own, strict=True)]}
    losses = {}
    with torch.no_grad():
        for name, chosen in sides.items():
            x = torch.tensor(chosen)
            logits = subject(Inputs(x)).logits
            assert logits is not None
            losses[name] = (
                torch.nn.functional.cross_entropy(logits[:, 63:-1].flatten(0, 1), x[:, 64:].flatten(), reduction="none")
                .view(count, -1)
                .mean(1)
                .tolist()
            )
    gap = small.paired(losses["real"], losses["own"])
    numbers = {
        "contexts": count,
        "loss after real words": small.mean(losses["real"]),
        "after its own": small.mean(losses["own"]),
        "gap, nats": gap,
    }
    verdict = (
        f"Measured: {gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f}) nats on the same 32 tokens after the model's own 40 words; "
        "part of it is that those words say something else."
    )
    return Result(numbers, verdict, (0,))
