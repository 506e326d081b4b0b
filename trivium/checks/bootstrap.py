"""How sure a number is: bootstrap intervals for any statistic of a set of rows, and the .632 estimates of a fitted predictor.

Rows are drawn with replacement from a seeded numpy generator and the statistic is taken of many draws at once. Percentile intervals;
bias-corrected and accelerated ones (BCa: Efron 1987), equal to scipy's on the same seed; paired differences, which draw the same rows on both
sides; .632 (Efron 1983) and .632+ (Efron and Tibshirani 1997).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..core.errors import DataError

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""Takes R draws of the rows, [R, N] or [R, N, K], to R values [R]."""
Method = Literal["bca", "percentile"]
_CHUNK = 1 << 21  # numbers drawn at once
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """A statistic of the rows as they are, and the interval that covers its true value with probability `level`."""

    value: float
    low: float
    high: float
    level: float
    method: Method

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high

    def overlaps(self, other: Interval) -> bool:
        return self.low <= other.high and other.low <= self.high


def mean(samples: Array) -> Array:
    """[R, N] to [R]."""
    return samples.mean(axis=1)


def ratio(samples: Array) -> Array:
    """Terms [R, N, 2] to [R]: the sum of numerators over the sum of denominators, 0 where nothing was counted."""
    sums = samples.sum(axis=1)
    return np.divide(sums[:, 0], sums[:, 1], out=np.zeros(len(sums)), where=sums[:, 1] != 0)


def exp_ratio(samples: Array) -> Array:
    """Terms [R, N, 2] to [R]: e to the ratio, as in perplexity."""
    return np.exp(ratio(samples))


