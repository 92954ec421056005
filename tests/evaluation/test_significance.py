import itertools

import numpy as np
import pytest
from scipy.stats import norm, t

from evaluation.significance import paired_bootstrap, paired_randomisation


def naive(a, b, resamples, seed):
    """One resample at a time."""
    rng = np.random.default_rng(seed)
    d, n = a - b, len(a)
    means = np.array([d[rng.integers(n, size=n)].mean() for _ in range(resamples)])
    as_far = sum(abs(m - d.mean()) >= abs(d.mean()) for m in means)
    tail = norm.cdf(-t.ppf(0.975, n - 1) * (n / (n - 1)) ** 0.5)
    return d.mean(), np.quantile(means, tail), np.quantile(means, 1 - tail), (as_far + 1) / (resamples + 1)


def pair(shift, n=300, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.beta(0.5, 0.5, n)
    return np.clip(a + rng.normal(shift, 0.2, n), 0, 1), a


def test_the_blocked_bootstrap_is_the_plain_one(monkeypatch):
    a, b = pair(0.02)
    whole = paired_bootstrap(a, b, 500, seed=3)
    monkeypatch.setattr("evaluation.significance._BLOCK", 1000)
    blocked = paired_bootstrap(a, b, 500, seed=3)
    expected = naive(a, b, 500, seed=3)
    for found in (whole, blocked):
        np.testing.assert_allclose((found.difference, found.low, found.high, found.p), expected, rtol=1e-12)


def test_interval_and_p_agree_with_the_normal_theory():
    a, b = pair(0.03, n=1000)
    found = paired_bootstrap(a, b)
    error = (a - b).std(ddof=1) / np.sqrt(len(a))
    assert found.low == pytest.approx(found.difference - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.difference + 1.96 * error, abs=0.1 * error)
    assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_pure_noise_is_significant_about_one_time_in_twenty():
    rng = np.random.default_rng(1)
    hits = sum(paired_bootstrap(rng.normal(size=80), rng.normal(size=80), 300, seed=i).p < 0.05 for i in range(400))
    assert 8 <= hits <= 36  # 20 expected; the bootstrap is a little liberal at 80 queries


@pytest.mark.parametrize(("queries", "confidence"), [(20, 0.95), (60, 0.9)])
def test_intervals_cover_the_truth_as_often_as_they_say(queries, confidence):
    """Differences like those of reciprocal ranks: many zeros, a few large jumps, in two thirds of them upwards."""
    rng = np.random.default_rng(0)
    inside, trials = 0, 1200
    for _ in range(trials):
        a = np.where(rng.random(queries) < 0.6, rng.beta(1, 2, queries), 0) * rng.choice([1, 1, -1], queries)
        found = paired_bootstrap(a, np.zeros(queries), 1000, seed=int(rng.integers(2**31)), confidence=confidence)
        inside += found.low <= 0.6 / 3 / 3 <= found.high
    assert confidence - 0.02 <= inside / trials <= confidence + 0.02


def test_randomisation_is_the_share_of_all_sign_changes():
    d = np.array([0.5, 0.25, -0.125, 0.5, 0.0, 0.25, 0.75, -0.25, 0.125])
    means = [abs(np.mean(d * signs)) for signs in itertools.product((1, -1), repeat=len(d))]
    exact = np.mean([m >= abs(d.mean()) - 1e-12 for m in means])
    assert paired_randomisation(d, np.zeros(len(d)), 40_000) == pytest.approx(exact, abs=0.005)
    assert paired_randomisation(d, d) == 1.0


def test_randomisation_blocks_are_of_one_stream(monkeypatch):
    a, b = pair(0.02)
    whole = paired_randomisation(a, b, 500, seed=3)
    monkeypatch.setattr("evaluation.significance._BLOCK", 1200)
    assert paired_randomisation(a, b, 500, seed=3) == whole


def test_randomisation_of_pure_noise_is_significant_one_time_in_twenty():
    rng = np.random.default_rng(1)
    hits = sum(paired_randomisation(rng.normal(size=40), np.zeros(40), 300, seed=i) < 0.05 for i in range(600))
    assert 16 <= hits <= 44  # 30 expected


def test_the_direction_is_a_minus_b_and_the_seed_decides():
    a, b = pair(0.05)
    one, other = paired_bootstrap(a, b, 1000), paired_bootstrap(b, a, 1000)
    assert one.difference == -other.difference
    assert one.low == pytest.approx(-other.high)
    assert one == paired_bootstrap(a, b, 1000)
    assert one != paired_bootstrap(a, b, 1000, seed=1)


def test_equal_models_do_not_differ():
    a, _ = pair(0)
    same = paired_bootstrap(a, a, 200)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_a_constant_difference_is_certain():
    a, _ = pair(0)
    found = paired_bootstrap(a + 0.1, a, 200)
    assert found.p == pytest.approx(1 / 201)
    assert str(found) == "+0.1000 [+0.1000, +0.1000], p = 0.005"


def test_scores_of_other_queries_are_refused():
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)"):
        paired_bootstrap(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="at least 2 queries"):
        paired_bootstrap(np.zeros(1), np.zeros(1))
