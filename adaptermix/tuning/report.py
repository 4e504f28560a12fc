"""The result of a search over a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..errors import PlanError
from ..evaluation.score import NORMAL, Score
from ..evaluation.significance import null_error
from ..io.json_types import JsonObject
from ..io.report_view import ResultView
from ..weight_search.decision import Decision
from ..weight_search.significance import chance_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """The point where a candidate was stopped because its training was behind.

    Args:
        command: The step of the recipe.
        step: Optimizer step of its last look at dev data.
        measure: Name of the values.
        value: Its best value.
        median: The median of the others at the same step.
    """

    command: str
    step: int
    measure: str
    value: float
    median: float

    def document(self) -> JsonObject:
        """Return plain data."""
        return asdict(self)

    def sentence(self) -> str:
        """Return one sentence for people."""
        return (
            f"{self.command} stopped at step {self.step}: {self.measure} {self.value:.3f}, median of earlier ones "
            f"{self.median:.3f}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeTrial:
    """A candidate's settings and its score.

    Args:
        settings: Overrides of the recipe.
        folder: Folder of the steps' outputs.
        value: Score of the last step; None if the candidate was stopped.
        low: Lower end of its 95 % interval.
        high: Upper end.
        ran: Number of steps that ran; the others existed already.
        pruned: Where it was stopped, if it was.
        resamples: Its score on the dev rows, then on resamples of them, the same for all trials; empty if they are
            not known.
        rows: Dev rows, or clusters of them, of the language that has fewest.
    """

    settings: Mapping[str, object]
    folder: Path
    value: float | None
    low: float | None
    high: float | None
    ran: int
    pruned: Pruned | None = None
    resamples: Sequence[float] = ()
    rows: int = 0

    def document(self) -> JsonObject:
        """Return plain data."""
        return {
            "settings": dict(self.settings),
            "folder": str(self.folder),
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "ran": self.ran,
            "pruned": self.pruned.document() if self.pruned else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeDecision(Decision):
    """The best trial compared with the first one; `tried` counts all candidates, stopped ones too."""

    tried: int

    def document(self) -> JsonObject:
        """Return plain data."""
        counted = {"found": self.is_found, "chance": self.chance, "tried": self.tried}
        return counted | {"difference": self.difference.document()}

    def sentence(self) -> str:
        """Return one sentence for people."""
        gain, chance = self.difference, f"p-value {self.chance:.3f}, corrected for {self.tried} candidates"
        if gain.value <= 0:
            return "no candidate is better than the first."
        measured = f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}) on the dev rows that chose it; {chance}"
        return f"the best is {'' if self.is_found else 'not clearly '}better than the first candidate: {measured}."


def _decide(trials: Sequence[RecipeTrial], best: RecipeTrial) -> RecipeDecision | None:
    """Compare the best trial with the first one that ran to the end; None if their rows are not known."""
    whole = [trial for trial in trials if trial.value is not None]
    if len(whole) < 2 or not all(len(trial.resamples) == len(best.resamples) > 1 for trial in whole):
        return None
    values = np.array([trial.resamples for trial in whole])
    gains = values - values[0]
    chosen = next(index for index, trial in enumerate(whole) if trial is best)
    chance = chance_of(gains[1:], chosen - 1, rows=min(trial.rows for trial in whole)) if chosen else 1.0
    # Stopped candidates were tried too, but have no resamples: a Bonferroni factor for their share.
    chance = min(1.0, chance * (len(trials) - 1) / (len(whole) - 1))
    value, width = float(gains[chosen, 0]), NORMAL * null_error(gains[chosen], best.rows)
    difference = Score(value=value, low=value - width, high=value + width, n=best.rows)
    return RecipeDecision(chosen=chosen, difference=difference, chance=chance, tried=len(trials))


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Tuning(ResultView):
    """All trials.

    Args:
        candidates: In the order in which they ran.
        best: The one of the highest value, the first among equals.
        out: The folder of all.
        verdict: Whether the best is better than the first beyond chance; None if their rows are not known.
    """

    candidates: Sequence[RecipeTrial]
    best: RecipeTrial
    out: Path
    verdict: RecipeDecision | None = None

    @classmethod
    def of(cls, trials: Sequence[RecipeTrial], out: Path) -> Tuning:
        """Find the best of the trials that were not stopped.

        Raises:
            PlanError: all were stopped.
        """
        whole = [(trial.value, -number) for number, trial in enumerate(trials) if trial.value is not None]
        if not whole:
            raise PlanError(
                f"a search needs a candidate that is run whole, and every candidate was stopped, behind others that "
                f"{out} holds. Drop --prune, or give another --out.",
                code="tune.all-stopped",
            )
        best = trials[-max(whole)[1]]
        return cls(candidates=trials, best=best, out=out, verdict=_decide(trials, best))

    def document(self) -> JsonObject:
        """Return the JSON document."""
        return {
            "best": self.best.document(),
            "trials": [trial.document() for trial in self.candidates],
            "verdict": self.verdict.document() if self.verdict else None,
            "out": str(self.out),
        }


def label_of(settings: Mapping[str, object]) -> str:
    """Return a candidate's settings for messages."""
    numbers = {key: f"{value:.4g}" for key, value in settings.items() if isinstance(value, float)}
    return ", ".join(f"{key} {numbers.get(key, value)}" for key, value in settings.items())
