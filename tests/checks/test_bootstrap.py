"""Bootstrap intervals against scipy and mlxtend on the same draws, their coverage in simulation, and their edges."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from trivium.checks import bootstrap
from trivium.core.errors import DataError


def _skewed(seed: int, count: int = 37) -> np.ndarray:
    return np.random.default_rng(seed).gamma(1.3, size=count)


STATISTICS = {
    "mean": lambda x, axis: np.mean(x, axis=axis),
    "median": lambda x, axis: np.median(x, axis=axis),
    "std": lambda x, axis: np.std(x, axis=axis, ddof=1),
}


@pytest.mark.concept("X.122", part="checks/bootstrap.py")
@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_intervals_equal_scipys_on_the_same_draws(name, method):
    stats = pytest.importorskip("scipy.stats")
    statistic, data = STATISTICS[name], _skewed(len(name))
    theirs = stats.bootstrap(
        (data,), statistic, n_resamples=1500, confidence_level=0.9, method=method.replace("bca", "BCa"), rng=np.random.default_rng(5)
    ).confidence_interval
    ours = bootstrap.interval(data, lambda draws: statistic(draws, 1), method=method, level=0.9, resamples=1500, seed=5)
    assert ours.value == pytest.approx(statistic(data, 0), abs=1e-12)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_paired_difference_equals_scipys_paired_bootstrap():
    stats = pytest.importorskip("scipy.stats")
    a, b = _skewed(1), _skewed(2)
    theirs = stats.bootstrap(
        (a, b), lambda x, y, axis: y.mean(axis) - x.mean(axis), paired=True, n_resamples=999, method="BCa", rng=np.random.default_rng(3)
    ).confidence_interval
    ours = bootstrap.paired(a, b, resamples=999, seed=3)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_paired_is_narrower_than_unpaired_when_rows_agree():
    a = _skewed(4, 200)
    b = a + np.random.default_rng(9).normal(0.1, 0.05, 200)
    difference, alone = bootstrap.paired(a, b), bootstrap.interval(b)
    assert 0 not in difference
    assert difference.high - difference.low < (alone.high - alone.low) / 5
    swapped = bootstrap.paired(b, a)
    assert swapped.value == pytest.approx(-difference.value)


def test_terms_of_a_ratio():
    terms = np.array([[1, 2], [3, 4], [0, 0], [2, 2]], dtype=float)
    assert bootstrap.interval(terms, bootstrap.ratio).value == pytest.approx(6 / 8)
    assert bootstrap.interval(terms, bootstrap.exp_ratio).value == pytest.approx(np.exp(6 / 8))
    assert bootstrap.interval(np.zeros((3, 2)), bootstrap.ratio).value == 0
    pairs = bootstrap.paired(terms, terms + [1, 0], bootstrap.ratio)
    assert pairs.value == pytest.approx(10 / 8 - 6 / 8)


@pytest.mark.slow
@pytest.mark.concept("X.122", part="checks/bootstrap.py")
@pytest.mark.parametrize("method", ["percentile", "bca"])
@pytest.mark.parametrize("kind", ["mean", "accuracy", "f1"])
def test_coverage_is_near_95_percent(method, kind):
    """700 data sets of 80 rows with a known truth: the share of intervals that hold it, 95% give or take 2 (two standard errors: 1.6)."""
    random = np.random.default_rng(11)
    trials, hits = 700, 0
    for trial in range(trials):
        if kind == "mean":
            rows, truth, statistic = random.normal(0.7, 0.3, 80), 0.7, bootstrap.mean
        elif kind == "accuracy":
            rows, truth, statistic = random.random(80) < 0.7, 0.7, bootstrap.mean
        else:
            denominator = random.integers(6, 11, 80)
            rows, truth, statistic = np.stack([random.binomial(denominator, 0.7), denominator], axis=1), 0.7, bootstrap.ratio
        hits += truth in bootstrap.interval(rows, statistic, method=method, resamples=600, seed=trial)
    assert 0.93 <= hits / trials <= 0.97


def test_bca_covers_a_skewed_statistic_better_than_percentiles():
    """The variance of skewed rows: both fall short of 95%, the percentile interval by clearly more."""
    random, truth, hits = np.random.default_rng(2), 1.0, {"percentile": 0, "bca": 0}
    for trial in range(300):
        rows = random.exponential(1.0, 40)
        for method in hits:
            interval = bootstrap.interval(rows, lambda draws: draws.var(axis=1, ddof=1), method=method, resamples=600, seed=trial)
            hits[method] += truth in interval
    assert hits["bca"] > hits["percentile"] + 9


def test_chunks_change_nothing(monkeypatch):
    rows = np.stack([_skewed(1), _skewed(2)], axis=1)
    whole = bootstrap.interval(rows, bootstrap.ratio, resamples=333, seed=1)
    monkeypatch.setattr(bootstrap, "_CHUNK", 500)
    assert bootstrap.interval(rows, bootstrap.ratio, resamples=333, seed=1) == whole


def test_edges():
    same = bootstrap.interval([1.0, 1.0, 1.0])
    assert (same.low, same.value, same.high) == (1, 1, 1)
    largest = bootstrap.interval(_skewed(3), lambda draws: draws.max(axis=1))
    assert largest.low <= largest.high == largest.value  # no draw exceeds the largest row
    assert bootstrap.interval([1, 2, 3], seed=1) == bootstrap.interval([1, 2, 3], seed=1)
    with pytest.raises(DataError, match="at least 2 rows"):
        bootstrap.interval([1.0])
    with pytest.raises(DataError, match="between 0 and 1"):
        bootstrap.interval([1.0, 2.0], level=95)
    with pytest.raises(DataError, match="one to one"):
        bootstrap.paired([1, 2], [1, 2, 3])


def test_overlap():
    one, two = bootstrap.interval([1, 2, 3, 4.0]), bootstrap.interval([11, 12, 13, 14.0])
    assert one.overlaps(one) and not one.overlaps(two) and not two.overlaps(one)


def _nearest_mean(x: np.ndarray, y: np.ndarray):
    def predict(train: np.ndarray) -> np.ndarray:
        kinds = np.unique(y[train])
        centers = np.stack([x[train][y[train] == kind].mean(axis=0) for kind in kinds])
        return kinds[((x[:, None] - centers) ** 2).sum(-1).argmin(1)]

    return predict


@pytest.mark.concept("X.122", part="checks/bootstrap.py")
@pytest.mark.parametrize("method", [".632", ".632+"])
def test_point632_equals_mlxtends_on_the_same_splits(method, monkeypatch):
    """A 1-nearest-neighbor predictor on noisy classes. mlxtend is handed our draws, since its generator differs; it does not clip the rate of
    overfitting to [0, 1] as the paper does, so that the classes are apart enough for no split to need it."""
    oracle = pytest.importorskip("mlxtend.evaluate")
    neighbors = pytest.importorskip("sklearn.neighbors")
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 60)
    x = random.normal(size=(60, 2)) + 2.2 * np.stack([y == 1, y == 2], axis=1)
    model = neighbors.KNeighborsClassifier(n_neighbors=1)
    trains: list[np.ndarray] = []

    def predict(train: np.ndarray) -> np.ndarray:
        trains.append(train)
        return model.fit(x[train], y[train]).predict(x)

    ours = bootstrap.point632(predict, y, method=method, splits=25, seed=4)

    class OurSplits:
        def __init__(self, n_splits: int, random_seed: int | None):
            assert n_splits == len(trains) and random_seed is None

        def split(self, rows: np.ndarray):
            return ((train, np.setdiff1d(np.arange(len(rows)), train)) for train in trains)

    monkeypatch.setattr(sys.modules["mlxtend.evaluate.bootstrap_point632"], "BootstrapOutOfBag", OurSplits)
    theirs = oracle.bootstrap_point632_score(model, x, y, n_splits=25, method=method)
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert ours.std() > 0.01


def test_point632_plus_weighs_an_uninformed_predictor_fully():
    """Labels that do not depend on the input: .632 of a look-up predictor is too high, .632+ is near chance."""
    random = np.random.default_rng(1)
    x, y = random.normal(size=(60, 1)), random.integers(0, 2, 60)

    def look_up(train: np.ndarray) -> np.ndarray:
        return y[train][abs(x - x[train].T).argmin(1)]

    plain = bootstrap.point632(look_up, y, method=".632", splits=60).mean()
    plus = bootstrap.point632(look_up, y, method=".632+", splits=60).mean()
    assert plain > 0.6 and abs(plus - 0.5) < 0.07
    informed = bootstrap.point632(_nearest_mean(x + 9 * y[:, None], y), y, splits=20)
    assert informed == pytest.approx(np.ones(20))
