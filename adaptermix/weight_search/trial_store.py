"""The trials of one search in an optuna storage that any number of processes may share."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from uuid import uuid4

from ..errors import OutputError
from .liveness import STALE_AFTER, started, worker_of, works
from .parameters import Point
from .space import Candidate, CandidateList, SearchSpace
from .storage import (
    StudyAddress,
    StudyTrials,
    is_number,
    make_sampler,
    open_study,
    proposed_together,
    quiet,
    without_password,
)
from .trials import Answers, Trial, pack, unpack

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial as OptunaTrial

_REPEAT = "repeat"
"""Attribute of a trial whose candidate was known when the sampler proposed it."""


class TrialStore(StudyTrials):
    """Proposes candidates and keeps their answers.

    A trial belongs to the process that started it. If that process dies, its trial fails, and another process gets
    the candidate: one of a list because it is missing, one of a sampler because it is queued again.

    Args:
        address: Storage and name of the study, one per search.
        searched: The search space.
        settings: What identifies the search; a study of other settings is refused.
        sampler: `random`, `tpe`, `cmaes` or `gp`.
        seed: Seed of the sampler. Proposals also depend on the number of trials at the start, so that a search that
            continues does not repeat itself, and on `worker`.
        worker: Name of this process among those that share the study.
        limit: Most trials in all; of a list each candidate is tried once.
        rows: Number of answers per trial; None if it is not known.

    Raises:
        OutputError: the study has other settings or is damaged, or the storage cannot be reached.
    """

    def __init__(
        self,
        address: StudyAddress,
        *,
        searched: SearchSpace,
        settings: Mapping[str, object],
        sampler: str = "random",
        seed: int = 0,
        worker: str = "",
        limit: int,
        rows: int | None = None,
    ) -> None:
        super().__init__(address, searched.parameters)
        self._location, self._rows = without_password(address[0]), rows
        self._searched, self._limit, self._sampler = searched, limit, sampler
        self._listed = searched.candidates if isinstance(searched, CandidateList) else None
        self._open: dict[int, OptunaTrial] = {}
        self._known: list[tuple[Candidate, tuple[str | None, ...]]] = []
        self._token = uuid4().hex
        count = len(self._trials())
        self._study.sampler = make_sampler(sampler, (seed + zlib.crc32(f"{worker} {count}".encode())) % 2**31)
        known = json.loads(json.dumps(settings, sort_keys=True))
        recorded = self._study.user_attrs.get("settings")
        if recorded is None:
            self._study.set_user_attr("settings", known)
        elif recorded != known:
            before = recorded if isinstance(recorded, dict) else {}
            changed = sorted(key for key in {*before, *known} if before.get(key) != known.get(key))
            raise OutputError(
                f"study '{address[1]}' in {self._location} was started with other settings ({', '.join(changed)}). "
                "Continue with those, pass --overwrite to start again, or give another --out or --study.",
                code="study.other-settings",
            )
        self._check()

    def _check(self) -> None:
        """Check the form of everything that is read later: others can write to a storage.

        Raises:
            OutputError: a trial or the baseline has another form.
        """
        damaged = "the baseline"
        try:
            self.saved_answers()
            for trial in self._trials("COMPLETE"):
                damaged = f"trial {trial.number + 1}"
                self._finished(trial)
                if not all(is_number(value) for value in (trial.user_attrs.get("seconds"), *(trial.values or [None]))):
                    raise ValueError("its value and its seconds must be numbers")
        except (ValueError, LookupError, TypeError) as error:
            raise OutputError(
                f"{self._location} was changed after the search: {damaged} in it is damaged: {error}. Pass "
                "--overwrite to start again, or give another --storage.",
                code="storage.damaged",
            ) from error

    def enqueue(self, points: Sequence[Point]) -> None:
        """Queue these points to be tried first, except those that are in the study already."""
        for point in points:
            self._enqueue(point, skip_if_exists=True)

    def ask(self) -> Trial | None:
        """Start a trial; None if enough are running or done."""
        self.fail_dead_trials()
        while self._missing():
            trial = self._start()
            if trial is not None:
                candidate = self._searched.candidate(self._point(trial))
                if self._listed is None and self.known(candidate) is not None:
                    trial.set_user_attr(_REPEAT, True)
                return Trial(number=trial.number, candidate=candidate)
        return None

    def is_repeat(self, number: int) -> bool:
        """Whether a running trial of this process has a candidate that was known when the sampler proposed it.

        Its value is reported to the sampler, and it does not count as one of the requested trials.
        """
        return _REPEAT in self._open[number].user_attrs

    def _start(self) -> OptunaTrial | None:
        """Start a trial, or return None if other workers were faster: the first of equal trials counts."""
        missing = self._missing()
        index = missing[0] if self._listed is not None and missing else None
        trial = self._signed(index)
        if trial is None:
            return None
        earlier = self._earlier(trial.number)
        taken = {other.user_attrs.get("candidate") for other in earlier}
        if not missing or (index in taken if index is not None else len(earlier) >= self._limit):
            self._fail(trial.number)
            return None
        return trial

    def _signed(self, candidate: int | None) -> OptunaTrial | None:
        """Start a trial and store its worker; None if others failed it before that."""
        from optuna.exceptions import OptunaError

        with quiet():
            trial = self._study.ask({} if self._listed is not None else self._distributions)
        try:
            worker = [socket.gethostname(), os.getpid(), self._token, started(os.getpid())]
            trial.set_user_attr("worker", worker)
            trial.set_user_attr("beat", time.time())
            if candidate is not None:
                trial.set_user_attr("candidate", candidate)
        except OptunaError:
            return None
        except BaseException:
            with suppress(Exception):  # Otherwise other workers would wait for this trial.
                self._fail(trial.number)
            raise
        self._open[trial.number] = trial
        return trial

    def _earlier(self, number: int) -> list[FrozenTrial]:
        """Return the trials that started before; for a list, after each of them has stored its candidate."""
        while True:
            earlier = [other for other in self._counted() if other.number < number]
            if self._listed is None or all("candidate" in other.user_attrs for other in earlier):
                return earlier
            time.sleep(0.01)
            self.fail_dead_trials()

    def left(self) -> int:
        """Return how many trials have not started yet."""
        self.fail_dead_trials()
        return len(self._missing())

    def together(self) -> int:
        """Return how many trials may be started at once without changing the proposals."""
        if self._listed is not None:
            return len(self._listed)
        return proposed_together(self._sampler, len(self._counted()))

    def _missing(self) -> list[int]:
        """Return the indices of a list, or the numbers of trials, that have not started yet."""
        counted = self._counted()
        if self._listed is not None:
            taken = {trial.user_attrs.get("candidate") for trial in counted}
            return [number for number in range(len(self._listed)) if number not in taken]
        # A sampler that has converged would propose one candidate for ever.
        repeats = sum(_REPEAT in trial.user_attrs for trial in self._trials("COMPLETE"))
        return list(range(len(counted), self._limit)) if repeats < self._limit else []

    @contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Write a heartbeat for this process's trials while the block runs."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(STALE_AFTER / 4):
                for trial in list(self._open.values()):
                    with suppress(Exception):  # The trial has ended, or the storage is unreachable for a while.
                        trial.set_user_attr("beat", time.time())

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def save_partial(self, trial: Trial) -> None:
        """Store the answers of an unfinished trial, for a process that continues it."""
        self._open[trial.number].set_user_attr("partial", pack(trial.answers))

    def partial(self, candidate: Candidate) -> tuple[str | None, ...] | None:
        """Return a candidate's answers in a trial that its worker did not finish, if there is one."""
        for trial in self._trials():
            if "partial" in trial.user_attrs and trial.number not in self._open:
                with suppress(ValueError, LookupError, TypeError):  # Damaged answers are computed again.
                    if self._searched.candidate(self._point(trial)) == candidate:
                        return tuple(unpack(trial.user_attrs["partial"], self._rows))
        return None

    def tell(self, done: Trial, value: float) -> None:
        """Store the answers of a trial, and its value for the sampler.

        If other workers took this process for dead, they have the trial already, and this method does nothing.
        """
        from optuna.exceptions import OptunaError

        trial = self._open[done.number]
        with suppress(OptunaError, ValueError, RuntimeError):
            trial.set_user_attr("answers", pack(done.answers))
            trial.set_user_attr("seconds", done.seconds)
            self._study.tell(trial, value, skip_if_finished=True)
        self._open.pop(done.number)

    def trials(self) -> list[Trial]:
        """Return the finished trials, in the order in which they started."""
        return [self._finished(trial) for trial in self._trials("COMPLETE") if _REPEAT not in trial.user_attrs]

    def _finished(self, trial: FrozenTrial) -> Trial:
        return Trial(
            number=trial.number,
            candidate=self._searched.candidate(self._point(trial)),
            answers=tuple(unpack(trial.user_attrs.get("answers"), self._rows)),
            seconds=trial.user_attrs.get("seconds"),
        )

    def saved_answers(self, name: str = "baseline") -> list[str | None] | None:
        """Return answers that belong to no trial: those of the first adapter alone, or others by their name."""
        packed = self._study.user_attrs.get(name)
        return unpack(packed, self._rows) if packed is not None else None

    def save_answers(self, answers: Answers, name: str = "baseline") -> None:
        """Store answers that belong to no trial, unless another process has stored them."""
        if self.saved_answers(name) is None:
            self._study.set_user_attr(name, pack(answers))

    def is_busy(self) -> bool:
        """Whether a trial runs, here or elsewhere, or has not started yet."""
        self.fail_dead_trials()
        return bool(self._missing() or self._trials("RUNNING"))

    def add_known_answers(self, candidate: Candidate, answers: Answers) -> None:
        """Add the answers of a candidate that needs no trial."""
        self._known.append((candidate, tuple(answers)))

    def known(self, candidate: Candidate) -> tuple[str | None, ...] | None:
        """Return the known answers of a candidate, if there are any."""
        for other, answers in self._known:
            if other == candidate:
                return answers
        for trial in self._trials("COMPLETE"):
            if self._searched.candidate(self._point(trial)) == candidate:  # Unpacking all of them would be slow.
                return tuple(unpack(trial.user_attrs["answers"], self._rows))
        return None

    def fail_dead_trials(self) -> None:
        """Fail the trials of dead workers and queue their candidates again, each once."""
        from optuna.exceptions import OptunaError

        for trial in self._trials("RUNNING"):
            if self._lives(trial):
                continue
            try:
                self._fail(trial.number)
            except (OptunaError, ValueError, RuntimeError):  # Another worker did it, or the trial has finished.
                continue
            if trial.params:  # The candidates of a list need no queue.
                self._enqueue(trial.params)

    def _point(self, trial: FrozenTrial) -> Point:
        if self._listed is None:
            return super()._point(trial)
        number, count = trial.user_attrs["candidate"], len(self._listed)
        if type(number) is not int or not 0 <= number < count:
            raise ValueError(f"its candidate must be a number below {count}, found {number!r}")
        return {"candidate": number}

    def _lives(self, trial: FrozenTrial) -> bool:
        """Return whether a trial's worker is alive: by its process on this machine, by its heartbeat elsewhere."""
        token = worker_of(trial)[2]
        return trial.number in self._open if token == self._token else works(trial)

    def _fail(self, number: int) -> None:
        super()._fail(number)
        self._open.pop(number, None)

    def _counted(self) -> list[FrozenTrial]:
        """Return the trials that run or are done, without repeats."""
        return [trial for trial in self._trials("COMPLETE", "RUNNING") if _REPEAT not in trial.user_attrs]


def check_idle(address: StudyAddress) -> None:
    """Refuse to start a study again while other processes work on it.

    Raises:
        OutputError: a trial of it runs.
    """
    from optuna.trial import TrialState

    running = open_study(address).get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    if any(map(works, running)):
        raise OutputError(
            f"study '{address[1]}' in {without_password(address[0])} must be idle before it can start again, but a "
            "process uses it. Wait for it, or give another --study.",
            code="study.busy",
        )
