"""Weak candidates stop early: successive halving over the dev rows, with paired tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from .candidate_model import TOGETHER
from .significance import TrialScorer
from .trial_store import TrialStore
from .trials import Trial

ETA = 3
"""Each rung has this many times the rows of the one before, and at most one of this many candidates continues."""
RUNGS = 3
COHORT = 9
"""Candidates of a sampler that race with each other."""
_LEAST, _LEAST_EACH = 24, 5
"""Fewest rows of the first rung, in all and of each language: resampling is by language."""
_DOUBT = 5.0
"""A candidate is stopped if it beats the leader on fewer than this percentage of bootstrap resamples."""

Asked = Sequence[tuple[Trial, Sequence[int]]]
"""Trials, each with the indices of the rows to answer."""


def rungs(languages: Sequence[str]) -> list[list[int]]:
    """Return the rows that each rung adds: every ninth row of each language, every third, the rest.

    With few rows there are fewer rungs, so that the first one has enough rows in every language.

    Example:
        >>> [len(rows) for rows in rungs(["de"] * 270)]
        [30, 60, 180]
        >>> [len(rows) for rows in rungs(["de"] * 40)]
        [40]
    """
    counts: dict[str, int] = {}
    ranks = []
    for language in languages:
        ranks.append(counts.get(language, 0))
        counts[language] = ranks[-1] + 1
    steps = [ETA**power for power in range(RUNGS - 1, 0, -1)]
    fewest = min(counts.values(), default=0)
    while steps and (fewest < steps[0] * (_LEAST_EACH - 1) + 1 or sum(r % steps[0] == 0 for r in ranks) < _LEAST):
        steps.pop(0)
    added: list[list[int]] = []
    before: set[int] = set()
    for step in [*steps, 1]:
        rows = {row for row, rank in enumerate(ranks) if rank % step == 0}
        added.append(sorted(rows - before))
        before |= rows
    return added


def _batches(asked: Asked) -> Iterator[list[tuple[Trial, Sequence[int]]]]:
    """Yield trials in batches of bounded size, so that little is lost with a process that dies."""
    batch: list[tuple[Trial, Sequence[int]]] = []
    for trial, rows in asked:
        if batch and sum(len(others) for _, others in batch) + len(rows) > TOGETHER:
            yield batch
            batch = []
        batch.append((trial, rows))
    if batch:
        yield batch


class SuccessiveHalving:
    """Runs candidates in cohorts that shrink from rung to rung.

    Args:
        scorer: Scores the answers.
        languages: Language of each dev row.
        answer: Returns the answers of trials, each to some rows.
        baseline: The first adapter alone, on all rows; a candidate that is clearly worse than it stops too.
        size: Candidates of a cohort: the whole grid, or `COHORT`.
        on_result: Called with each finished trial and its value.
    """

    def __init__(
        self,
        scorer: TrialScorer,
        languages: Sequence[str],
        answer: Callable[[Asked], Iterable[Sequence[str]]],
        *,
        baseline: Trial,
        size: int,
        on_result: Callable[[Trial, float], None] = lambda _trial, _value: None,
    ) -> None:
        self._scorer, self._answer, self._baseline, self._size = scorer, answer, baseline, size
        self._rungs, self._on_result = rungs(languages), on_result
        self._before: dict[int, Sequence[str | None]] = {}

    def run(self, store: TrialStore) -> None:
        """Run all trials of a store."""
        while cohort := list(self._start(store)):
            for rung, rows in enumerate(self._rungs):
                cohort = self._answer_rows(store, cohort, rows)
                is_last = rung + 1 == len(self._rungs)
                survivors = [] if is_last or not cohort else self._survivors(cohort, store.trials())
                for trial in cohort:
                    if trial not in survivors:
                        self._finish(store, trial)
                cohort = survivors

    def _start(self, store: TrialStore) -> Iterator[Trial]:
        """Start the trials of a cohort; those with known answers finish at once."""
        count = 0
        while count < self._size and (trial := store.ask()):
            if known := store.known(trial.candidate):
                self._finish(store, replace(trial, answers=known))
                continue
            count += 1
            self._before[trial.number] = store.partial(trial.candidate) or ()
            yield replace(trial, answers=(None,) * sum(map(len, self._rungs)))

    def _answer_rows(self, store: TrialStore, cohort: Sequence[Trial], rows: Sequence[int]) -> list[Trial]:
        """Add the answers to these rows, without those that a dead worker has computed."""
        start = time.perf_counter()
        known = [self._with_known(trial, set(rows)) for trial in cohort]
        asked = [(trial, [row for row in rows if trial.answers[row] is None]) for trial in known]
        done = []
        for batch in _batches(asked):
            new = iter(self._answer([(trial, missing) for trial, missing in batch if missing]))
            for trial, missing in batch:
                answers = list(trial.answers)
                for row, answer in zip(missing, next(new) if missing else (), strict=True):
                    answers[row] = answer
                done.append(replace(trial, answers=tuple(answers)))
                store.save_partial(done[-1])
        each = (time.perf_counter() - start) / max(1, sum(len(missing) for _, missing in asked))
        return [
            replace(trial, seconds=trial.seconds + each * len(missing))
            for trial, (_, missing) in zip(done, asked, strict=True)
        ]

    def _with_known(self, trial: Trial, rows: set[int]) -> Trial:
        """Return a trial with the answers to these rows of one that was not finished."""
        before = self._before[trial.number]
        if not before:
            return trial
        answers = (before[row] if row in rows else answer for row, answer in enumerate(trial.answers))
        return replace(trial, answers=tuple(answers))

    def _value(self, trial: Trial) -> float:
        return self._scorer.exact(self._scorer.counts(trial))

    def _finish(self, store: TrialStore, trial: Trial) -> None:
        value = self._value(trial)
        if not trial.is_whole:  # The rows that were not asked may be easier or harder, for all trials alike.
            value += self._value(self._baseline) - self._value(self._baseline.on_rows_of(trial))
        is_repeat = store.is_repeat(trial.number)
        store.tell(trial, value)
        if not is_repeat:
            self._on_result(trial, value)

    def _survivors(self, cohort: Sequence[Trial], earlier: Sequence[Trial]) -> list[Trial]:
        """Return at most a third of the cohort, and no trial that is clearly worse than the best on the same rows."""
        values = np.stack([self._scorer.values(self._scorer.counts(trial)) for trial in cohort])
        order = sorted(range(len(cohort)), key=lambda index: (-values[index, 0], cohort[index].candidate.distance))
        whole = [trial for trial in earlier if trial.is_whole]
        others = [trial.on_rows_of(cohort[0]) for trial in (*whole, self._baseline)]
        leaders = [values[order[0]], *(self._scorer.values(self._scorer.counts(trial)) for trial in others)]
        leader = max(leaders, key=lambda row: float(row[0]))
        best = order[: max(1, -(-len(cohort) // ETA))]
        survivors = [cohort[i] for i in best if np.percentile(leader[1:] - values[i, 1:], _DOUBT) <= 0]
        return survivors if survivors or whole else [cohort[order[0]]]  # One trial must run to the end.
