"""Choosing among trials, and saying whether there was anything to find."""

from __future__ import annotations

import numpy as np
import pytest

from adaptermix.evaluation.score import paired_difference
from adaptermix.tasks.metrics import Metric, mean, mean_ends
from adaptermix.weight_search.crossfit import choose
from adaptermix.weight_search.decision import LEVEL
from adaptermix.weight_search.significance import TrialScorer, chance_of
from adaptermix.weight_search.space import Candidate, alone
from adaptermix.weight_search.trials import Trial

ACCURACY = Metric(name="accuracy", count=lambda row, answer: (float(answer == row), 1.0), value=mean)


def trial(right, number=0, weights=(0.5, 0.5)):
    answers = tuple("y" if hit else "n" for hit in right)
    return Trial(number=number, candidate=Candidate(weights=weights), answers=answers)


def scorer(rows, languages=1, objective="mean"):
    names = [f"l{place * languages // rows}" for place in range(rows)]
    return TrialScorer(ACCURACY, names, ["y"] * rows, objective=objective, seed=0)


def test_the_difference_is_that_of_a_paired_bootstrap():
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 60)) < 0.5
    table = scorer(60, languages=2)
    ours, theirs = trial(first), trial(second, weights=(1.0, 0.0))
    found = table.decide([ours], theirs, rule="best")
    expected = paired_difference(
        ACCURACY, list(table.counts(theirs).values()), list(table.counts(ours).values()), seed=0
    )
    for name in ("value", "low", "high"):
        assert getattr(found.difference, name) == pytest.approx(getattr(expected, name), abs=1e-12)


def test_few_rows_that_all_gain_do_not_make_the_difference_certain():
    hedged = Metric(name="accuracy", count=ACCURACY.count, value=mean, ends=mean_ends)
    table = TrialScorer(hedged, ["de"] * 12, ["y"] * 12, objective="mean", seed=0)
    alone = trial([False] * 12, weights=(1.0, 0.0))
    found = table.decide([trial([True] * 12), alone], alone, rule="best")
    # Agresti and Min: half a row for each way in which two answers can differ, 12.5 gained and .5 lost of 14
    middle = 12 / 14
    low = middle - 1.96 * ((13 - 12**2 / 14) ** 0.5 / 14)
    assert (found.difference.value, found.difference.high) == (1.0, 1.0)
    assert found.difference.low == pytest.approx(low, abs=0.02)
    # across folds too: the error about 0 of twelve gains of 1, and half a row gained and lost
    assert found.honest.value == found.honest.high == 1.0
    assert found.honest.low == pytest.approx(1 - 1.96 * (1 / 12 + 1 / 14**2) ** 0.5, abs=1e-3)
    # the baseline itself differs from itself by nothing
    assert (kept := table.decide([alone], alone, rule="best").difference).low == kept.high == 0.0


def test_the_worst_language_is_the_minimum():
    right = [True] * 8 + [True, False] * 4
    assert scorer(16, languages=2).score(trial(right)).value == 0.75
    worst = scorer(16, languages=2, objective="worst-language")
    assert worst.score(trial(right)).value == 0.5
    assert worst.exact(worst.counts(trial(right))) == 0.5


def test_rows_that_were_not_asked_do_not_count():
    half = Trial(number=0, candidate=alone(2), answers=("y", None, "n", None))
    assert (half.rows, half.is_whole) == (2, False)
    assert scorer(4).score(half).value == 0.5


@pytest.mark.parametrize(("rule", "expected"), [("best", 1), ("one-se", 2)])
def test_one_standard_error_goes_to_the_nearest_that_is_no_worse(rule, expected):
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.1, (3, 1001))
    values = np.array([0.30, 0.50, 0.49])[:, None] + noise * (np.arange(1001) > 0)
    assert choose(values, [0.0, 1.0, 0.2], rule) == expected


@pytest.mark.parametrize(
    ("rule", "second", "expected"),
    [
        ("best", 0.60, 0),
        ("best", 0.49, 0),
        ("best", 0.71, 1),
        # the difference to the best has a standard error of .1
        ("one-se", 0.61, 1),
        ("one-se", 0.59, 0),
        ("one-se", 0.71, 1),
    ],
)
def test_a_choice_by_hand(rule, second, expected):
    """The first scores .7, and the second, which is nearer to the task adapter, differs from it by .1 up and down."""
    resamples = np.array([0.1, -0.1] * 500)
    values = np.array([[0.7, *np.full(1000, 0.7)], [second, *(second + resamples)]])
    assert choose(values, [1.0, 0.5], rule) == expected


