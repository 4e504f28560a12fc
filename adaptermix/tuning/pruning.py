"""Stop training that is behind earlier training on dev data: the median rule, by optuna's `MedianPruner`.

A look is a result on dev data during training. Training stops at a look if its best value so far is worse than the
median of the best values that earlier training had at the same step. The first look never stops training, and neither
does a look with fewer than four earlier values at its step. Stopped training counts up to its last look. Looks are
compared only if they have the same measure (the share of dev pairs that are retrieved in a batch, which does not depend
on the temperature, or the loss of a task's dev rows) and equal settings of `Role.DEV_CURVE` (layer, batch size, length
of training, ...).

Reference: Golovin et al., Google Vizier, KDD 2017, section 3.2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate
from math import isnan
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from ..commands.recipe_file import Step
from ..errors import ConfigError
from ..options import TrainingSettings
from ..options.roles import DEV, Role, marked, used_for
from ..progress import Advance, Look, Watcher
from ..weight_search.storage import median_trial, quiet
from .plan import RecipeCandidate
from .report import Pruned

if TYPE_CHECKING:
    from optuna.trial import Trial

EARLIER = 4
"""Fewest other values at a step for training to be stopped there."""

Report = Callable[[int, float], None]
"""Callback `(step, value)` with a candidate's intermediate score; higher is better."""


def ignore(step: int, value: float) -> None:
    """Ignore an intermediate score."""


class Stopped(Exception):  # noqa: N818  (It is not an error.)
    """Raised to stop training that is worse than earlier training."""

    def __init__(self, pruned: Pruned) -> None:
        super().__init__(pruned.sentence())
        self.pruned = pruned


@dataclass(slots=True)
class Curve:
    """Step and value of each look of one training, and the measure.

    Training is compared only with training of equal `like` and `measure`.
    """

    like: str
    measure: str = ""
    higher: bool = False
    looks: list[tuple[int, float]] = field(default_factory=list)

    def add(self, look: Look) -> None:
        """Add a look."""
        self.measure, self.higher = look.measure, look.higher
        self.looks.append((look.step, look.value))

    def bests(self) -> dict[int, float]:
        """Return the best value so far by the step of each look; a look of NaN is left out."""
        looks = [(step, value) for step, value in self.looks if not isnan(value)]
        values = accumulate((value for _, value in looks), max if self.higher else min)
        return dict(zip((step for step, _ in looks), values, strict=True))

    def report(self, report: Report) -> None:
        """Report all looks."""
        for step, value in self.looks:
            report(step, value if self.higher else -value)


class PruningWatcher:
    """A watcher that stops training by the median rule.

    Args:
        watch: Receives all calls too.
        command: The training command.
        curve: Receives the looks.
        others: Looks of earlier training; empty if training must not be stopped.
        report: Receives the value of each look.
    """

    def __init__(self, watch: Watcher, command: str, curve: Curve, others: Sequence[Curve], report: Report) -> None:
        self._watch, self._command, self._curve, self._report = watch, command, curve, report
        self._others = others
        self._bests: list[dict[int, float]] = []
        self._trial: Trial | None = None

    def track(self, label: str, total: int) -> AbstractContextManager[Advance]:
        """Open a bar."""
        return self._watch.track(label, total)

    def note(self, message: str) -> None:
        """Show a line."""
        self._watch.note(message)

    def look(self, look: Look) -> None:
        """Add a look.

        Raises:
            Stopped: the training is worse than the median of earlier training.
        """
        self._curve.add(look)
        self._report(look.step, look.value if look.higher else -look.value)
        self._watch.look(look)
        if self._trial is None:
            like = (self._curve.like, self._curve.measure)
            self._bests = [curve.bests() for curve in self._others if (curve.like, curve.measure) == like]
            self._trial = median_trial(self._bests, fewest=EARLIER, after=look.step, maximize=look.higher)
        if isnan(look.value):  # optuna would always stop the training
            return
        with quiet():
            self._trial.report(look.value, look.step)
            if not self._trial.should_prune():
                return
        value = self._curve.bests()[look.step]
        others = [bests[look.step] for bests in self._bests if look.step in bests]
        pruned = Pruned(command=self._command, step=look.step, measure=look.measure, value=value, median=median(others))
        raise Stopped(pruned)


def looks_at_dev(step: Step) -> bool:
    """Return whether a step is training that looks at dev data."""
    return isinstance(step.settings, TrainingSettings) and DEV in used_for(step.settings)


def check_looks(recipe: Path, candidates: Iterable[RecipeCandidate]) -> str | None:
    """Check that some training can be stopped; return a note if not all training is comparable.

    Raises:
        ConfigError: no training looks at dev data.
    """
    values: dict[str, set[str]] = {}
    for candidate in candidates:
        for step in filter(looks_at_dev, candidate.steps):
            same = marked(step.settings, Role.DEV_CURVE)
            for name, value in step.settings.model_dump(mode="json", include=same).items():
                text = json.dumps(value).replace(json.dumps(str(candidate.folder))[1:-1], "")
                values.setdefault(f"{step.command}.{name}", set()).add(text)
    if not values:
        raise ConfigError(
            f"{recipe}: --prune needs a training step with dev data, and there is no such step. Give train-align "
            "dev_pairs or train-task dev, or drop --prune.",
            code="tune.prune-no-dev",
        )
    apart = sorted(name for name, texts in values.items() if len(texts) > 1)
    if not apart:
        return None
    return f"--prune compares only training with equal {', '.join(apart)}: other dev results are not comparable."
