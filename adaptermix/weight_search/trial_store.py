"""The trials of one search in an optuna storage, which any number of processes may share."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from ..errors import OutputError
from .liveness import STALE_AFTER, started, worker_of, works
from .space import Candidate, Choice, Parameter, Point
from .storage import (
    distribution,
    is_number,
    make_sampler,
    open_study,
    proposed_together,
    quiet,
    value_of,
    without_password,
)
from .trials import Trial, pack, unpack

_REPEAT = "repeat"
"""Mark of a trial whose candidate was known before."""


class Searched(Protocol):
    """What the ledger must know of a space."""

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """Parameters by name."""

    def candidate(self, point: Point) -> Candidate:
        """Return what a point stands for."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A space of candidates that are given one by one, each to be tried once."""

    candidates: Sequence[Candidate]

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """One: which of them."""
        return {"candidate": Choice(tuple(range(len(self.candidates))))}

    def candidate(self, point: Point) -> Candidate:
        """Return the one of this number."""
        return self.candidates[int(point["candidate"])]


class Ledger:
    """Asks for candidates and keeps what they answered.

    A trial belongs to the process that asked for it. If that one dies, its trial counts no more, and its candidate is
    given to another: a listed one since it is missing, one that a sampler proposed by being queued again.

    Args:
        place: Journal file, or the URL of a database.
        name: Name of the study, one per search.
        searched: The space.
        settings: What the search is of; another one under the same name is refused.
        sampler: `random`, `tpe`, `cmaes` or `gp`.
        seed: Seed of the sampler. What it proposes depends on the trials that are there too, so that one that goes on
            does not repeat itself; workers differ in `worker`.
        worker: What tells this process from others that share the study.
        limit: Most trials in all; for a list each of it once.
        rows: Dev rows, which every trial answers; None if that is not known.

    Raises:
        OutputError: the study is of other settings or is damaged, or the storage cannot be reached.
    """

    def __init__(
        self,
        place: str | Path,
        *,
        name: str,
        searched: Searched,
        settings: Mapping[str, Any],
        sampler: str = "random",
        seed: int = 0,
        worker: str = "",
        limit: int,
        rows: int | None = None,
    ) -> None:
        self._place, self._rows = place, rows
        self._searched, self._limit, self._sampler = searched, limit, sampler
        self._open: dict[int, Any] = {}
        self._known: list[tuple[Candidate, tuple[str | None, ...]]] = []
        self._distributions = {key: distribution(parameter) for key, parameter in searched.parameters.items()}
        self._token = uuid4().hex
        self._study = open_study(place, name)
        begun = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = make_sampler(sampler, (seed + zlib.crc32(f"{worker} {begun}".encode())) % 2**31)
        known = json.loads(json.dumps(settings, sort_keys=True))
        recorded = self._study.user_attrs.get("settings")
        if recorded is None:
            self._study.set_user_attr("settings", known)
        elif recorded != known:
            before = recorded if isinstance(recorded, dict) else {}
            changed = sorted(key for key in {*before, *known} if before.get(key) != known.get(key))
            raise OutputError(
                f"study '{name}' in {without_password(place)} was begun with other settings ({', '.join(changed)}). "
                "Go on with those, pass --overwrite to begin again, or give another --out or --study."
            )

        self._check()

    def _check(self) -> None:
        """Check what is read later on: a storage is a file, or a database, that others can write to.

        Raises:
            OutputError: a trial or the baseline has another form.
        """
        for trial in self._done():
            try:
                self._searched.candidate(self._point(trial))
                unpack(trial.user_attrs.get("answers"), self._rows)
                if not all(is_number(found) for found in (trial.user_attrs.get("seconds"), *(trial.values or [None]))):
                    raise ValueError("its value and its seconds must be numbers")
            except (ValueError, LookupError, TypeError) as error:
                raise self._damaged(f"trial {trial.number + 1}", error) from error
        try:
            self.baseline()
        except ValueError as error:
            raise self._damaged("the baseline", error) from error

    def _damaged(self, what: str, error: Exception) -> OutputError:
        return OutputError(
            f"{without_password(self._place)} must be as a search left it, and {what} in it is damaged: {error}. Pass "
            "--overwrite to begin again, or give another --storage."
        )

    def enqueue(self, points: Sequence[Point]) -> None:
        """Have these points tried first; those that are known already are passed over."""
        with quiet():
            for point in points:
                self._study.enqueue_trial(dict(point), skip_if_exists=True)

    def ask(self) -> tuple[int, Candidate] | None:
        """Begin a trial and return its number and candidate; None if enough are begun or done."""
        self.bury()
        while self._missing():
            trial = self._begun()
            if trial is not None:
                candidate = self._searched.candidate(self._point(trial))
                if not isinstance(self._searched, Listed) and self.known(candidate) is not None:
                    trial.set_user_attr(_REPEAT, True)
                return trial.number, candidate
        return None

    def is_repeat(self, number: int) -> bool:
        """Whether a running trial of this process has a candidate that was known when the sampler proposed it.

        It teaches the sampler, and takes no place among the trials that were asked for.
        """
        return _REPEAT in self._open[number].user_attrs

    def _begun(self) -> Any:
        """Begin a trial, and give it up if other workers were faster: of equals the one that began first counts."""
        listed = isinstance(self._searched, Listed)
        missing = self._missing()
        trial = self._signed(missing[0] if listed and missing else None)
        if trial is None:
            return None
        earlier = self._earlier(trial.number, all_told=listed)
        taken = {other.user_attrs.get("candidate") for other in earlier}
        surplus = missing[0] in taken if listed and missing else len(earlier) >= self._limit
        if surplus or not missing:
            self._fail(trial.number)
            return None
        return trial

    def _signed(self, candidate: int | None) -> Any:
        """Begin a trial and note whose it is; None if others took it for nobody's before that."""
        from optuna.exceptions import OptunaError

        with quiet():
            trial = self._study.ask({} if isinstance(self._searched, Listed) else self._distributions)
        try:
            worker = [socket.gethostname(), os.getpid(), self._token, started(os.getpid())]
            trial.set_user_attr("worker", worker)
            trial.set_user_attr("beat", time.time())
            if candidate is not None:
                trial.set_user_attr("candidate", candidate)
        except OptunaError:
            return None
        except BaseException:
            with suppress(Exception):  # else others would wait for it
                self._fail(trial.number)
            raise
        self._open[trial.number] = trial
        return trial

    def _earlier(self, number: int, *, all_told: bool) -> list[Any]:
        """Return the trials that began before; of a list, once each of them has told what it took."""
        while True:
            earlier = [other for other in self._counted() if other.number < number]
            if not all_told or all("candidate" in other.user_attrs for other in earlier):
                return earlier
            time.sleep(0.01)
            self.bury()

    def left(self) -> int:
        """Return how many trials are still to be begun."""
        self.bury()
        return len(self._missing())

    def together(self) -> int:
        """Return how many trials may be asked for before any of them is told, with no other ones proposed for it."""
        if isinstance(self._searched, Listed):
            return len(self._searched.candidates)
        return proposed_together(self._sampler, len(self._counted()))

    def _missing(self) -> list[int]:
        """Return what is still to be begun: numbers of a list, or of trials."""
        counted = self._counted()
        if isinstance(self._searched, Listed):
            taken = {trial.user_attrs.get("candidate") for trial in counted}
            return [number for number in range(len(self._searched.candidates)) if number not in taken]
        # a sampler that has settled on one candidate would propose it for ever
        repeats = sum(_REPEAT in trial.user_attrs for trial in self._done())
        return list(range(len(counted), self._limit)) if repeats < self._limit else []

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Give signs of life for this process's trials while the block runs."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(STALE_AFTER / 4):
                for trial in list(self._open.values()):
                    with suppress(Exception):  # the trial has ended, or the storage is away for a while
                        trial.set_user_attr("beat", time.time())

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def keep_partial(self, trial: Trial) -> None:
        """Keep what a trial has answered so far, for whoever goes on with it."""
        self._open[trial.number].set_user_attr("partial", pack(trial.answers))

    def partial(self, candidate: Candidate) -> tuple[str | None, ...] | None:
        """Return what a candidate answered in a trial that its worker did not bring to an end, if there is one."""
        for trial in self._study.get_trials(deepcopy=False):
            if "partial" in trial.user_attrs and trial.number not in self._open:
                with suppress(ValueError, LookupError, TypeError):  # what is damaged is asked again
                    if self._searched.candidate(self._point(trial)) == candidate:
                        return tuple(unpack(trial.user_attrs["partial"], self._rows))
        return None

    def tell(self, done: Trial, value: float) -> None:
        """Keep what a trial answered, and what the sampler is to learn from it.

        If others took this process for dead, the trial is theirs already, and nothing is kept.
        """
        from optuna.exceptions import OptunaError

        trial = self._open[done.number]
        with suppress(OptunaError, ValueError, RuntimeError):
            trial.set_user_attr("answers", pack(done.answers))
            trial.set_user_attr("seconds", done.seconds)
            self._study.tell(trial, value, skip_if_finished=True)
        self._open.pop(done.number)

    def trials(self) -> list[Trial]:
        """Return the trials that are done, in the order in which they began."""
        return [
            Trial(
                number=trial.number,
                candidate=self._searched.candidate(self._point(trial)),
                answers=tuple(unpack(trial.user_attrs["answers"], self._rows)),
                seconds=trial.user_attrs["seconds"],
            )
            for trial in self._done()
            if _REPEAT not in trial.user_attrs
        ]

    def _done(self) -> list[Any]:
        from optuna.trial import TrialState

        return list(self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    def baseline(self, name: str = "baseline") -> list[str | None] | None:
        """Return what the first adapter alone answered, or what is kept by another name, if some process asked it."""
        found = self._study.user_attrs.get(name)
        return unpack(found, self._rows) if found is not None else None

    def keep_baseline(self, answers: Sequence[str | None], name: str = "baseline") -> None:
        """Keep what the first adapter alone answered, or other answers that are not a trial, by another name."""
        if self.baseline(name) is None:
            self._study.set_user_attr(name, pack(answers))

    def is_busy(self) -> bool:
        """Whether a trial runs, here or elsewhere, or is still to be begun."""
        from optuna.trial import TrialState

        self.bury()
        return bool(self._missing() or self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))

    def keep_known(self, candidate: Candidate, answers: Sequence[str | None]) -> None:
        """Take answers of a candidate that need no trial."""
        self._known.append((candidate, tuple(answers)))

    def known(self, candidate: Candidate) -> tuple[str | None, ...] | None:
        """Return the answers of an earlier trial of the same candidate, if there is one."""
        for other, answers in self._known:
            if other == candidate:
                return answers
        for trial in self._done():
            if self._searched.candidate(self._point(trial)) == candidate:  # only then is it unpacked
                return tuple(unpack(trial.user_attrs["answers"], self._rows))
        return None

    def bury(self) -> None:
        """Give the candidates of workers that died to others; each trial is given once."""
        from optuna.exceptions import OptunaError
        from optuna.trial import TrialState

        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self._lives(trial):
                continue
            try:
                self._fail(trial.number)
            except (OptunaError, ValueError, RuntimeError):  # another worker did it, or it was done after all
                continue
            if trial.params:  # a list knows what is missing
                self._study.enqueue_trial(trial.params)

    def _point(self, trial: Any) -> Point:
        """Return a trial's point; of a list it is what the worker took."""
        if not isinstance(self._searched, Listed):
            return {key: value_of(parameter, trial.params[key]) for key, parameter in self._searched.parameters.items()}
        number, count = trial.user_attrs["candidate"], len(self._searched.candidates)
        if type(number) is not int or not 0 <= number < count:
            raise ValueError(f"its candidate must be a number below {count}, found {number!r}")
        return {"candidate": number}

    def _lives(self, trial: Any) -> bool:
        """Return whether a trial's worker lives: by its process on this machine, by its last sign elsewhere."""
        token = worker_of(trial)[2]
        return trial.number in self._open if token == self._token else works(trial)

    def _fail(self, number: int) -> None:
        from optuna.trial import TrialState

        self._study.tell(number, state=TrialState.FAIL)
        self._open.pop(number, None)

    def _counted(self) -> list[Any]:
        """Return the trials that run or are done, without repeats."""
        from optuna.trial import TrialState

        states = (TrialState.COMPLETE, TrialState.RUNNING)
        found = self._study.get_trials(deepcopy=False, states=states)
        return [trial for trial in found if _REPEAT not in trial.user_attrs]


def check_idle(place: str | Path, name: str) -> None:
    """Refuse to begin a study anew while others work on it.

    Raises:
        OutputError: a trial of it runs.
    """
    from optuna.trial import TrialState

    running = open_study(place, name).get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    if any(map(works, running)):
        raise OutputError(
            f"study '{name}' in {without_password(place)} must be idle to be begun again, and a process works on it. "
            "Wait for it, or give another --study."
        )