def test_of_equals_the_nearest_to_the_first_adapter_is_taken():
    assert choose(np.full((3, 1001), 0.4), [0.4, 0.1, 0.2], "best") == 1


def test_pure_noise_is_found_to_be_nothing():
    """20 candidates, each right or wrong by its own coin: a search says that it found something at most as often as it
    says it may (2.5 %), here with the slack of 200 tries."""
    rng = np.random.default_rng(0)
    table = scorer(120, languages=3)
    found = []
    for _ in range(200):
        rights = rng.random((21, 120)) < 0.6
        gains = np.stack([table.values(table.counts(trial(right))) for right in rights[1:]])
        found.append(chance_of(gains - table.values(table.counts(trial(rights[0]))), best_of(gains), rows=40) <= LEVEL)
    assert np.mean(found) <= 0.05
    # without the correction for 20 candidates it would be about 40 %
    assert np.mean(found) < 0.2


def test_what_is_there_is_found_and_measured_without_flattery():
    rng = np.random.default_rng(0)
    table = scorer(300, languages=3)
    honest, flattered = [], []
    for _ in range(20):
        luck = rng.random(300)
        trials = [trial(luck < 0.5 + gain, n) for n, gain in enumerate([-0.1, 0.0, 0.15, 0.1, -0.05])]
        found = table.decide(trials, trial(luck < 0.5), rule="best")
        assert found.chosen == 2
        assert found.is_found
        honest.append(found.honest.value)
        flattered.append(found.difference.value)
    assert np.mean(honest) == pytest.approx(0.15, abs=0.03)
    assert np.mean(flattered) == pytest.approx(0.15, abs=0.03)


def test_cross_fit_takes_away_what_choosing_adds():
    """Of 30 candidates that are all as good as the baseline the best looks better; cross-fit does not."""
    rng = np.random.default_rng(2)
    table = scorer(100)
    flattered, honest = [], []
    for _ in range(60):
        rights = rng.random((31, 100)) < 0.5
        found = table.decide([trial(right, n) for n, right in enumerate(rights[1:])], trial(rights[0]), rule="best")
        flattered.append(found.difference.value)
        honest.append(found.honest.value)
    assert np.mean(flattered) > 0.08
    assert abs(np.mean(honest)) < 0.025


def test_few_rows_tell_nothing_and_resamples_that_are_all_alike_tell_by_their_number():
    gains = np.full((2, 1001), 0.1)
    assert chance_of(gains, 0, rows=4) == 1.0
    assert chance_of(gains, 0, rows=5) == 2 / 2**5
    assert chance_of(np.zeros((2, 1001)), 0, rows=50) == 1.0


def test_what_is_said_is_said_of_the_trial_that_is_taken():
    """A steady small gain is beyond doubt; the larger but noisy one that is taken is not."""
    rng = np.random.default_rng(0)
    table = scorer(400)
    base = np.array([True] * 200 + [False] * 200)
    steady, noisy = base.copy(), base.copy()
    steady[200:212] = True
    noisy[rng.choice(200, 100, replace=False)] = False
    noisy[200 + rng.choice(200, 115, replace=False)] = True
    found = table.decide([trial(steady), trial(noisy, 1)], trial(base, -1, (1.0, 0.0)), rule="best")
    assert found.chosen == 1
    assert not found.is_found
    assert table.decide([trial(steady)], trial(base, -1, (1.0, 0.0)), rule="best").is_found
    baseline = trial(base, -1, (1.0, 0.0))
    alone_taken = table.decide([trial(~base), baseline], baseline, rule="best")
    assert (alone_taken.chosen, alone_taken.chance) == (1, 1.0)


def test_after_a_race_there_is_no_cross_fit():
    baseline = trial([True, False] * 20, -1, (1.0, 0.0))
    found = scorer(40).decide([trial([True] * 40)], baseline, rule="best", raced=True)
    assert found.honest is None
    assert found.document()["cross_fit"] is None


def test_trials_that_were_stopped_count_among_all_that_were_tried():
    """Six rows that all gain happen by chance once in 2^6, and each trial had that chance."""
    table, baseline = scorer(6), trial([False] * 6, -1, (1.0, 0.0))
    trials = [trial([True] * 6), baseline]
    stopped = [
        Trial(number=number, candidate=Candidate(weights=(0.2, 0.8)), answers=("n", "y", *[None] * 4))
        for number in (1, 2, 3)
    ]
    assert table.decide(trials, baseline, rule="best").chance == 2 / 2**6
    assert table.decide(trials, baseline, rule="best", stopped=stopped, raced=True).chance == 5 / 2**6


def best_of(gains):
    return int(np.argmax(gains[:, 0]))
