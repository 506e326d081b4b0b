"""Each step against transformers' processor or a hand calculation; the draw against exact frequencies; rows against rows alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as hf

from trivium.core.errors import ConfigError
from trivium.core.spec import validate
from trivium.infer.sampling import Sampler, Sampling, sample_naive
from trivium.infer.steps import (
    Filters,
    draw,
    min_p,
    narrow,
    pick,
    pick_fast,
    presence_frequency,
    repetition,
    top_k,
    top_p,
    uniforms,
)


def column(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)[:, None]


def logits(rows: int, vocab: int, *, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def tied(rows: int, vocab: int, *, seed: int = 0) -> Tensor:
    """Logits with few distinct values, so that every border is a tie."""
    return logits(rows, vocab, seed=seed, scale=1.5).round()


def half(rows: int, vocab: int, *, seed: int = 0) -> Tensor:
    return logits(rows, vocab, seed=seed).half().float()


def fit(observed: Tensor, probabilities: Tensor) -> float:
    """Chi-square p value of counts [V] under probabilities [V]; cells with probability 0 must be empty."""
    possible = probabilities > 0
    assert observed[~possible].sum() == 0
    expected = probabilities[possible].double() * observed.sum()
    statistic = ((observed[possible] - expected) ** 2 / expected).sum()
    return torch.special.gammaincc((possible.sum() - 1) / 2.0, statistic / 2).item()


def histogram(row: Tensor, sampling: Sampling, *, samples: int = 20_000) -> Tensor:
    """Counts [V] of `samples` requests, each with its own seed, drawn from the same logits."""
    sampler = Sampler([sampling] * samples, [[0]] * samples, vocab=len(row))
    sampler.seeds = torch.arange(samples)
    return torch.bincount(sampler.step(row.expand(samples, -1)).ids, minlength=len(row))


def kept(scores: Tensor) -> Tensor:
    return scores > -torch.inf


def agree(scores: Tensor, filters: Filters) -> float:
    """Holds the fast way to the naive one, sets and tokens: NaN where they differ, or the share of rows that it answered by itself."""
    ids, weights, certain = narrow(scores, filters)
    fast = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, weights > 0)
    naive = filters.apply(scores)
    # a weight that fp32 rounds to 0 is dropped by both draws
    same = torch.equal(fast[certain], ((naive - naive.amax(-1, keepdim=True)).exp() > 0)[certain])
    for u in (0.0, 0.3, 0.77, 0.999):
        at = torch.full((len(scores),), u, dtype=torch.float64)
        same &= torch.equal(pick_fast(scores, filters, at), pick(scores, filters, at))
    for way in (pick, pick_fast):  # the last place: rounding may choose among the unlikely, never what is dropped
        last = way(scores, filters, torch.full((len(scores),), 1 - 2.0**-52, dtype=torch.float64))
        same &= bool(kept(naive).gather(1, last[:, None]).all())
    return certain.double().mean().item() if same else math.nan


# temperature


@pytest.mark.concept("T09.02", part="infer/steps.py")
@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 1.3, 2.0])
def test_temperature_is_transformers(temperature: float) -> None:
    """The scores before the draw equal the warper's: the token at every u is the same."""
    scores = logits(50, 40)
    warped = hf.TemperatureLogitsWarper(temperature)(None, scores)
    sampler = Sampler([Sampling(temperature=temperature, seed=i) for i in range(50)], [[0]] * 50, vocab=40)
    assert torch.equal(scores / sampler.temperature, warped)
    assert torch.equal(sampler.step(scores).ids, draw(warped, uniforms(torch.arange(50), torch.zeros(50, dtype=torch.int64))))


@pytest.mark.concept("T09.02", part="infer/steps.py")
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_sampled_frequencies_are_the_softmax(temperature: float) -> None:
    row = logits(1, 30, scale=1.5)[0]
    assert fit(histogram(row, Sampling(temperature=temperature)), (row / temperature).softmax(-1)) > 0.01
    assert fit(histogram(row, Sampling(temperature=temperature)), (row / (temperature * 1.2)).softmax(-1)) < 0.001


@pytest.mark.concept("T09.02", part="infer/steps.py")
def test_entropy_rises_with_temperature_between_its_limits() -> None:
    row = logits(1, 30)[0]
    entropies = []
    for temperature in (0.05, 0.3, 0.7, 1.0, 1.5, 3.0, 50.0):
        counts = histogram(row, Sampling(temperature=temperature), samples=5000).double()
        share = counts[counts > 0] / counts.sum()
        entropies.append(-(share * share.log()).sum().item())
    assert entropies == sorted(entropies)
    assert histogram(row, Sampling(temperature=1e-5), samples=100)[row.argmax()] == 100
    assert histogram(row, Sampling(temperature=0.0), samples=100)[row.argmax()] == 100
    assert fit(histogram(row, Sampling(temperature=1e9)), torch.full((30,), 1 / 30)) > 0.01


