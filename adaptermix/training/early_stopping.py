"""Evaluation on dev data in training: when to evaluate, when to stop, and which factors to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch

from ..models.base import BaseModel
from ..models.eval_mode import evaluating
from ..options import TrainingSettings
from ..progress import SILENT, Look, Watcher
from .parallel import ALONE, Processes
from .report import LogEntry
from .trainer import BatchLoss

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState


class RowsLoss(Protocol):
    """Loss of rows by their numbers."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""

    @property
    def taught(self) -> Sequence[int]:
        """Numbers of the rows to learn from; the loss of others is meaningless."""

    def __call__(self, rows: Sequence[int]) -> BatchLoss:
        """Return the loss of these rows."""

    def terms(self, rows: Sequence[int]) -> int:
        """Return how many terms the loss of these rows is a mean over."""


class DevLosses:
    """Mean losses over dev rows, without dropout, and the share of hits where there are any; processes share batches.

    Args:
        base: The base model with its LoRA in.
        sides: Losses by the name under which they are logged.
        settings: The run's settings.
        processes: Those that share the run.
    """

    def __init__(
        self,
        base: BaseModel,
        sides: Mapping[str, RowsLoss],
        settings: TrainingSettings,
        processes: Processes = ALONE,
    ) -> None:
        self._model, self._sides, self._size, self._processes = base.model, sides, settings.batch_size, processes

    def _means(self, name: str, loss_of: RowsLoss) -> dict[str, float]:
        taught = loss_of.taught
        count = len(taught)
        starts = list(range(0, count, self._size))
        if len(starts) > 1 and count % self._size == 1:
            starts.pop()  # a pair alone has no negatives, and a loss of 0
        parts = [taught[start:stop] for start, stop in pairwise([*starts, count])]
        hits, rows = 0.0, 0.0
        sums = [[0.0, 0.0], [0.0, 0.0]]  # sum of the loss and count of its terms; the second pair is for a second mean
        for part in self._processes.turns(parts):
            batch = loss_of(part)
            terms: float = len(part) if batch.terms is None else batch.terms
            for total, (mean, number) in zip(sums, batch.means or ((batch.loss, terms),), strict=False):
                total[0] += float(mean) * number
                total[1] += number
            hits, rows = hits + (batch.hits or 0.0), rows + (len(part) if batch.hits is not None else 0)
        # the sums are the same in every process, so all stop early or none
        loss, terms, other, others, hits, rows = self._processes.total(*sums[0], *sums[1], hits, rows)
        share = {f"{name.removesuffix('_loss')}_accuracy": hits / rows} if rows else {}
        return {name: loss / (terms or 1) + other / (others or 1)} | share

    def __call__(self) -> dict[str, float]:
        """Measure."""
        with torch.no_grad(), evaluating(self._model), self._processes.autocast():
            sides = [self._means(name, loss_of) for name, loss_of in self._sides.items()]
        return {name: value for means in sides for name, value in means.items()}


def standing(history: Sequence[LogEntry], key: str) -> tuple[float, int]:
    """Return the best value of a log so far, and the number of evaluations since."""
    values = [entry[key] for entry in history if key in entry]
    best = min(values, default=math.inf)
    return best, len(values) - 1 - values.index(best) if values else 0


class EarlyStopping:
    """Callback that asks for evaluations; with `patience` it chooses the best step and stops.

    All it knows is in the log, so a resumed run continues as if it had not been interrupted.

    Args:
        settings: The run's settings.
        steps: Optimizer steps of the run; the first evaluation is after the last of them at the latest.
        rows: Training rows; each epoch ends with an evaluation unless `evaluate_every` is set.
        key: Name of the loss that decides.
        turns: How many objectives take turns; an epoch takes as many times the steps.
        measure: Dev value by which runs can be compared; default `key`. A higher accuracy is better.
        watch: Receives the measure of every evaluation; an exception that it raises ends the training.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        *,
        steps: int,
        rows: int,
        key: str,
        turns: int = 1,
        measure: str | None = None,
        watch: Watcher = SILENT,
    ) -> None:
        self._key, self._patience, self._measure, self._watch = key, settings.patience, measure or key, watch
        a_pass = turns * max(1, round(rows / (settings.batch_size * settings.accumulate)))
        self._every = min(settings.evaluate_every or a_pass, steps)

    def on_train_begin(self, _args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Continue an interrupted run: decide by its log, and report its evaluations."""
        self._decide(state, control)
        for entry in state.log_history:
            self._report(entry)

    def on_step_end(self, _args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Ask for an evaluation if it is time to."""
        control.should_evaluate |= state.global_step % self._every == 0

    def on_evaluate(self, _args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Choose the best step so far, and decide whether to stop."""
        self._decide(state, control)
        self._report(state.log_history[-1])

    def _report(self, entry: LogEntry) -> None:
        if self._measure in entry:
            higher = self._measure.endswith("accuracy")
            self._watch.look(Look(step=entry["step"], measure=self._measure, value=entry[self._measure], higher=higher))

    def _decide(self, state: TrainerState, control: TrainerControl) -> None:
        if self._patience is None:
            return
        best, since = standing(state.log_history, self._key)
        state.best_global_step = next((e["step"] for e in state.log_history if e.get(self._key) == best), None)
        state.best_metric = None if state.best_global_step is None else best
        control.should_training_stop |= since >= self._patience
