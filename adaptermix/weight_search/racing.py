"""Weak candidates stop early: successive halving over the dev rows, with paired tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from .candidate_model import TOGETHER
from .significance import Board
from .trial_store import Ledger
from .trials import Trial

ETA = 3
"""Each rung has this many times the rows of the one before, and at most one in as many candidates goes on."""
RUNGS = 3
COHORT = 9
"""Candidates of a sampler that race with each other."""
_LEAST, _LEAST_EACH = 24, 5
"""Rows of the first rung, and of each language in it: what is resampled are the rows of a language."""
_DOUBT = 5.0
"""Per cent: who is worse than the leader on all but as many resamples stops."""

Told = Callable[[Trial, float], None]
Answer = Callable[[Sequence[tuple[Trial, Sequence[int]]]], Iterable[Sequence[str]]]


def rungs(languages: Sequence[str]) -> list[list[int]]:
    """Return the rows that each rung adds: every ninth of each language, those that make it every third, the rest.

    With few rows there are fewer rungs, so that the first has enough of them, in every language, to tell anything.

    Example:
        >>> [len(places) for places in rungs(["de"] * 270)]
        [30, 60, 180]
        >>> [len(places) for places in rungs(["de"] * 40)]
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
    found: list[list[int]] = []
    before: set[int] = set()
    for step in [*steps, 1]:
        chosen = {place for place, rank in enumerate(ranks) if rank % step == 0}
        found.append(sorted(chosen - before))
        before |= chosen
    return found


def _parts(asked: Sequence[tuple[Trial, Sequence[int]]]) -> Iterator[list[tuple[Trial, Sequence[int]]]]:
    """Yield trials with the rows they are asked, so many at a time that what is lost with a process stays small."""
    part: list[tuple[Trial, Sequence[int]]] = []
    for trial, left in asked:
        if part and sum(len(rows) for _, rows in part) + len(left) > TOGETHER:
            yield part
            part = []
        part.append((trial, left))
    if part:
        yield part


class Race:
    """Runs candidates in cohorts that are halved from rung to rung.

    Args:
        board: Scores the answers.
        languages: Language of each dev row.
        answer: From trials, each with the rows it is asked, to their answers.
        baseline: The first adapter alone, whole; who is clearly worse than it stops too.
        size: Candidates of a cohort; the whole grid, or `COHORT`.
        told: Called with each trial that has ended and its value.
    """

    def __init__(
        self,
        board: Board,
        languages: Sequence[str],
        answer: Answer,
        *,
        baseline: Trial,
        size: int,
        told: Told = lambda _trial, _value: None,
    ) -> None:
        self._board, self._answer, self._baseline, self._size = board, answer, baseline, size
        self._rungs, self._told = rungs(languages), told
        self._before: dict[int, Sequence[str | None]] = {}

    def run(self, ledger: Ledger) -> None:
        """Run all trials of a ledger."""
        while cohort := list(self._asked(ledger)):
            for rung, places in enumerate(self._rungs):
                cohort = self._asked_more(ledger, cohort, places)
                last = rung + 1 == len(self._rungs)
                going_on = [] if last or not cohort else self._survivors(cohort, ledger.trials())
                for trial in cohort:
                    if trial not in going_on:
                        self._tell(ledger, trial)
                cohort = going_on

    def _asked(self, ledger: Ledger) -> Iterator[Trial]:
        asked = 0
        while asked < self._size and (found := ledger.ask()):
            number, candidate = found
            if known := ledger.known(candidate):
                self._tell(ledger, Trial(number=number, candidate=candidate, answers=known))
                continue
            asked += 1
            self._before[number] = ledger.partial(candidate) or ()
            yield Trial(number=number, candidate=candidate, answers=(None,) * sum(map(len, self._rungs)))

    def _asked_more(self, ledger: Ledger, cohort: Sequence[Trial], places: Sequence[int]) -> list[Trial]:
        """Ask trials more rows, but for those that a worker which died has asked them."""
        start = time.perf_counter()
        known = [self._known(trial, places) for trial in cohort]
        asked = [(trial, [place for place in places if trial.answers[place] is None]) for trial in known]
        done = []
        for part in _parts(asked):
            new = iter(self._answer([(trial, left) for trial, left in part if left]))
            for trial, left in part:
                answers = list(trial.answers)
                for place, answer in zip(left, next(new) if left else (), strict=True):
                    answers[place] = answer
                done.append(replace(trial, answers=tuple(answers)))
                ledger.keep_partial(done[-1])
        each = (time.perf_counter() - start) / max(1, sum(len(left) for _, left in asked))
        return [
            replace(trial, seconds=trial.seconds + each * len(left))
            for trial, (_, left) in zip(done, asked, strict=True)
        ]

    def _known(self, trial: Trial, places: Sequence[int]) -> Trial:
        """Return a trial with what is known of these rows from one that was not brought to an end."""
        before = self._before[trial.number]
        if not before:
            return trial
        asked = set(places)
        return replace(
            trial,
            answers=tuple(before[place] if place in asked else answer for place, answer in enumerate(trial.answers)),
        )

    def _tell(self, ledger: Ledger, trial: Trial) -> None:
        value = self._board.exact(self._board.counts(trial))
        if not trial.is_whole:  # other rows are easier or harder for all alike
            value += self._board.exact(self._board.counts(self._baseline))
            value -= self._board.exact(self._board.counts(self._baseline.on_rows_of(trial)))
        is_repeat = ledger.is_repeat(trial.number)
        ledger.tell(trial, value)
        if not is_repeat:
            self._told(trial, value)

    def _survivors(self, cohort: Sequence[Trial], earlier: Sequence[Trial]) -> list[Trial]:
        """Return who goes on: at most a third, and nobody who is clearly worse than the best on the same rows."""
        values = np.stack([self._board.values(self._board.counts(trial)) for trial in cohort])
        order = sorted(range(len(cohort)), key=lambda place: (-values[place, 0], cohort[place].candidate.distance))
        whole = [trial for trial in earlier if trial.is_whole]
        others = [trial.on_rows_of(cohort[0]) for trial in (*whole, self._baseline)]
        leaders = [values[order[0]], *(self._board.values(self._board.counts(trial)) for trial in others)]
        leader = max(leaders, key=lambda row: float(row[0]))
        most = max(1, -(-len(cohort) // ETA))
        found = [cohort[place] for place in order[:most] if np.percentile(leader[1:] - values[place, 1:], _DOUBT) <= 0]
        return found if found or whole else [cohort[order[0]]]  # a search ends with one that ran to the end