# top-k


@pytest.mark.concept("T09.04", part="infer/steps.py")
@pytest.mark.parametrize("make", [logits, tied, half])
@pytest.mark.parametrize("k", [1, 2, 7, 39, 40, 41, 1000])
def test_top_k_is_transformers(make, k: int) -> None:
    scores = make(500, 40)
    expected = hf.TopKLogitsWarper(k)(None, scores)
    assert torch.equal(top_k(scores, k=torch.full((500, 1), k), most=k), expected)


@pytest.mark.concept("T09.04", part="infer/steps.py")
def test_top_k_of_each_row_and_its_frequencies() -> None:
    scores = tied(4, 40)
    out = top_k(scores, k=torch.tensor([[0], [3], [12], [99]]), most=99)
    for row, k in enumerate((40, 3, 12, 99)):
        assert torch.equal(out[row : row + 1], hf.TopKLogitsWarper(k)(None, scores[row : row + 1]))
    row = logits(1, 30, scale=1.5)[0]
    expected = torch.zeros(30).scatter(0, row.topk(5).indices, row.topk(5).values.softmax(-1))
    assert fit(histogram(row, Sampling(top_k=5)), expected) > 0.01


# top-p


@pytest.mark.concept("T09.03", part="infer/steps.py")
@pytest.mark.parametrize("make", [logits, tied, half])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.95, 0.999])
def test_top_p_keeps_the_set_of_transformers(make, p: float) -> None:
    scores = make(10_000, 100)
    expected = kept(hf.TopPLogitsWarper(p)(None, scores))
    columns = torch.full((10_000, 1), p, dtype=torch.float64)
    assert torch.equal(kept(top_p(scores, p=columns)), expected)
    assert agree(scores[:1000], Filters.of([0] * 1000, [p] * 1000, [0.0] * 1000)) > (0.0 if make is tied else 0.7)


@pytest.mark.concept("T09.03", part="infer/steps.py")
def test_top_p_is_minimal_reaches_p_and_adapts() -> None:
    scores = logits(2000, 60) * torch.linspace(0.05, 1, 2000)[:, None]
    p = 0.8
    chosen = kept(top_p(scores, p=torch.full((2000, 1), p, dtype=torch.float64)))
    probabilities = scores.double().softmax(-1)
    mass = (probabilities * chosen).sum(-1)
    least = probabilities.masked_fill(~chosen, 2.0).amin(-1)
    assert (mass >= p - 1e-6).all()
    assert (mass - least < p + 1e-6).all()  # without the least of them it is not reached
    assert (probabilities.masked_fill(chosen, -1.0).amax(-1) <= least).all()
    entropy = -(probabilities * probabilities.log()).sum(-1)
    assert torch.corrcoef(torch.stack([entropy, chosen.sum(-1).double()]))[0, 1] > 0.9
    assert kept(top_p(scores, p=torch.full((2000, 1), 1e-9, dtype=torch.float64))).sum(-1).eq(1).all()


@pytest.mark.concept("T09.03", part="infer/steps.py")
def test_top_p_frequencies_and_rows_of_their_own() -> None:
    row = logits(1, 30, scale=1.5)[0]
    expected = hf.TopPLogitsWarper(0.7)(None, row[None])[0].softmax(-1)
    assert 1 < (expected > 0).sum() < 30
    assert fit(histogram(row, Sampling(top_p=0.7)), expected) > 0.01
    scores = logits(3, 50)
    out = top_p(scores, p=column(1.0, 0.3, 0.9, dtype=torch.float64))
    assert torch.equal(out[0], scores[0])
    assert torch.equal(out[1:2], hf.TopPLogitsWarper(0.3)(None, scores[1:2]))
    assert torch.equal(out[2:], hf.TopPLogitsWarper(0.9)(None, scores[2:]))


# min-p


@pytest.mark.concept("T09.05", part="infer/steps.py")
@pytest.mark.parametrize("make", [logits, tied, half])
@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.5, 1.0])
def test_min_p_is_transformers(make, p: float) -> None:
    scores = make(2000, 60)
    out = min_p(scores, p=torch.full((2000, 1), p))
    assert torch.equal(kept(out).any(-1), torch.ones(2000, dtype=torch.bool))
    assert kept(out).gather(1, scores.argmax(-1, keepdim=True)).all()
    assert torch.equal(out, hf.MinPLogitsWarper(p)(None, scores))


@pytest.mark.concept("T09.05", part="infer/steps.py")
def test_min_p_frequencies() -> None:
    row = logits(1, 30, scale=1.5)[0]
    expected = hf.MinPLogitsWarper(0.2)(None, row[None])[0].softmax(-1)
    assert 1 < (expected > 0).sum() < 30
    assert fit(histogram(row, Sampling(min_p=0.2)), expected) > 0.01


