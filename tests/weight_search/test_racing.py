"""Races: what they save, and that they keep what matters."""

from __future__ import annotations

import numpy as np
import pytest

from adaptermix.weight_search.racing import COHORT, SuccessiveHalving, rungs
from adaptermix.weight_search.significance import TrialScorer
from adaptermix.weight_search.space import Candidate, CandidateList, Space, alone
from adaptermix.weight_search.trial_store import TrialStore
from adaptermix.weight_search.trials import Trial

from .test_significance import ACCURACY

ROWS, LANGUAGES = 540, 6
NAMES = [f"l{place * LANGUAGES // ROWS}" for place in range(ROWS)]


class World:
    """Rows of unlike difficulty; a candidate is right where its skill exceeds it, but for some rows of its own."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.difficulty, self.seed, self.asked = rng.random(ROWS), seed, 0

    def answers(self, asked):
        return [self.answer(trial, indices) for trial, indices in asked]

    def answer(self, trial, indices=range(ROWS)):
        self.asked += len(indices)
        weight = trial.candidate.weights[0]
        own = np.random.default_rng((self.seed, int(weight * 1000))).normal(0, 0.1, ROWS)
        skill = 0.7 - 1.5 * (weight - 0.7) ** 2
        return ["y" if self.difficulty[place] + own[place] < skill else "n" for place in indices]


def scorer():
    return TrialScorer(ACCURACY, NAMES, ["y"] * ROWS, objective="mean", seed=0)


def raced(tmp_path, seed, searched, limit, size, sampler="random"):
    world, table = World(seed), scorer()
    baseline = Trial(
        number=-1, candidate=alone(2), answers=tuple(world.answer(Trial(number=0, candidate=alone(2), answers=())))
    )
    store = TrialStore(
        (tmp_path / f"{seed}.log", "s"), searched=searched, settings={}, limit=limit, sampler=sampler, seed=seed
    )
    SuccessiveHalving(table, NAMES, world.answers, baseline=baseline, size=size).run(store)
    return store.trials(), table, world


def test_rungs_are_nested_spaced_and_cover_all_rows_once():
    parts = rungs(NAMES)
    assert [len(part) for part in parts] == [60, 120, 360]
    assert sorted(place for part in parts for place in part) == list(range(ROWS))
    for part in (parts[0], parts[0] + parts[1]):
        assert len({NAMES[place] for place in part}) == LANGUAGES
    assert rungs(["de"] * 10) == [list(range(10))]


def test_a_grid_is_raced_for_a_third_of_the_rows_and_the_best_is_as_good(tmp_path):
    grid = CandidateList([Candidate(weights=(w, round(1 - w, 2))) for w in np.linspace(0, 1, 12).round(2).tolist()])
    for seed in range(20):
        trials, table, world = raced(tmp_path, seed, grid, 12, 12)
        assert len(trials) == 12
        spent = sum(trial.rows for trial in trials)
        assert spent <= 0.35 * 12 * ROWS
        assert world.asked == spent + ROWS  # and the baseline
        found = max((t for t in trials if t.is_whole), key=lambda t: table.score(t).value)
        every = [
            Trial(number=0, candidate=c, answers=tuple(world.answer(Trial(number=0, candidate=c, answers=()))))
            for c in grid.candidates
        ]
        best = max(table.score(trial).value for trial in every)
        assert table.score(found).low <= best <= table.score(found).high


def test_samplers_race_in_cohorts_and_learn_from_those_that_stopped(tmp_path):
    trials, table, _ = raced(tmp_path, 1, Space(count=2), 27, COHORT, sampler="tpe")
    assert len(trials) == 27
    assert sum(trial.rows for trial in trials) < 0.4 * 27 * ROWS
    whole = [trial for trial in trials if trial.is_whole]
    assert 1 <= len(whole) <= 3
    assert max(whole, key=lambda t: table.score(t).value).candidate.weights[0] == pytest.approx(0.7, abs=0.2)


def test_nobody_who_is_clearly_worse_than_the_task_adapter_runs_to_the_end_but_one(tmp_path):
    grid = CandidateList([Candidate(weights=(w, 1 - w)) for w in (0.0, 0.05, 0.1, 0.15)])
    trials, _, _ = raced(tmp_path, 0, grid, 4, 4)
    assert sum(trial.is_whole for trial in trials) == 1


def test_candidates_that_are_proposed_twice_are_asked_once(tmp_path):
    grid = CandidateList([Candidate(weights=(0.7, 0.3)), Candidate(weights=(0.1, 0.9))] * 2)
    world, table = World(0), scorer()
    baseline = Trial(number=-1, candidate=alone(2), answers=("y",) * ROWS)
    store = TrialStore((tmp_path / "log", "s"), searched=grid, settings={}, limit=4)
    SuccessiveHalving(table, NAMES, world.answers, baseline=baseline, size=2).run(store)
    trials = store.trials()
    assert [t.answers for t in trials[2:]] == [t.answers for t in trials[:2]]
    assert world.asked == sum(trial.rows for trial in trials[:2])


def test_a_first_rung_has_rows_enough_of_every_language():
    """With one row of each nobody could be told from the best."""
    assert [len(part) for part in rungs([f"l{row % 30}" for row in range(270)])] == [270]
    assert [len(part) for part in rungs(["de"] * 100 + ["en"] * 13)] == [39, 74]


def test_a_race_that_was_killed_asks_no_row_twice(tmp_path):
    grid = CandidateList([Candidate(weights=(w, round(1 - w, 2))) for w in (0.2, 0.5, 0.7, 0.9)])
    baseline = Trial(number=-1, candidate=alone(2), answers=("n",) * ROWS)

    def race(world, answer):
        store = TrialStore((tmp_path / f"{world.seed}.log", "s"), searched=grid, settings={}, limit=4)
        SuccessiveHalving(scorer(), NAMES, answer, baseline=baseline, size=4).run(store)
        return store.trials()

    whole = World(0)
    expected = race(whole, whole.answers)
    broken = World(1)
    broken.difficulty = whole.difficulty
    calls = []

    def answers(asked):
        for trial, indices in asked:
            calls.append(trial)
            if len(calls) == 4:
                raise KeyboardInterrupt
            yield whole.answer(trial, indices)

    with pytest.raises(KeyboardInterrupt):
        race(broken, answers)
    calls.extend([None] * 10)
    before = whole.asked
    found = race(broken, answers)
    assert {trial.candidate.weights: trial.answers for trial in found} == {
        trial.candidate.weights: trial.answers for trial in expected
    }
    assert whole.asked - before == sum(trial.rows for trial in expected) - 3 * 60


@pytest.mark.parametrize(
    ("wrong", "asked"),
    [
        (4, 90),  # ahead on 1 row and behind on 4: at least as good as the leader in about 12 % of the resamples
        (9, 30),  # ahead on 1 and behind on 9: in about 1 %
    ],
)
def test_a_candidate_stops_if_it_is_worse_in_more_than_95_percent_of_the_resamples(tmp_path, wrong, asked):
    names = ["de"] * 270  # rungs of 30, 90 and 270 rows
    weights = [(0.9, 0.1), (0.8, 0.2), (0.4, 0.6), (0.3, 0.7), (0.2, 0.8), (0.1, 0.9)]
    # the leader misses row 0, the second some rows of the first rung, the others all
    missed = {0.9: {0}, 0.8: set(range(9, 9 * (wrong + 1), 9))}

    def answers(given):
        return [
            ["n" if place in missed.get(trial.candidate.weights[0], range(270)) else "y" for place in indices]
            for trial, indices in given
        ]

    table = TrialScorer(ACCURACY, names, ["y"] * 270, objective="mean", seed=0)
    baseline = Trial(number=-1, candidate=alone(2), answers=("n",) * 270)
    grid = CandidateList([Candidate(weights=pair) for pair in weights])
    store = TrialStore((tmp_path / "log", "s"), searched=grid, settings={}, limit=6)
    SuccessiveHalving(table, names, answers, baseline=baseline, size=6).run(store)
    assert [trial.rows for trial in store.trials()] == [270, asked, 30, 30, 30, 30]
