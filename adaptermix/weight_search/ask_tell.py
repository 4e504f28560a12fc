"""Candidates of a search whose trials are long: one process, one at a time, each once, kept so that it goes on."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import OutputError
from .parameters import label
from .space import Choice, Parameter, Point
from .storage import distribution, is_number, make_sampler, open_study, quiet, value_of

_STUDY = "candidates"
_PATIENCE = 10
"""Proposals of what is known already, after which the next is drawn at random."""


class Proposals:
    """What a sampler proposes, by number from 0.

    A proposal is a function of the seed, its number and the trials before it, so a search that goes on proposes what
    one that was not interrupted would have (but for cmaes, which counts what was interrupted). What was begun and not
    told is proposed again.

    Args:
        place: Journal file.
        parameters: What is searched.
        sampler: `random`, `tpe`, `cmaes` or `gp`.
        seed: Seed of the sampler.

    Raises:
        OutputError: the file is no journal.
    """

    def __init__(self, place: Path, parameters: Mapping[str, Parameter], *, sampler: str, seed: int) -> None:
        from optuna.trial import TrialState

        self._sampler, self._seed = sampler, seed
        self._study = open_study(place, _STUDY)
        self._distributions = {key: distribution(parameter) for key, parameter in parameters.items()}
        self._values = {
            key: {label(value): value for value in parameter.values}
            for key, parameter in parameters.items()
            if isinstance(parameter, Choice)
        }
        self._count = math.prod(map(_count, parameters.values()))
        self._told = (TrialState.COMPLETE, TrialState.PRUNED)
        self._open: Any = None
        self._check(place, parameters)
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._give_up(trial.number)
            with quiet():
                self._study.enqueue_trial(trial.params)

    def _check(self, place: Path, parameters: Mapping[str, Parameter]) -> None:
        """Check what is read later on: a journal is a file that others can write to.

        Raises:
            OutputError: a proposal has another form.
        """
        for trial in self._done():
            try:
                for key, parameter in parameters.items():
                    value_of(parameter, trial.params[key])
                if not all(map(is_number, trial.values or ())):
                    raise ValueError("its value must be a number")
            except (LookupError, ValueError, TypeError) as error:
                raise OutputError(
                    f"{place} must be a journal of this search, and candidate {trial.number + 1} in it is damaged: "
                    f"{error}. Give another --out."
                ) from error

    def __len__(self) -> int:
        return len(self._done())

    def point(self, number: int) -> Point | None:
        """Return a proposal: one that was told of before, or the next, which is to be told; None if all were tried."""
        done = self._done()
        if number < len(done):
            return self._read(done[number].params)
        return None if len(done) >= self._count else self._read(self._ask(number).params)

    def note(self, number: int) -> str | None:
        """Return what was kept with a proposal that was told of."""
        done = self._done()
        return done[number].user_attrs.get("note") if number < len(done) else None

    def report(self, step: int, value: float) -> None:
        """Keep how the open trial stands; of more is better."""
        if self._open is not None:
            with quiet():
                self._open.report(value, step)

    def tell(self, value: float | None, note: str) -> None:
        """Keep what the open trial is worth, None if it was stopped; nothing if none is open."""
        from optuna.trial import TrialState

        if self._open is None:
            return
        self._open.set_user_attr("note", note)
        self._study.tell(self._open, value, state=TrialState.PRUNED if value is None else TrialState.COMPLETE)
        self._open = None

    def _ask(self, number: int) -> Any:
        """Begin the next trial; what is known already is passed over."""
        known = [trial.params for trial in self._done()]
        for attempt in itertools.count():
            seed = (self._seed + zlib.crc32(f"{number} {attempt}".encode())) % 2**31
            self._study.sampler = make_sampler(self._sampler if attempt < _PATIENCE else "random", seed)
            with quiet():
                self._open = self._study.ask(self._distributions)
            if self._open.params not in known:
                break
            self._give_up(self._open.number)
        return self._open

    def _give_up(self, number: int) -> None:
        from optuna.trial import TrialState

        self._study.tell(number, state=TrialState.FAIL)

    def _done(self) -> list[Any]:
        return list(self._study.get_trials(deepcopy=False, states=self._told))

    def _read(self, params: Point) -> Point:
        return {
            key: self._values[key][params[key]] if key in self._values else params[key] for key in self._distributions
        }


def _count(parameter: Parameter) -> float:
    """Return how many values there are."""
    if isinstance(parameter, Choice):
        return len(parameter.values)
    return parameter.high - parameter.low + 1 if parameter.whole else math.inf