# penalties and bias


def test_repetition_penalty_is_transformers() -> None:
    scores = logits(20, 30)
    ids = torch.randint(0, 30, (20, 15), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(20, 30, dtype=torch.bool).scatter(1, ids, True)
    for penalty in (0.8, 1.0, 1.3):
        expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
        assert torch.equal(repetition(scores, seen=seen, penalty=torch.full((20, 1), penalty)), expected)


def test_presence_and_frequency_by_hand() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, -1.0]])
    counts = torch.tensor([[0.0, 1.0, 3.0, 2.0]])
    out = presence_frequency(scores, counts=counts, presence=column(0.5), frequency=column(0.25))
    assert torch.equal(out, torch.tensor([[1.0, 2 - 0.25 - 0.5, 3 - 0.75 - 0.5, -1 - 0.5 - 0.5]]))


def test_penalties_see_the_prompt_or_the_answer() -> None:
    """Repetition counts prompt and answer, presence and frequency the answer alone; bias is one row's."""
    scores = torch.tensor([[3.0, 2.9, 2.8, 0.0]])
    rows = [
        Sampling(temperature=0, repetition_penalty=2.0),
        Sampling(temperature=0, presence_penalty=1.0),
        Sampling(temperature=0, frequency_penalty=0.15),
        Sampling(temperature=0, logit_bias={3: 4.0, 0: -9.0}),
        Sampling(temperature=0),
    ]
    sampler = Sampler(rows, [[0]] * 5, vocab=4)
    steps = [sampler.step(scores.expand(5, -1)).ids.tolist() for _ in range(4)]
    first, second, third, fourth, fifth = zip(*steps, strict=True)
    assert first == (1, 2, 0, 0)  # 1.5 2.9 2.8 | 1.5 1.45 2.8 | 1.5 1.45 1.4
    assert second == (0, 1, 2, 0)  # 3 2.9 2.8 | 2 2.9 2.8 | 2 1.9 2.8 | 2 1.9 1.8
    assert third == (0, 1, 0, 2)  # 3 2.9 2.8 | 2.85 2.9 2.8 | 2.85 2.75 2.8 | 2.7 2.75 2.8
    assert fourth == (3, 3, 3, 3)
    assert fifth == (0, 0, 0, 0)


# the fast way


@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("only_top_k", [False, True])
def test_the_fast_way_is_the_naive_one(scale: float, only_top_k: bool) -> None:
    """A vocabulary larger than the candidates: peaked rows are answered from them, flat rows are sorted."""
    some = torch.Generator().manual_seed(1)

    def choose(*values: float) -> list:
        return [values[i] for i in torch.randint(len(values), (300,), generator=some).tolist()]

    scores = logits(300, 2000, scale=scale)
    scores[200:] = scores[200:].mul(2).round()  # ties
    k = choose(1, 5, 40, 300) if only_top_k else choose(0, 0, 1, 40, 511, 512, 513, 5000)
    share = agree(scores, Filters.of(k, choose(1e-6, 0.1, 0.3, 0.6, 0.9, 0.999999, 1.0), choose(0.0, 0.0, 0.05, 0.5, 1.0)))
    assert share > (0.1 if scale > 1 else 0.0)


def test_the_fast_way_leaves_thresholds_within_rounding_to_the_naive() -> None:
    """Each row's threshold is a cumulative mass, or a ratio, of its own: fp32 rounding decides, here and there differently."""
    scores = logits(3000, 40, scale=2.0)
    mass = scores.double().softmax(-1).sort(descending=True).values.cumsum(-1)[:, 5].clamp(max=0.999).tolist()
    assert agree(scores, Filters.of([0] * 3000, mass, [0.0] * 3000)) == 0
    ordered = scores.softmax(-1).sort(descending=True).values
    ratio = (ordered[:, 5] / ordered[:, 0]).tolist()
    assert agree(scores, Filters.of([0] * 3000, [1.0] * 3000, ratio)) == 0


@pytest.mark.slow
@settings(max_examples=200)
@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=12),
    st.integers(0, 13),
    st.sampled_from([1e-6, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999999, 1.0]),
    st.sampled_from([0.0, 0.125, 0.5, 1.0]),
)
def test_the_fast_way_on_exact_borders(values: list[int], k: int, top: float, least: float) -> None:
    """Powers of two: cumulative sums and ratios meet their thresholds exactly, and ties abound."""
    scores = torch.tensor(values, dtype=torch.float32)[None] * torch.log(torch.tensor(2.0))
    assert agree(scores, Filters.of([k], [top], [least])) in (0, 1)


# the draw


