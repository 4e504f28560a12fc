"""The interval of cross-fit covers what it claims, in simulated searches, and its parts do what they say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from adaptermix.evaluation.score import RowStatistics
from adaptermix.tasks.metrics import Metric, mean, mean_ends, micro_f1
from adaptermix.weight_search.crossfit import choose, cross_fit

ACCURACY = Metric(name="accuracy", count=lambda row, answer: (float(answer == row), 1.0), value=mean, ends=mean_ends)


def average(values):
    return np.mean(values, axis=0)


def searched(rng, candidates, *, rows=60, languages=3, accuracy=0.7, gains=None, clusters=None):
    """Return right answers of one search: translated rows, similar systems. [languages systems rows]"""
    threshold = norm.ppf(accuracy) + np.zeros(candidates + 1)
    threshold[1:] += 0 if gains is None else gains
    shared = rng.normal(size=rows if clusters is None else clusters.max() + 1)
    shared = shared if clusters is None else shared[clusters]
    found = []
    for _ in range(languages):
        difficulty = 0.7 * shared + np.sqrt(0.51) * rng.normal(size=rows)
        own = rng.normal(size=(candidates + 1, rows))
        found.append(np.sqrt(0.6) * difficulty + np.sqrt(0.4) * own < threshold[:, None])
    return np.array(found)


def fit(right, rule="best", distances=None, clusters=None):
    names = None if clusters is None else [str(number) for number in clusters]
    systems = [
        {
            f"l{language}": RowStatistics([(float(hit), 1.0) for hit in row], names)
            for language, row in enumerate(system)
        }
        for system in np.moveaxis(right, 1, 0)
    ]
    distances = np.arange(1.0, len(systems)) if distances is None else distances
    return cross_fit(ACCURACY, systems[1:], systems[0], distances=distances, rule=rule, join=average, seed=0)


@pytest.mark.parametrize("candidates", [3, 9, 20])
def test_the_interval_covers_nothing_where_there_is_nothing(candidates):
    """Candidates that are all as good as the baseline: 95 % intervals hold 0 in 93 to 97 % of the searches.

    The bounds allow for two standard errors of 120 searches; winners that each resample keeps gave .85.
    """
    rng = np.random.default_rng(candidates)
    found = [fit(searched(rng, candidates)) for _ in range(120)]
    covered = np.mean([score.low <= 0 <= score.high for score in found])
    assert 0.91 <= covered <= 0.99
    assert abs(np.mean([score.value for score in found])) < 0.008


def test_a_real_gain_is_measured_and_the_interval_lies_above_zero():
    rng = np.random.default_rng(0)
    gains = np.array([-0.3, 0.0, 0.6, 0.1])
    found = [fit(searched(rng, 4, rows=300, gains=gains)) for _ in range(20)]
    # accuracy .7 at the threshold of a standard normal, moved by .6
    expected = norm.cdf(norm.ppf(0.7) + 0.6) - 0.7
    assert np.mean([score.value for score in found]) == pytest.approx(expected, abs=0.01)
    assert all(score.low > 0 for score in found)


def test_one_candidate_is_a_paired_comparison():
    """Without a choice the value is the plain difference, and the error that of a paired mean."""
    rng = np.random.default_rng(1)
    right = searched(rng, 1, languages=1)
    found = fit(right)
    difference = right[0, 1].astype(float) - right[0, 0]
    assert found.value == pytest.approx(difference.mean(), abs=0.006)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(difference.std() / np.sqrt(60), rel=0.06)


def test_rows_of_a_cluster_are_in_one_fold():
    """Copies of a row say nothing new: with clusters the interval is that of the rows without their copies."""
    rng = np.random.default_rng(2)
    right = searched(rng, 9, rows=50, languages=1)
    copied = np.repeat(right, 4, axis=2)
    single = fit(right)
    clustered = fit(copied, clusters=np.repeat(np.arange(50), 4))
    assert (clustered.value, clustered.low, clustered.high) == pytest.approx((single.value, single.low, single.high))
    blind = fit(copied)
    assert blind.high - blind.low < 0.8 * (single.high - single.low)
    assert clustered.n == 200


def test_f1_is_computed_from_pooled_sums():
    """The mean of F1 over folds would be another number: a language whose rows all lie in one fold shows it."""
    metric = Metric(name="f1", count=lambda row, _: row, value=micro_f1)
    rows = [(1.0, 0.0, 0.0)] * 10 + [(0.0, 1.0, 1.0)] * 10
    better = [(1.0, 0.0, 0.0)] * 20
    found = cross_fit(metric, [{"en": better}], {"en": rows}, distances=[1.0], rule="best", join=average, seed=0)
    assert found.value == pytest.approx(0.5, abs=0.01)


def test_equal_candidates_are_chosen_by_distance_then_by_order():
    values = np.full((3, 11), 0.4)
    assert choose(values, [0.4, 0.1, 0.1], "best") == 1
    values[2] = 0.5
    assert choose(values, [0.4, 0.1, 0.3], "best") == 2
