"""`search`: try candidates on a live model, then merge once."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ..adapters import open_adapter
from ..adapters.paths import fitted
from ..errors import OutputError, PlanError
from ..evaluation.answering import Answering
from ..io.files import locked_output, partial_path, real_path, remove_partial
from ..io.json_types import JsonObject
from ..io.temporary import when_written
from ..models.base import BaseModel, files_of, load_base, model_kind, note_other_base, require_causal
from ..models.head_forms import Head
from ..options import SearchSettings
from ..options.paths import holds_output
from ..options.roles import NO_PART_OF_RESULT, Role, marked
from ..progress import SILENT, Watcher
from ..tasks.heads.from_adapters import head_of
from .candidate_model import TOGETHER, CandidateModel
from .control import control_of
from .outcome import result_of, write_result
from .parameters import Interval, described
from .prepare import Prepared, prepare
from .racing import COHORT, SuccessiveHalving
from .references import references_of
from .result import SearchResult
from .space import CandidateList, alone, label_of
from .storage import StudyAddress, fitting_sampler, forget, open_study
from .trial_store import TrialStore, check_idle
from .trials import Trial
from .workers import start_workers

BASELINE = -1
"""Number of the trial of the first adapter alone."""
_JOURNAL = "trials.log"
_POLL = 0.2
"""Seconds between checks of trials that run elsewhere."""


def search_dry(settings: SearchSettings) -> JsonObject:
    """Check a search and return its plan.

    Raises:
        AdapterMixError: as `search`, except for errors in the model's weights.
    """
    prepared = prepare(settings)
    if _head(prepared, settings):
        model_kind(settings.base)
    searched = prepared.searched
    listed = searched.candidates if isinstance(searched, CandidateList) else None
    return {
        "dry_run": True,
        "rows": len(prepared.rows),
        "trials": settings.trials if listed is None else len(listed),
        "parameters": {key: described(parameter) for key, parameter in searched.parameters.items()},
        "candidates": None if listed is None else [label_of(candidate) for candidate in listed],
        "notes": list(prepared.notes),
        "plan": settings.model_dump(mode="json"),
    }


@holds_output
def search(settings: SearchSettings, *, watch: Watcher = SILENT) -> SearchResult:
    """Find merge weights on dev data or on pairs, and write the adapter merged with them.

    The objective is the mean over languages of the task's headline score, or their minimum; without labels, the mean of
    the same score against the first adapter's own answers to the second side of pairs. A trial of the exact method only
    sets weights. An interrupted search continues; several processes can share one.

    Raises:
        AdapterMixError: invalid adapters, model, data file or output.
    """
    if settings.dry_run:
        raise PlanError("a dry run of a search finds no weight; call search_dry for its plan.", code="search.dry-run")
    prepared = prepare(settings, watch=watch)
    return search_with(_load(prepared, settings, watch), prepared, settings, watch=watch)


def _head(prepared: Prepared, settings: SearchSettings) -> Head | None:
    """Return the head that answers; without one the base must generate."""
    head = head_of(prepared.task, prepared.sources, prepared.dev_rows, names=settings.labels, base=settings.base)
    if head is None:
        require_causal(settings.base, f"without a head for it, task '{settings.task}'")
    return head


def _load(prepared: Prepared, settings: SearchSettings, watch: Watcher) -> BaseModel:
    base = load_base(settings.base, **settings.load_options(), head=_head(prepared, settings))
    note_other_base(base, prepared.sources, watch)
    return base


def search_with(
    base: BaseModel, prepared: Prepared, settings: SearchSettings, *, watch: Watcher = SILENT
) -> SearchResult:
    """Search with a loaded model: the adapters are attached once, and a trial only sets their weights."""
    folder = partial_path(Path(settings.out).absolute())
    # The output must have the module paths of the model that scored it.
    names = [name for name, _ in base.model.named_modules()]
    sources = tuple(fitted(source, names) for source in prepared.sources)
    prepared = replace(prepared, template=replace(prepared.template, sources=sources))
    for note in prepared.notes:
        watch.note(note)
    with locked_output(folder, Path(settings.out)):
        store = _open_as_leader(prepared, settings)
        model = _candidate_model(base, prepared, settings, watch)
        with model.attached_to_model(prepared.sources):
            runner = _TrialRunner(model, store, prepared, settings, watch)
            runner.note_earlier_trials()
            with start_workers(settings, watch):
                runner.run()
    result = result_of(prepared, settings, store.trials(), runner.baseline, runner.references)
    if settings.control and result.verdict.is_better and len(prepared.sources) > 1:
        control = control_of(
            result.chosen,
            result.baseline,
            model=model,
            scorer=runner.references.scorer,
            store=store,
            tries=settings.control,
            seed=settings.seed,
        )
        result = replace(result, verdict=replace(result.verdict, control=control))
    out = Path(settings.out).absolute()
    with when_written(real_path(out), lambda: remove_partial(out, f"{_JOURNAL}*")):
        return write_result(result, prepared, settings)


def run_worker(settings: SearchSettings, *, number: int) -> None:
    """Run trials of a search that another process leads, as its worker `number`, from 1."""
    prepared = prepare(settings, writes=False)
    store = _open_store(prepared, settings, number)
    model = _candidate_model(_load(prepared, settings, SILENT), prepared, settings, SILENT)
    with model.attached_to_model(prepared.sources):
        _TrialRunner(model, store, prepared, settings, SILENT).run()


def _candidate_model(base: BaseModel, prepared: Prepared, settings: SearchSettings, watch: Watcher) -> CandidateModel:
    answering = Answering(base, prepared.task, prepared.rows, settings, template=prepared.prompt, watch=watch)
    return CandidateModel(base, answering, prepared.template, dict(settings.options))


class _TrialRunner:
    """Runs the trials of a search on a model with the adapters attached; before them, the first adapter alone."""

    def __init__(
        self, model: CandidateModel, store: TrialStore, prepared: Prepared, settings: SearchSettings, watch: Watcher
    ) -> None:
        self._model, self._store, self._settings, self._watch = model, store, settings, watch
        self._searched = prepared.searched
        self._languages = [prepared.task.language(row) for row in prepared.rows]
        self._best: tuple[float, Trial] | None = None
        answers = store.saved_answers() or model.alone("task adapter alone")
        store.save_answers(answers)
        if prepared.pairs is not None:  # All processes that share the trials must use the same labels.
            answers = store.saved_answers() or answers
        self.baseline = Trial(number=BASELINE, candidate=alone(len(prepared.sources)), answers=tuple(answers))
        self.references = references_of(prepared, settings, answers)
        if model.is_sum:  # A candidate that is the first adapter alone needs no trial.
            store.add_known_answers(self.baseline.candidate, answers)

    def note_earlier_trials(self) -> None:
        """Report the trials of an interrupted search, and remember the best of them."""
        earlier = self._store.trials()
        if earlier:
            self._watch.note(f"resuming after {len(earlier)} finished trials")
        for trial in earlier:
            self._remember_best(trial, self._value(trial))

    def _value(self, trial: Trial) -> float:
        return self.references.scorer.exact(self.references.scorer.counts(trial))

    def _answer(self, requests: Sequence[tuple[Trial, Sequence[int]]]) -> Iterable[list[str]]:
        numbers = [trial.number + 1 for trial, _ in requests]
        label = f"trials {min(numbers)} to {max(numbers)}" if requests else ""
        if len(requests) == 1:
            label = f"trial {numbers[0]}: {label_of(requests[0][0].candidate)}"
        return self._model([(trial.candidate, rows) for trial, rows in requests], label)

    def run(self) -> None:
        """Run trials, one after another or as races, until those of this and all other processes are finished."""
        race = None
        if self._settings.race:
            size = len(self._searched.candidates) if isinstance(self._searched, CandidateList) else COHORT
            race = SuccessiveHalving(
                self.references.scorer,
                self._languages,
                self._answer,
                baseline=self.baseline,
                on_result=self._on_result,
                size=-(-size // self._settings.workers),
            )
        with self._store.heartbeat():
            while True:
                if race:
                    race.run(self._store)
                else:
                    self._run_in_turn()
                if not self._store.is_busy():
                    return
                time.sleep(_POLL)

    def _run_in_turn(self) -> None:
        rows = range(len(self._languages))
        while trials := self._start():
            candidates = [trial.candidate for trial in trials]
            first = [candidates.index(candidate) for candidate in candidates]
            answers = [self._store.known(candidate) for candidate in candidates]
            new = [index for index, known in enumerate(answers) if not known and first[index] == index]
            start = time.perf_counter()
            computed = self._answer([(trials[index], rows) for index in new]) if new else ()
            for index, texts in zip(new, computed, strict=True):
                answers[index] = tuple(texts)
            seconds = (time.perf_counter() - start) / max(1, len(new))
            for index, trial in enumerate(trials):
                done = replace(trial, answers=answers[first[index]] or (), seconds=seconds if index in new else 0.0)
                value = self._value(done)
                is_repeat = self._store.is_repeat(done.number)
                self._store.tell(done, value)
                if not is_repeat:
                    self._on_result(done, value)

    def _start(self) -> list[Trial]:
        """Start the next trials. Batch them if they can share forward passes, but leave some for other workers."""
        most = -(-TOGETHER // len(self._languages)) if self._model.takes_several else 1
        most = min(most, -(-self._store.left() // self._settings.workers), self._store.together())
        trials: list[Trial] = []
        while len(trials) < most and (trial := self._store.ask()):
            trials.append(trial)
        return trials

    def _remember_best(self, trial: Trial, value: float) -> None:
        def rank(scored: tuple[float, Trial]) -> tuple[float, float]:
            return scored[0], -scored[1].candidate.distance  # As in the choice at the end.

        if trial.is_whole and (self._best is None or rank((value, trial)) > rank(self._best)):
            self._best = value, trial

    def _on_result(self, trial: Trial, value: float) -> None:
        """Report a finished trial, and the best one of this process."""
        self._remember_best(trial, value)
        stopped = "" if trial.is_whole else f", stopped after {trial.rows} rows"
        best = f"; best so far {self._best[0]:.3f} at {label_of(self._best[1].candidate)}" if self._best else ""
        self._watch.note(f"trial {trial.number + 1}: {label_of(trial.candidate)}  {value:.3f}{stopped}{best}")


def _address(settings: SearchSettings) -> StudyAddress:
    """Return the storage of the trials, and the name of the study there."""
    out = Path(settings.out).absolute()
    return settings.storage or partial_path(out) / _JOURNAL, settings.study or out.name


def _open_as_leader(prepared: Prepared, settings: SearchSettings) -> TrialStore:
    """Open the store of the process that leads.

    A journal next to the output is of an interrupted search, which continues if it is the same search. A journal of
    another search is removed with --overwrite, and always if it has no trial yet: a search that was refused, for
    example for its pairs, must not block the corrected one.
    """
    address = _address(settings)
    if settings.overwrite and settings.storage:
        check_idle(address)
        forget(address)
    try:
        return _open_store(prepared, settings)
    except OutputError:
        if settings.storage or not (settings.overwrite or not open_study(address).get_trials(deepcopy=False)):
            raise
        Path(address[0]).unlink(missing_ok=True)
        return _open_store(prepared, settings)


def _open_store(prepared: Prepared, settings: SearchSettings, worker: int = 0) -> TrialStore:
    searched = prepared.searched
    fitting = "random" if isinstance(searched, CandidateList) else fitting_sampler(searched.parameters.values())
    can_change = marked(settings, *NO_PART_OF_RESULT, Role.AFTERWARDS)
    identity = settings.model_dump(mode="json", exclude={"out", *can_change}) | {
        "inputs": [source.digest for source in prepared.sources],
        "dev_files": [file.entry() for file in prepared.files],
        "base_files": files_of(settings.base),
    }
    if settings.candidates:
        identity["merges"] = [open_adapter(Path(folder)).digest for folder in settings.candidates]
    store = TrialStore(
        _address(settings),
        searched=searched,
        settings=identity,
        sampler=fitting if settings.sampler == "auto" else settings.sampler,
        seed=settings.seed,
        # The leaders of several machines that share a storage are workers too.
        worker=f"{worker} {socket.gethostname()} {os.getpid()}" if settings.storage else str(worker),
        limit=len(searched.candidates) if isinstance(searched, CandidateList) else settings.trials or 0,
        rows=len(prepared.rows),
    )
    if not worker and not isinstance(searched, CandidateList):
        options = {k: p.middle if isinstance(p, Interval) else p.values[0] for k, p in searched.options.items()}
        points = [searched.point(weights, options) for weights in searched.starts()]
        store.enqueue([point for point in points if point is not None])
    return store