def test_uniforms_are_splitmix64_and_uniform() -> None:
    mask = 2**64 - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    seeds, steps = [0, 1, 12345, 2**63 - 1], [0, 1, 7, 10**6]
    expected = [(mix((mix(seed) + (step + 1) * 0x9E3779B97F4A7C15) & mask) >> 12) / 2**52 for seed, step in zip(seeds, steps, strict=True)]
    assert uniforms(torch.tensor(seeds), torch.tensor(steps)).tolist() == expected
    flat = torch.full((64,), 1 / 64)
    along_steps = uniforms(torch.zeros(50_000, dtype=torch.int64), torch.arange(50_000))
    along_seeds = uniforms(torch.arange(50_000), torch.zeros(50_000, dtype=torch.int64))
    for u in (along_steps, along_seeds):
        assert fit(torch.bincount((u * 64).long(), minlength=64), flat) > 0.01
        pairs = (u[:-1] * 8).long() * 8 + (u[1:] * 8).long()
        assert fit(torch.bincount(pairs, minlength=64), flat) > 0.01


def test_the_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    scores = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).log()
    u = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2.0**-52], dtype=torch.float64)
    assert draw(scores.expand(6, -1), u).tolist() == [0, 0, 2, 2, 3, 3]
    wide = logits(50, 1000)
    u = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sums = wide.double().softmax(-1).cumsum(-1)
    assert torch.equal(draw(wide, u), (sums > u[:, None]).int().argmax(-1))
    masked_ends = torch.tensor([[-torch.inf, 1.0, -torch.inf]])
    assert draw(masked_ends.expand(50, -1), u).tolist() == [1] * 50


SETTINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.8]),
    top_k=st.sampled_from([0, 1, 5, 100]),
    top_p=st.sampled_from([0.2, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.6]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    logit_bias=st.dictionaries(st.integers(0, 24), st.floats(-3, 3), max_size=2),
    seed=st.integers(0, 2**63 - 1),
    logprobs=st.sampled_from([None, 0, 3]),
)


@settings(max_examples=60)
@given(st.lists(SETTINGS, min_size=1, max_size=5), st.integers(0, 1000))
def test_a_row_is_what_it_is_alone(rows: list[Sampling], seed: int) -> None:
    """Vectorized rows with settings of their own = one row at a time from the definitions, also after rows leave."""
    vocab, steps = 25, 4
    all_logits = logits(steps * len(rows), vocab, seed=seed).view(steps, len(rows), vocab)
    prompts = [[i % vocab, (7 * i) % vocab] for i in range(len(rows))]
    expected = []
    for i, row in enumerate(rows):
        answer: list[int] = []
        for step in range(steps):
            answer.append(sample_naive(all_logits[step, i], row, prompt=prompts[i], answer=answer))
        expected.append(answer)
    sampler, live = Sampler(rows, prompts, vocab=vocab), list(range(len(rows)))
    found: list[list[int]] = [[] for _ in rows]
    for step in range(steps):
        for i, token in zip(live, sampler.step(all_logits[step, live]).ids.tolist(), strict=True):
            found[i].append(token)
        if step == 1 and len(live) > 1:
            sampler.reorder(list(range(len(live) - 1, 0, -1)))
            live = live[:0:-1]
    for i, answer in enumerate(found):
        assert answer == expected[i][: len(answer)]
        assert len(answer) == (steps if i in live else 2)


def test_logprobs_are_the_models_own() -> None:
    scores = logits(6, 40).bfloat16()
    rows = [Sampling(temperature=0.3, top_k=3, seed=i, repetition_penalty=1.5, logprobs=2) for i in range(6)]
    drawn = Sampler(rows, [[1, 2]] * 6, vocab=40).step(scores)
    own = scores.float().log_softmax(-1)
    assert torch.equal(drawn.logprobs, own.gather(1, drawn.ids[:, None])[:, 0])
    assert torch.equal(drawn.top_logprobs, own.topk(2).values)
    assert torch.equal(own.gather(1, drawn.top_ids), drawn.top_logprobs)


# the spec


def test_settings_are_checked() -> None:
    for wrong in (
        {"temperature": -1},
        {"temperature": 1e-9},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"max_tokens": 0},
        {"stop": [""]},
        {"logit_bias": {-1: 2}},
        {"seed": 2**63},
        {"topp": 0.9},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            validate(Sampling, wrong)


def test_a_spec_survives_json_and_many_seeds_differ() -> None:
    one = Sampling(logit_bias={5: -1.5}, stop=("\n", "end"), stop_ids=(3,), seed=7)
    assert validate(Sampling, one.to_dict()) == one
    assert hash(one) == hash(validate(Sampling, one.to_dict()))
    seeds = {copy.seed for copy in one.many(50)}
    assert len(seeds) == 50 and one.many(3) == one.many(50)[:3]
