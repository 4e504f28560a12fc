"""The result of a search, as numbers and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..evaluation.run import Evaluation
from ..evaluation.score import Score, documents
from ..io.json_types import JsonObject
from ..io.report_view import ResultView
from ..pictures import Picture, picture_of
from .decision import Decision
from .references import DevScores
from .space import label_of
from .trials import Trial


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SearchResult(ResultView):
    """Trials of a search and the choice among them.

    Args:
        trials: In the order in which they started.
        scores: Dev score of each trial, with its interval.
        languages: Score per language of each trial.
        baseline: The first adapter alone.
        baseline_score: Its score.
        baseline_languages: Its score per language.
        verdict: The choice, and whether it is better than the first adapter alone.
        chosen: The chosen trial.
        evaluation: All scores of the chosen trial.
        metric: Name of the headline metric.
        objective: How the scores of the languages are combined.
        rule: How the trial was chosen.
        out: Folder of the merged adapter.
        resamples: The objective of the chosen trial on the dev rows, then on resamples of them.
        rank: Rank of the merged adapter, the largest of a compact one; None before it is merged.
        bytes: Size of its weights file.
        kept: For a choice by pairs, whether each trial keeps the answers to their source side, None if it was stopped
            early; trials that do not are worth 0.
        dev: For a choice by pairs, its scores on dev rows, if there are any.
    """

    trials: list[Trial]
    scores: list[Score]
    languages: list[dict[str, Score]]
    baseline: Trial
    baseline_score: Score
    baseline_languages: dict[str, Score]
    verdict: Decision
    chosen: Trial
    evaluation: Evaluation
    metric: str
    objective: str
    rule: str
    out: Path
    resamples: Sequence[float] = ()
    rank: int | None = None
    bytes: int | None = None
    kept: list[bool | None] | None = None
    dev: DevScores | None = None

    @property
    def chosen_on(self) -> str:
        """Name of the data that decided: dev, or pairs."""
        return "dev" if self.kept is None else "pairs"

    @property
    def rows_name(self) -> str:
        """Name of the rows that decided."""
        return "dev rows" if self.kept is None else "pairs"

    @property
    def measure(self) -> str:
        """Name of the scores."""
        return f"dev {self.metric}" if self.kept is None else f"{self.metric} on pairs"

    @property
    def objective_name(self) -> str:
        """Name of the score that candidates are compared by."""
        return f"{self.measure}, {self.objective}" if self.kept is None else self.measure

    @property
    def chosen_score(self) -> Score:
        """Score of the chosen trial."""
        if self.chosen is self.baseline:
            return self.baseline_score
        return next(score for trial, score in zip(self.trials, self.scores, strict=True) if trial is self.chosen)

    def plot(self) -> Picture:
        """Return scores over the weight, if one is free, and bars per language as SVG, for notebooks and `save`."""
        return picture_of(self.document())

    def document(self) -> JsonObject:
        """Return the JSON document of `adaptermix search`."""
        trials = []
        for index, trial in enumerate(self.trials):
            trials.append(
                {
                    "number": trial.number,
                    **trial.candidate.document(),
                    "rows": trial.rows,
                    **_interval(self.scores[index]),
                    "scores": documents(self.languages[index]),
                    **({"keeps_source": self.kept[index]} if self.kept is not None else {}),
                }
            )
        return {
            "best": {**self.chosen.candidate.document(), **_interval(self.chosen_score)},
            "trials": trials,
            "task_alone": {**_interval(self.baseline_score), "scores": documents(self.baseline_languages)},
            "verdict": self.verdict.document(),
            "scores": self.evaluation.document()["scores"],
            "metric": self.metric,
            "objective": self.objective,
            "rule": self.rule,
            "out": str(self.out),
            "rank": self.rank,
            "bytes": self.bytes,
            **({"dev": self.dev.document()} if self.dev else {}),
        }

    def sentence(self) -> str:
        """Return in one sentence whether the search found a gain."""
        gain, honest, control = self.verdict.difference, self.verdict.honest, self.verdict.control
        unit = "" if self.kept is None else " in agreement"
        measured = f"{gain.value:+.3f}{unit} on the {self.rows_name} that chose it"
        if honest:
            measured += f", {_signed(honest)} by cross-fit"
        measured += f"; p-value {self.verdict.chance:.3f}, corrected for the number of candidates"
        if control:
            rivals = "random adapters of the same ranks and norms instead of the others"
            if control.gains_too:
                return (
                    f"better than the task adapter alone, but not clearly better than {rivals} "
                    f"({_signed(control.difference)} over these), so it does not count as a gain: {measured}."
                )
            return f"better than the task adapter alone: {measured}; {_signed(control.difference)} over {rivals}."
        if self.verdict.is_found:
            return f"better than the task adapter alone: {measured}."
        alone = f"the task adapter alone ({self.baseline_score.value:.3f})"
        if self.chosen.candidate == self.baseline.candidate:
            return f"no weight is better than {alone}, which is taken."
        if gain.value <= 0:
            other = "as good is" if gain.value == 0 else "the best of the others is"
            return f"no weight is better than {alone}; {other} {label_of(self.chosen.candidate)}, which is written."
        return f"no weight is clearly better than {alone}, and the best is written all the same: {measured}."


def _signed(score: Score) -> str:
    return f"{score.value:+.3f} ({score.low:+.3f} to {score.high:+.3f})"


def _interval(score: Score) -> dict[str, float | int | None]:
    return {key: value for key, value in score.document().items() if key != "n"}
