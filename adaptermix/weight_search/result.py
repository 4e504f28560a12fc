"""What a search found, as numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.run import Evaluation
from ..evaluation.score import Score
from .label import shown
from .references import DevScores
from .significance import Verdict
from .trials import Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """Trials of a search.

    Args:
        trials: In the order in which they began.
        scores: What each is worth on dev, with its interval.
        languages: Score per language of each.
        baseline: The first adapter alone.
        baseline_score: What it is worth.
        baseline_languages: Its score per language.
        verdict: Which trial was taken, and whether it is better than the first adapter alone.
        chosen: The trial that was taken.
        evaluation: All scores of the chosen one.
        metric: Name of the headline metric.
        objective: What is made of the scores of the languages.
        rule: How the trial was chosen.
        out: The merged adapter's folder.
        resamples: The objective of the chosen trial on the dev rows, then on resamples of them.
        rank: Rank of the merged adapter, the largest of a compact one; None before it is merged.
        bytes: Size of its weights file.
        kept: Of a choice by pairs, whether each trial keeps the answers to their source side, None if it was stopped
            early; trials that do not are worth nothing.
        dev: Of a choice by pairs, how it stands on dev rows, if there are some.
    """

    trials: list[Trial]
    scores: list[Score]
    languages: list[dict[str, Score]]
    baseline: Trial
    baseline_score: Score
    baseline_languages: dict[str, Score]
    verdict: Verdict
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
        """Return the name of the data that the choice was made on: dev, or pairs."""
        return "dev" if self.kept is None else "pairs"

    @property
    def rows_name(self) -> str:
        """Return the name of the rows that the choice was made on."""
        return "dev rows" if self.kept is None else "pairs"

    @property
    def measure(self) -> str:
        """Return the name of the scores."""
        return f"dev {self.metric}" if self.kept is None else f"{self.metric} on pairs"

    @property
    def _unit(self) -> str:
        return "" if self.kept is None else " in agreement"

    @property
    def objective_name(self) -> str:
        """Return the name of the score that candidates are compared by."""
        return f"{self.measure}, {self.objective}" if self.kept is None else self.measure

    @property
    def chosen_score(self) -> Score:
        """Return the score of the chosen trial."""
        if self.chosen is self.baseline:
            return self.baseline_score
        # the verdict counts whole trials only
        return next(score for trial, score in zip(self.trials, self.scores, strict=True) if trial is self.chosen)

    def document(self) -> dict[str, Any]:
        """Return the JSON document of `adaptermix search`."""
        return {
            "best": {**self.chosen.candidate.document(), **_interval(self.chosen_score)},
            "trials": [
                {
                    "number": trial.number,
                    **trial.candidate.document(),
                    "rows": trial.rows,
                    **_interval(score),
                    "scores": _plain(languages),
                    **({"keeps_source": self.kept[place]} if self.kept is not None else {}),
                }
                for place, (trial, score, languages) in enumerate(
                    zip(self.trials, self.scores, self.languages, strict=True)
                )
            ],
            "task_alone": {**_interval(self.baseline_score), "scores": _plain(self.baseline_languages)},
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
        """Return in words whether there was something to find."""
        gain, honest = self.verdict.difference, self.verdict.honest
        measured = f"{gain.value:+.3f}{self._unit} on the {self.rows_name} that chose it"
        if honest:
            measured += f", {honest.value:+.3f} ({honest.low:+.3f} to {honest.high:+.3f}) by cross-fit"
        measured += f"; p-value {self.verdict.chance:.3f}, corrected for the number of candidates"
        control = self.verdict.control
        if control:
            over = f"{control.difference.value:+.3f} ({control.difference.low:+.3f} to {control.difference.high:+.3f})"
            rivals = "random adapters of the same ranks and norms in place of the others"
            if control.gains_too:
                return (
                    f"better than the task adapter alone, but not clearly better than {rivals} ({over} over these), so "
                    f"it does not count as a gain: {measured}."
                )
            return f"better than the task adapter alone: {measured}; {over} over {rivals}."
        if self.verdict.is_found:
            return f"better than the task adapter alone: {measured}."
        if self.chosen.candidate == self.baseline.candidate:
            return f"no weight is better than the task adapter alone ({self.baseline_score.value:.3f}), which is taken."
        if gain.value <= 0:
            return (
                f"no weight is better than the task adapter alone ({self.baseline_score.value:.3f}); "
                f"{'as good is' if gain.value == 0 else 'the best of the others is'} "
                f"{shown(self.chosen.candidate)}, which is written."
            )
        return (
            f"no weight is clearly better than the task adapter alone ({self.baseline_score.value:.3f}), and the best "
            f"is written all the same: {measured}."
        )


def _plain(scores: Mapping[str, Score]) -> dict[str, Any]:
    return {name: score.document() for name, score in scores.items()}


def _interval(score: Score) -> dict[str, float | int | None]:
    return {key: value for key, value in score.document().items() if key != "n"}
