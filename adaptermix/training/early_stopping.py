"""Looking at the dev loss: when to stop, and which factors to keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch

from ..models.base import BaseModel
from ..models.eval_mode import evaluating
from ..options import TrainingSettings
from ..progress import SILENT, Look, Watcher
from .parallel import ALONE, Processes
from .trainer import BatchLoss, Trainer


class RowsLoss(Protocol):
    """Loss of rows by their numbers."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""

    @property
    def taught(self) -> Sequence[int]:
        """Numbers of the rows to learn from; the loss of others says nothing."""

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
        sums = [[0.0, 0.0], [0.0, 0.0]]  # of the loss and its terms; the second pair is for a second mean
        for part in self._processes.turns(parts):
            found = loss_of(part)
            terms: float = len(part) if found.terms is None else found.terms
            for own, (mean, number) in zip(sums, found.means or ((found.loss, terms),), strict=False):
                own[0] += float(mean) * number
                own[1] += number
            hits, rows = hits + (found.hits or 0.0), rows + (len(part) if found.hits is not None else 0)
        # the sums are the same in every process, so all stop early or none
        total, whole, other, others, hits, rows = self._processes.total(*sums[0], *sums[1], hits, rows)
        share = {f"{name.removesuffix('_loss')}_accuracy": hits / rows} if rows else {}
        return {name: total / (whole or 1) + other / (others or 1)} | share

    def __call__(self) -> dict[str, float]:
        """Measure."""
        with torch.no_grad(), evaluating(self._model), self._processes.autocast():
            found = [self._means(name, loss_of) for name, loss_of in self._sides.items()]
        return {name: value for means in found for name, value in means.items()}


def standing(history: Sequence[Mapping[str, Any]], key: str) -> tuple[float, int]:
    """Return the best value of a log so far, and how many looks have passed since."""
    values = [entry[key] for entry in history if key in entry]
    best = min(values, default=math.inf)
    return best, len(values) - 1 - values.index(best) if values else 0


class DevWatch:
    """Logs dev losses; with `patience` it ends the run and has the best factors kept.

    All that it knows stands in the log, so a resumed run goes on as if it had not been interrupted.

    Args:
        losses: Gives the losses by name.
        settings: The run's settings.
        steps: Optimizer steps of the run; the first look is after the last of them at the latest.
        rows: Training rows; a look is taken after each pass over them unless `evaluate_every` is set.
        key: Name of the loss that decides.
        turns: Objectives that take turns, so that a pass over the rows takes as many times the steps.
        measure: Name of what can be compared with other runs; default `key`. An accuracy is the better the higher.
        watch: Is told of it at every look.
    """

    def __init__(
        self,
        losses: Callable[[], dict[str, float]],
        settings: TrainingSettings,
        *,
        steps: int,
        rows: int,
        key: str,
        turns: int = 1,
        measure: str | None = None,
        watch: Watcher = SILENT,
    ) -> None:
        self._losses, self._key, self._patience = losses, key, settings.patience
        self._measure, self._watch = measure or key, watch
        a_pass = turns * max(1, round(rows / (settings.batch_size * settings.accumulate)))
        self._every = min(settings.evaluate_every or a_pass, steps)

    def __call__(self, trainer: Trainer) -> None:
        """Measure if it is time to."""
        if trainer.done % self._every:
            return
        trainer.history.append({"step": trainer.done, **self._losses()})
        self.decide(trainer)
        if trainer.kept == trainer.done:
            trainer.keep_best()
        self._tell(trainer.history[-1])

    def go_on(self, trainer: Trainer) -> None:
        """Take up a run that was interrupted: decide by its log, and tell its looks."""
        self.decide(trainer)
        for entry in trainer.history:
            self._tell(entry)

    def _tell(self, entry: Mapping[str, Any]) -> None:
        if self._measure in entry:
            higher = self._measure.endswith("accuracy")
            self._watch.look(Look(step=entry["step"], measure=self._measure, value=entry[self._measure], higher=higher))

    def decide(self, trainer: Trainer) -> None:
        """Say by the log which step is the best so far, and whether to stop."""
        if self._patience is None:
            return
        best, since = standing(trainer.history, self._key)
        trainer.kept = next((entry["step"] for entry in trainer.history if entry.get(self._key) == best), None)
        trainer.stop_early = since >= self._patience
