"""`search`: try candidates on a live model, merge once at the end."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapters import open_adapter
from ..adapters.paths import fitted
from ..errors import OutputError, PlanError
from ..evaluation.answering import Answering
from ..io.files import held, partial_path, remove_partial
from ..models.base import BaseModel, files_of, load_base, model_kind, note_other_base, require_causal
from ..models.head_forms import Head
from ..options import SearchSettings
from ..options.paths import holds_output
from ..progress import SILENT, Watcher
from ..tasks.heads.from_adapters import head_of
from .candidate_model import TOGETHER, Judge
from .control import control_of
from .label import shown
from .outcome import CIRCUMSTANCES, result_of, write_result
from .parameters import described
from .prepare import Prepared, prepare
from .racing import COHORT, Race
from .references import Marking, marking_of
from .result import SearchResult
from .significance import Board
from .space import Interval, Space, alone
from .storage import fitting_sampler, forget, has_no_trial
from .trial_store import Ledger, Listed, check_idle
from .trials import Trial
from .workers import helped

BASELINE = -1
"""Number of the trial of the first adapter alone."""
_JOURNAL = "trials.log"
_MORE = {"trials", "choose", "compact", "control"}
"""Settings that a search can go on with changed."""
_POLL = 0.2
"""Seconds between looks at trials that run elsewhere."""


def search_dry(settings: SearchSettings) -> dict[str, Any]:
    """Check a search and return its plan.

    Raises:
        AdapterMixError: as `search`, but for the model's weights.
    """
    prepared = prepare(settings)
    if _head(prepared, settings):
        model_kind(settings.base)
    tried = len(prepared.searched.candidates) if isinstance(prepared.searched, Listed) else settings.trials
    return {
        "dry_run": True,
        "rows": len(prepared.rows),
        "trials": tried,
        "parameters": {key: described(found) for key, found in prepared.searched.parameters.items()},
        "candidates": _listed(prepared.searched),
        "notes": list(prepared.notes),
        "plan": settings.model_dump(mode="json"),
    }


def _listed(searched: Space | Listed) -> list[str] | None:
    return [shown(candidate) for candidate in searched.candidates] if isinstance(searched, Listed) else None


@holds_output
def search(settings: SearchSettings, *, watch: Watcher = SILENT) -> SearchResult:
    """Find merge weights on dev data or on pairs, and write the adapter merged with them.

    The objective is the mean over languages of the task's headline score, or their minimum; or without labels, the mean
    of the same score against what the first adapter alone says of the second side of pairs. Nothing is written or
    merged per trial of an exact sum. An interrupted search goes on where it was; several processes can share one.

    Raises:
        AdapterMixError: the adapters, the model, a data file or the output does not do.
    """
    if settings.dry_run:
        raise PlanError("a dry run of a search finds no weight; call search_dry for its plan.")
    prepared = prepare(settings, watch=watch)
    return search_with(_loaded(prepared, settings, watch), prepared, settings, watch=watch)


def _head(prepared: Prepared, settings: SearchSettings) -> Head | None:
    """Return the head that answers; without one the base must generate."""
    head = head_of(prepared.task, prepared.sources, prepared.dev_rows)
    if head is None:
        require_causal(settings.base, f"without a head for it, task '{settings.task}'")
    return head


def _loaded(prepared: Prepared, settings: SearchSettings, watch: Watcher) -> BaseModel:
    base = load_base(settings.base, **settings.place(), head=_head(prepared, settings))
    note_other_base(base, prepared.sources, watch)
    return base


def search_with(
    base: BaseModel, prepared: Prepared, settings: SearchSettings, *, watch: Watcher = SILENT
) -> SearchResult:
    """Search with a loaded model: the adapters are attached once, and a trial only sets their weights."""
    folder = partial_path(Path(settings.out).absolute())
    # What is written has the paths of the model that scored it.
    names = [name for name, _ in base.model.named_modules()]
    sources = tuple(fitted(source, names) for source in prepared.sources)
    prepared = replace(prepared, template=replace(prepared.template, sources=sources))
    for note in prepared.notes:
        watch.note(note)
    with held(folder, Path(settings.out)):
        ledger = _opened(prepared, settings)
        with _Work(base, prepared, settings, watch) as work:
            work.measure_alone(ledger)
            work.look_back(ledger)
            with helped(settings, watch):
                work.run(ledger)
    result = result_of(prepared, settings, ledger.trials(), work.baseline, work.marking)
    result = work.against_random(result, ledger)
    result = write_result(result, prepared, settings)
    remove_partial(Path(settings.out).absolute(), f"{_JOURNAL}*")
    return result


def help_with(settings: SearchSettings, *, number: int) -> None:
    """Run trials of a search that another process has begun and will end.

    Args:
        settings: Its settings.
        number: Which of its workers this is, from 1.
    """
    prepared = prepare(settings, writes=False)
    ledger = _ledger(prepared, settings, number)
    with _Work(_loaded(prepared, settings, SILENT), prepared, settings, SILENT) as work:
        work.measure_alone(ledger)
        work.run(ledger)


class _Work:
    """The trials of a search on a loaded model; the adapters are attached inside its context."""

    def __init__(self, base: BaseModel, prepared: Prepared, settings: SearchSettings, watch: Watcher) -> None:
        task, rows = prepared.task, prepared.rows
        self._languages = [task.language(row) for row in rows]
        self._prepared, self._settings, self._watch = prepared, settings, watch
        self._best: tuple[float, Trial] | None = None
        answering = Answering(base, task, rows, settings, template=prepared.prompt, watch=watch)
        self._judge = Judge(base, answering, prepared.template, dict(settings.options))
        self._stack = ExitStack()
        self.baseline = Trial(number=BASELINE, candidate=alone(len(prepared.sources)), answers=())
        self._marking: Marking | None = None

    @property
    def marking(self) -> Marking:
        """Return what trials are scored against, which is known once the first adapter alone was asked."""
        if self._marking is None:
            raise RuntimeError("the first adapter alone is measured before trials are scored")
        return self._marking

    @property
    def board(self) -> Board:
        """Return what scores the trials."""
        return self.marking.board

    def __enter__(self) -> _Work:
        self._stack.enter_context(self._judge.at_work(self._prepared.sources))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def measure_alone(self, ledger: Ledger) -> None:
        """Have the first adapter alone answer, unless another process has asked it."""
        answers = ledger.baseline() or self._judge.alone("task adapter alone")
        ledger.keep_baseline(answers)
        if self._prepared.pairs is not None:  # labels must be the same for all processes that share the trials
            answers = ledger.baseline() or answers
        self.baseline = replace(self.baseline, answers=tuple(answers))
        self._marking = marking_of(self._prepared, self._settings, answers)
        if self._judge.is_sum:  # a candidate that is the task adapter alone is not asked again
            ledger.keep_known(self.baseline.candidate, answers)

    def against_random(self, result: SearchResult, ledger: Ledger) -> SearchResult:
        """Return the result with random adapters in the place of the others, where a gain was found; see `control_of`.

        The context has ended, so that the adapters are off the model.
        """
        settings = self._settings
        if not (settings.control and result.verdict.is_better and len(self._prepared.sources) > 1):
            return result
        control = control_of(
            result.chosen,
            result.baseline,
            judge=self._judge,
            board=self.board,
            ledger=ledger,
            tries=settings.control,
            seed=settings.seed,
        )
        return replace(result, verdict=replace(result.verdict, control=control))

    def look_back(self, ledger: Ledger) -> None:
        """Say what trials there are already, and know the best of them."""
        earlier = ledger.trials()
        if earlier:
            self._watch.note(f"going on: {len(earlier)} trials are there")
        for trial in earlier:
            self._keep_best(trial, self.board.exact(self.board.counts(trial)))

    def _answer(self, asked: Sequence[tuple[Trial, Sequence[int]]]) -> Iterable[list[str]]:
        numbers = [trial.number + 1 for trial, _ in asked]
        label = f"trials {min(numbers)} to {max(numbers)}" if asked else ""
        if len(asked) == 1:
            label = f"trial {numbers[0]}: {shown(asked[0][0].candidate)}"
        return self._judge([(trial.candidate, places) for trial, places in asked], label)

    def run(self, ledger: Ledger) -> None:
        """Run trials, in turn or as races, until none is left or under way elsewhere."""
        race = None
        if self._settings.race:
            searched = self._prepared.searched
            size = len(searched.candidates) if isinstance(searched, Listed) else COHORT
            race = Race(
                self.board,
                self._languages,
                self._answer,
                baseline=self.baseline,
                told=self._told,
                size=-(-size // self._settings.workers),
            )
        with ledger.beating():
            while True:
                if race:
                    race.run(ledger)
                else:
                    self._run_in_turn(ledger)
                if not ledger.is_busy():
                    return
                time.sleep(_POLL)

    def _run_in_turn(self, ledger: Ledger) -> None:
        places = range(len(self._languages))
        while trials := self._begun(ledger):
            candidates = [trial.candidate for trial in trials]
            answers = [ledger.known(candidate) for candidate in candidates]
            first = [candidates.index(candidate) for candidate in candidates]
            new = [place for place, known in enumerate(answers) if not known and first[place] == place]
            start = time.perf_counter()
            found = self._answer([(trials[place], places) for place in new]) if new else ()
            for place, told in zip(new, found, strict=True):
                answers[place] = tuple(told)
            seconds = (time.perf_counter() - start) / max(1, len(new))
            for place, begun in enumerate(trials):
                own = answers[first[place]] or ()
                trial = replace(begun, answers=own, seconds=seconds if place in new else 0.0)
                value = self.board.exact(self.board.counts(trial))
                is_repeat = ledger.is_repeat(trial.number)
                ledger.tell(trial, value)
                if not is_repeat:
                    self._told(trial, value)

    def _begun(self, ledger: Ledger) -> list[Trial]:
        """Begin trials, several where they can share forward passes, so few that every worker has some."""
        most = -(-TOGETHER // len(self._languages)) if self._judge.takes_several else 1
        most = min(most, -(-ledger.left() // self._settings.workers), ledger.together())
        asked = itertools.takewhile(bool, (ledger.ask() for _ in range(most)))
        return [Trial(number=found[0], candidate=found[1], answers=()) for found in asked if found]

    def _keep_best(self, trial: Trial, value: float) -> None:
        def rank(found: tuple[float, Trial]) -> tuple[float, float]:
            return found[0], -found[1].candidate.distance  # as the choice at the end

        if trial.is_whole and (self._best is None or rank((value, trial)) > rank(self._best)):
            self._best = value, trial

    def _told(self, trial: Trial, value: float) -> None:
        """Show how a trial went, and the best so far of this process."""
        self._keep_best(trial, value)
        stopped = "" if trial.is_whole else f", stopped after {trial.rows} rows"
        best = f"; best so far {self._best[0]:.3f} at {shown(self._best[1].candidate)}" if self._best else ""
        self._watch.note(f"trial {trial.number + 1}: {shown(trial.candidate)}  {value:.3f}{stopped}{best}")


def _place(settings: SearchSettings) -> tuple[str | Path, str]:
    """Return where trials are kept, and the name of the study there."""
    out = Path(settings.out).absolute()
    return settings.storage or partial_path(out) / _JOURNAL, settings.study or out.name


def _opened(prepared: Prepared, settings: SearchSettings) -> Ledger:
    """Open the ledger of the process that leads.

    What lies beside the output is of a search that was interrupted, and the same search goes on from it. That of
    another search is removed with --overwrite, and always if it has no trial yet: a search that was refused, say for
    its pairs, must not stand in the way of the corrected one.
    """
    if settings.overwrite and settings.storage:
        check_idle(*_place(settings))
        forget(*_place(settings))
    try:
        return _ledger(prepared, settings)
    except OutputError:
        if settings.storage or not (settings.overwrite or has_no_trial(*_place(settings))):
            raise
        Path(_place(settings)[0]).unlink(missing_ok=True)
        return _ledger(prepared, settings)


def _ledger(prepared: Prepared, settings: SearchSettings, worker: int = 0) -> Ledger:
    searched = prepared.searched
    listed = isinstance(searched, Listed)
    fitting = "random" if listed else fitting_sampler(searched.parameters.values())
    sampler = fitting if settings.sampler == "auto" else settings.sampler
    asked = settings.model_dump(mode="json", exclude=CIRCUMSTANCES | _MORE)
    files = [file.entry() for file in prepared.files]
    place, name = _place(settings)
    ledger = Ledger(
        place,
        name=name,
        searched=searched,
        settings=asked
        | {"inputs": [source.digest for source in prepared.sources], "dev_files": files}
        | {"base_files": files_of(settings.base)}
        | (
            {"merges": [open_adapter(Path(folder)).digest for folder in settings.candidates]}
            if settings.candidates
            else {}
        ),
        sampler=sampler,
        seed=settings.seed,
        # with a storage the leaders of several machines are workers too
        worker=f"{worker} {socket.gethostname()} {os.getpid()}" if settings.storage else str(worker),
        limit=len(searched.candidates) if isinstance(searched, Listed) else settings.trials or 0,
        rows=len(prepared.rows),
    )
    if not worker and not isinstance(searched, Listed):
        options = searched.options.items()
        middle = {name: p.middle if isinstance(p, Interval) else p.values[0] for name, p in options}
        starts = [searched.point(weights, middle) for weights in searched.starts()]
        ledger.enqueue([point for point in starts if point is not None])
    return ledger
