"""Trials of a search in one process, one at a time, each candidate once; an interrupted search continues the same."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError
from .parameters import Choice, Parameter, Point
from .storage import StudyTrials, is_number, make_sampler, quiet

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

_STUDY = "candidates"
_PATIENCE = 10
"""Proposals of known candidates after which the next one is drawn at random."""


class SequentialTrials(StudyTrials):
    """Numbered proposals of a sampler: finished ones are read from the journal.

    A proposal is a function of the seed, its number and the trials before it, so an interrupted search proposes what
    an unbroken one would have (except for cmaes, which counts interrupted trials). A trial that was started and has no
    result is proposed again.

    Raises:
        OutputError: the file is not a journal of this search.
    """

    def __init__(self, path: Path, parameters: Mapping[str, Parameter], *, sampler: str, seed: int) -> None:
        super().__init__((path, _STUDY), parameters)
        self._sampler, self._seed = sampler, seed
        self._count = math.prod(map(_count, parameters.values()))
        self._open: Trial | None = None
        for trial in self._done():  # A journal is a file that others can write to.
            try:
                self._point(trial)
                if not all(map(is_number, trial.values or ())):
                    raise ValueError("its value must be a number")
            except (LookupError, ValueError, TypeError) as error:
                raise OutputError(
                    f"{path} must be a journal of this search, and candidate {trial.number + 1} in it is damaged: "
                    f"{error}. Give another --out.",
                    code="tune.journal",
                ) from error
        for trial in self._trials("RUNNING"):
            self._fail(trial.number)
            self._enqueue(trial.params)

    def __len__(self) -> int:
        return len(self._done())

    def point(self, number: int) -> Point | None:
        """Return proposal `number`: a finished one, or a new one from the sampler. None if all were tried."""
        done = self._done()
        if number >= len(done) >= self._count:
            return None
        return self._point(done[number] if number < len(done) else self._ask(number, done))

    def note(self, number: int) -> str | None:
        """Return the note of a finished proposal."""
        done = self._done()
        return done[number].user_attrs.get("note") if number < len(done) else None

    def report(self, step: int, value: float) -> None:
        """Store an intermediate value of the open trial; higher is better."""
        if self._open is not None:
            with quiet():
                self._open.report(value, step)

    def tell(self, value: float | None, note: str) -> None:
        """Finish the open trial, if there is one, with its value, or None if it was stopped."""
        from optuna.trial import TrialState

        if self._open is None:
            return
        self._open.set_user_attr("note", note)
        self._study.tell(self._open, value, state=TrialState.PRUNED if value is None else TrialState.COMPLETE)
        self._open = None

    def _ask(self, number: int, done: list[FrozenTrial]) -> Trial:
        """Start the next trial, with a candidate that is not known yet."""
        known = [trial.params for trial in done]
        for attempt in itertools.count():
            seed = (self._seed + zlib.crc32(f"{number} {attempt}".encode())) % 2**31
            self._study.sampler = make_sampler(self._sampler if attempt < _PATIENCE else "random", seed)
            with quiet():
                self._open = self._study.ask(self._distributions)
            if self._open.params not in known:
                break
            self._fail(self._open.number)
        return self._open

    def _done(self) -> list[FrozenTrial]:
        return self._trials("COMPLETE", "PRUNED")


def _count(parameter: Parameter) -> float:
    """Return the number of values of a parameter."""
    if isinstance(parameter, Choice):
        return len(parameter.values)
    return parameter.high - parameter.low + 1 if parameter.whole else math.inf
