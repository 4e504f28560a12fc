"""How often 95 % intervals hold the truth, where rows are shared by languages and where runs differ."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from adaptermix.evaluation.score import Score, draws, mean_score, paired_difference, with_interval
from adaptermix.evaluation.systems import over_runs
from adaptermix.tasks import Metric


def _share(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return sums[..., 0] / sums[..., 1]


MEAN = Metric(name="mean", count=lambda row, answer: (1.0, 1.0), value=_share)


def rows_of(values: NDArray[np.float64]) -> list[list[tuple[float, float]]]:
    return [[(float(value), 1.0) for value in language] for language in values]


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_means_over_languages_of_translated_rows_are_covered(shared: float) -> None:
    """Row i has a part that is alike in all languages; the truth is 0. 200 sets, so a standard error of 1.5 points."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        common = rng.standard_normal((1, 60))
        values = np.sqrt(shared) * common + np.sqrt(1 - shared) * rng.standard_normal((6, 60))
        score = mean_score(MEAN, rows_of(values), seed=seed)
        held += score.low <= 0.0 <= score.high
    assert 0.89 <= held / 200 <= 0.99


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_means_over_few_runs_are_covered(runs: int) -> None:
    """Runs differ far more than rows do, and the truth is 0: the mean of runs that were never seen."""
    rng = np.random.default_rng(runs)
    held = 0
    for seed in range(300):
        values = rng.standard_normal((runs, 1)) + 0.05 * rng.standard_normal((runs, 40))
        means = over_runs(np.stack([draws(MEAN, rows_of(values), seed)]), seed)
        score = with_interval(means[0], n=40)
        held += score.low <= 0.0 <= score.high
    assert 0.92 <= held / 300 <= 0.98


def test_differences_of_systems_are_paired_by_run() -> None:
    """Both systems are good and bad in the same runs; their difference is certain although neither score is."""
    rng = np.random.default_rng(1)
    runs = rng.standard_normal((3, 1)) + np.zeros((3, 40))
    first, second = (np.stack([draws(MEAN, rows_of(runs + gain), 0)]) for gain in (0.0, 0.25))
    alone = with_interval(over_runs(second, 0)[0], n=40)
    gain = with_interval((over_runs(second, 0) - over_runs(first, 0))[0], n=40)
    assert alone.high - alone.low > 1.0
    assert (gain.low, gain.value, gain.high) == pytest.approx((0.25, 0.25, 0.25))


def test_one_run_is_no_more_than_its_rows() -> None:
    rng = np.random.default_rng(2)
    first, second = (rows_of(rng.standard_normal((2, 30))) for _ in range(2))
    systems = [np.stack([draws(MEAN, [language], 7) for language in system]) for system in (first, second)]
    one, two = (over_runs(system, 7).mean(0) for system in systems)
    for found, expected in (
        (with_interval(one, n=60), mean_score(MEAN, first, seed=7)),
        (with_interval(two - one, n=60), paired_difference(MEAN, first, second, seed=7)),
    ):
        assert (found.low, found.value, found.high) == pytest.approx((expected.low, expected.value, expected.high))


def test_languages_of_unlike_counts_are_drawn_apart() -> None:
    """Row i of one says nothing of row i of the other: the interval of their mean is narrower than of one alone."""
    rng = np.random.default_rng(3)
    one = rows_of(rng.standard_normal((1, 400)))[0]
    width = [_width(mean_score(MEAN, both)) for both in ([one, one], [one, [*one, (0.0, 1.0)]])]
    assert width[1] == pytest.approx(width[0] / np.sqrt(2), rel=0.15)


def _width(score: Score) -> float:
    return score.high - score.low