def interval(
    rows: ArrayLike, statistic: Statistic = mean, *, method: Method = "bca", level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The statistic of `rows` ([N] or [N, K]) with its interval.

    A statistic that does not vary over the draws has an interval of width 0. Where all draws lie on one side of the value, BCa counts half a
    draw on the other side. A single row says nothing about its spread: `DataError`.
    """
    data = np.asarray(rows, dtype=np.float64)
    if len(data) < 2:
        raise DataError(f"an interval needs at least 2 rows, got {len(data)}")
    if not 0 < level < 1:
        raise DataError(f"the level of an interval lies between 0 and 1, got {level}")
    value = float(statistic(data[None])[0])
    draws = distribution(data, statistic, resamples=resamples, seed=seed)
    tails = ((1 - level) / 2, (1 + level) / 2)
    if method == "bca":
        tails = _corrected(tails, draws, value, _jackknife(data, statistic))
    low, high = np.quantile(draws, tails)
    return Interval(value, float(low), float(high), level, method)


def paired(
    a: ArrayLike,
    b: ArrayLike,
    statistic: Statistic = mean,
    *,
    method: Method = "bca",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The difference statistic(b) - statistic(a) over the same rows, with its interval. `a` and `b` are [N] or [N, K], row for row."""
    one, two = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if one.shape != two.shape:
        raise DataError(f"paired rows must correspond one to one, got {list(one.shape)} and {list(two.shape)}")
    both = np.stack([one, two], axis=1)  # [N, 2] or [N, 2, K]
    return interval(
        both,
        lambda draws: statistic(draws[:, :, 1]) - statistic(draws[:, :, 0]),
        method=method,
        level=level,
        resamples=resamples,
        seed=seed,
    )


@dataclass(frozen=True)
class Crossed:
    """Ratios of sums over repeated runs and the rows that all of them saw, with what drawing both anew makes of them."""

    value: float
    draws: Array  # [R]

    def interval(self, level: float = 0.95) -> Interval:
        """The percentile interval."""
        low, high = np.quantile(self.draws, ((1 - level) / 2, (1 + level) / 2))
        return Interval(self.value, float(low), float(high), level, "percentile")

    def __sub__(self, other: Crossed) -> Crossed:
        """The paired difference: draw by draw, over the same runs and rows."""
        return Crossed(self.value - other.value, self.draws - other.draws)

    def p(self) -> float:
        """Two-sided: twice the share of draws on the lesser side of zero, each side counting one more."""
        low, high = int((self.draws <= 0).sum()), int((self.draws >= 0).sum())
        return min(1.0, 2 * (min(low, high) + 1) / (len(self.draws) + 1))


def crossed(values: ArrayLike, weights: ArrayLike, *, resamples: int = 2000, seed: int = 0) -> Crossed:
    """Sum of `values` [S, N] (S runs, of one seed each, over the same N rows) over S times the sum of `weights` [N], such as a
    loss per token. Runs and rows are drawn with replacement, both (Owen 2007); the same `seed` draws the same ones, so
    differences are paired. With few runs, their spread is known only roughly."""
    data, sizes = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if data.ndim != 2 or sizes.shape != data.shape[1:]:
        raise DataError(f"values must be [runs, rows] and weights [rows], got {list(data.shape)} and {list(sizes.shape)}")
    random = np.random.default_rng(seed)
    runs = random.integers(0, data.shape[0], (resamples, data.shape[0]))
    rows = random.integers(0, data.shape[1], (resamples, data.shape[1]))
    draws = np.array([data[np.ix_(r, n)].sum() / (len(r) * sizes[n].sum()) for r, n in zip(runs, rows, strict=True)])
    return Crossed(float(data.sum() / (len(data) * sizes.sum())), draws)


def distribution(rows: Array, statistic: Statistic, *, resamples: int, seed: int) -> Array:
    """The statistic of `resamples` draws of N rows with replacement, [resamples]."""
    random = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // rows.size)
    parts = []
    for start in range(0, resamples, chunk):
        index = random.integers(0, len(rows), (min(chunk, resamples - start), len(rows)))
        parts.append(statistic(rows[index]))
    return np.concatenate(parts)


def _jackknife(rows: Array, statistic: Statistic) -> Array:
    """The statistic with each row left out in turn, [N]."""
    count = len(rows)
    chunk = max(1, _CHUNK // rows.size)
    others = np.arange(count - 1)
    parts = []
    for start in range(0, count, chunk):
        left_out = np.arange(start, min(start + chunk, count))[:, None]
        parts.append(statistic(rows[others + (others >= left_out)]))
    return np.concatenate(parts)


def _corrected(tails: tuple[float, float], draws: Array, value: float, jackknife: Array) -> tuple[float, float]:
    """BCa's shifted tail probabilities: z0 from the share of draws below the value, a from the jackknife's skewness."""
    below = ((draws < value).sum() + (draws <= value).sum()) / 2
    below = min(max(below, 0.5), len(draws) - 0.5)
    z0 = _NORMAL.inv_cdf(below / len(draws))
    u = jackknife.mean() - jackknife
    spread = float((u**2).sum())
    a = float((u**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    shifted = [z0 + _NORMAL.inv_cdf(tail) for tail in tails]
    low, high = (_NORMAL.cdf(z0 + z / (1 - a * z)) for z in shifted)
    return low, high


Score = Callable[[NDArray, NDArray], float]
"""(targets [N], predictions [N]) to a score between 0 and 1, higher is better, a mean over rows."""


def point632(
    predict: Callable[[NDArray[np.int64]], NDArray],
    targets: ArrayLike,
    *,
    score: Score | None = None,
    method: Literal[".632", ".632+"] = ".632+",
    splits: int = 200,
    seed: int = 0,
) -> Array:
    """The score to expect on new rows, one estimate per bootstrap split [splits]: its mean estimates, its quantiles bound.

    `predict(train)` fits on the rows `train` [N] (with repeats) and predicts all N rows. The error on rows left out is blended with the error
    on all rows, by .632 or, in .632+, by more the closer the predictor comes to what ignoring its inputs would yield.
    """
    known = np.asarray(targets)
    count = len(known)
    measure = score or (lambda expected, given: float(np.mean(expected == given)))
    random = np.random.default_rng(seed)
    estimates = []
    while len(estimates) < splits:
        train = random.integers(0, count, count)
        out = np.setdiff1d(np.arange(count), train)
        if len(out) == 0:
            continue
        given = np.asarray(predict(train))
        left_out, apparent = 1 - measure(known[out], given[out]), 1 - measure(known, given)
        weight = 0.632
        if method == ".632+":
            uninformed = 1 - measure(np.repeat(known, count), np.tile(given, count))
            left_out = min(left_out, uninformed)
            overfit = (left_out - apparent) / (uninformed - apparent) if apparent < left_out else 0.0
            weight = 0.632 / (1 - 0.368 * overfit)
        estimates.append(1 - weight * left_out - (1 - weight) * apparent)
    return np.array(estimates)
