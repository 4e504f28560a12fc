"""The trials of one search in an optuna storage, which any number of processes may share."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import OutputError
from .space import Candidate, Choice, Parameter, Point
from .trials import Trial, pack, unpack

SAMPLERS = ("random", "tpe", "cmaes", "gp")
STALE_AFTER = 120.0
"""Seconds without a sign of life after which a worker on another machine counts as dead."""


class Searched(Protocol):
    """What the ledger must know of a space."""

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """Parameters by name."""

    def candidate(self, point: Point) -> Candidate:
        """Return what a point stands for."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A space of candidates that are given one by one."""

    candidates: Sequence[Candidate]

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """One: which of them."""
        return {"candidate": Choice(tuple(range(len(self.candidates))))}

    def candidate(self, point: Point) -> Candidate:
        """Return the one of this number."""
        return self.candidates[int(point["candidate"])]

    def points(self) -> list[Point]:
        """Return all points, in order."""
        return [{"candidate": number} for number in range(len(self.candidates))]


def _sampler(name: str, seed: int) -> Any:
    from optuna import samplers

    makers: dict[str, Callable[[], Any]] = {
        "random": lambda: samplers.RandomSampler(seed=seed),
        "tpe": lambda: samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=6),
        "cmaes": lambda: samplers.CmaEsSampler(seed=seed),
        "gp": lambda: samplers.GPSampler(seed=seed, n_startup_trials=6),
    }
    return makers[name]()


def _storage(place: str | Path) -> Any:
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    text = str(place)
    if "://" in text:
        try:
            return RDBStorage(text)
        except Exception as error:  # of many kinds: drivers, networks, permissions
            reason = " ".join(str(error).split())[:200]
            raise OutputError(
                f"--storage must be a database that can be reached, and {text} is not: {reason}"
            ) from error
    path = Path(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))


def _distribution(parameter: Parameter) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if isinstance(parameter, Choice):
        return CategoricalDistribution(list(parameter.values))
    return FloatDistribution(parameter.low, parameter.high)


class Ledger:
    """Asks for candidates and keeps what they answered.

    Args:
        place: Journal file, or the URL of a database.
        name: Name of the study, one per search.
        searched: The space.
        settings: What the search is of; another one under the same name is refused.
        sampler: One of `SAMPLERS`.
        seed: Seed of the sampler; workers differ in it.
        limit: Most trials in all.

    Raises:
        OutputError: the study is of other settings, or the storage cannot be reached.
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
        limit: int,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._searched, self._limit = searched, limit
        self._open: dict[int, Any] = {}
        self._distributions = {key: _distribution(parameter) for key, parameter in searched.parameters.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # optuna's, at parts that it calls experimental
            self._study = optuna.create_study(
                storage=_storage(place),
                sampler=_sampler(sampler, seed),
                study_name=name,
                direction="maximize",
                load_if_exists=True,
            )
        known = json.loads(json.dumps(settings, sort_keys=True))
        recorded = self._study.user_attrs.get("settings")
        if recorded is None:
            self._study.set_user_attr("settings", known)
        elif recorded != known:
            changed = sorted(key for key in {*recorded, *known} if recorded.get(key) != known.get(key))
            raise OutputError(
                f"study '{name}' in {place} was begun with other settings ({', '.join(changed)}). "
                "Go on with those, pass --overwrite to begin again, or give another --out or --storage."
            )

    def enqueue(self, points: Sequence[Point]) -> None:
        """Have these points tried first; those that are known already are passed over."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for point in points:
                self._study.enqueue_trial(dict(point), skip_if_exists=True)

    def ask(self) -> tuple[int, Candidate] | None:
        """Begin a trial and return its number and candidate; None if enough are begun or done."""
        self.bury()
        if self._counted() >= self._limit:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = self._study.ask(self._distributions)
        if self._counted(before=trial.number) >= self._limit:  # another worker was faster
            self._fail(trial.number)
            return None
        trial.set_user_attr("worker", [socket.gethostname(), os.getpid()])
        self._open[trial.number] = trial
        return trial.number, self._searched.candidate(trial.params)

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

    def tell(self, done: Trial, value: float) -> None:
        """Keep what a trial answered, and what the sampler is to learn from it."""
        trial = self._open.pop(done.number)
        trial.set_user_attr("answers", pack(done.answers))
        trial.set_user_attr("seconds", done.seconds)
        self._study.tell(trial, value, skip_if_finished=True)

    def trials(self) -> list[Trial]:
        """Return the trials that are done, in the order in which they began."""
        from optuna.trial import TrialState

        return [
            Trial(
                number=trial.number,
                candidate=self._searched.candidate(trial.params),
                answers=tuple(unpack(trial.user_attrs["answers"])),
                seconds=trial.user_attrs["seconds"],
            )
            for trial in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        ]

    def baseline(self) -> list[str | None] | None:
        """Return what the first adapter alone answered, if some process has asked it."""
        found = self._study.user_attrs.get("baseline")
        return unpack(found) if found else None

    def keep_baseline(self, answers: Sequence[str | None]) -> None:
        """Keep what the first adapter alone answered."""
        if self.baseline() is None:
            self._study.set_user_attr("baseline", pack(answers))

    def is_busy(self) -> bool:
        """Whether a trial runs, here or elsewhere, or waits."""
        from optuna.trial import TrialState

        self.bury()
        if self._counted() < self._limit:
            return True
        return bool(self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))

    def known(self, candidate: Candidate) -> tuple[str | None, ...] | None:
        """Return the answers of an earlier trial of the same candidate, if there is one."""
        return next((trial.answers for trial in self.trials() if trial.candidate == candidate), None)

    def bury(self) -> None:
        """Give the candidates of workers that died to others; each trial is given once."""
        from optuna.exceptions import OptunaError
        from optuna.trial import TrialState

        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if _is_alive(trial.user_attrs, begun=trial.datetime_start.timestamp() if trial.datetime_start else 0.0):
                continue
            try:
                self._fail(trial.number)
            except (OptunaError, ValueError):  # another worker did it, or it was done after all
                continue
            self._study.enqueue_trial(trial.params)

    def _fail(self, number: int) -> None:
        from optuna.trial import TrialState

        self._study.tell(number, state=TrialState.FAIL)

    def _counted(self, before: int | None = None) -> int:
        from optuna.trial import TrialState

        states = (TrialState.COMPLETE, TrialState.RUNNING)
        found = self._study.get_trials(deepcopy=False, states=states)
        return sum(before is None or trial.number < before for trial in found)


def _is_alive(attributes: Mapping[str, Any], *, begun: float) -> bool:
    """Return whether a trial's worker lives: by its process on this machine, by its last sign elsewhere."""
    host, process = attributes.get("worker", (None, 0))
    if host == socket.gethostname():
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True
    return time.time() - float(attributes.get("beat", begun)) < STALE_AFTER
