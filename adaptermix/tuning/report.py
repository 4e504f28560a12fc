"""What a search over a recipe found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PlanError
from ..evaluation.score import NORMAL, Score
from ..evaluation.significance import null_error
from ..weight_search.significance import LEVEL, chance_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """Where a candidate was stopped, since its training was behind that of others.

    Args:
        command: The step of the recipe.
        step: Optimizer step of its last look at dev data.
        measure: What it was compared by.
        value: How it stood.
        median: How the others stood at the same point.
    """

    command: str
    step: int
    measure: str
    value: float
    median: float

    def document(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def sentence(self) -> str:
        """Say it to a person."""
        return (
            f"{self.command} stopped at step {self.step}: {self.measure} {self.value:.3f}, median of earlier ones "
            f"{self.median:.3f}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One choice of settings and what it scored.

    Args:
        settings: Overrides of the recipe.
        folder: What its steps wrote.
        value: Score of the last step; None where the candidate was stopped.
        low: Lower end of its 95 % interval.
        high: Upper end.
        ran: Steps that were run for it; the others were there already.
        pruned: Where it was stopped, if it was.
        resamples: Its score on the dev rows, then on resamples of them, drawn alike for all candidates; empty where
            they are not known.
        rows: Dev rows, or clusters of them, of the language that has fewest.
    """

    settings: Mapping[str, Any]
    folder: Path
    value: float | None
    low: float | None
    high: float | None
    ran: int
    pruned: Pruned | None = None
    resamples: Sequence[float] = ()
    rows: int = 0

    def document(self) -> dict[str, Any]:
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
class Verdict:
    """Whether the best candidate is better than the first one beyond chance.

    Args:
        difference: By how much, on the dev rows that chose it, which flatters it; with its paired interval.
        chance: p-value, corrected for all candidates that were tried; see
            `adaptermix.weight_search.significance.chance_of`.
        tried: How many candidates were tried, stopped ones too.
    """

    difference: Score
    chance: float
    tried: int

    @property
    def is_found(self) -> bool:
        """Whether the best candidate is better beyond chance."""
        return self.chance <= LEVEL

    def document(self) -> dict[str, Any]:
        """Return plain data."""
        found = {"found": self.is_found, "chance": self.chance, "tried": self.tried}
        return found | {"difference": self.difference.document()}

    def sentence(self) -> str:
        """Return the verdict in words."""
        gain, chance = self.difference, f"p-value {self.chance:.3f}, corrected for {self.tried} candidates"
        if gain.value <= 0:
            return "no candidate is better than the first."
        measured = f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}) on the dev rows that chose it; {chance}"
        return f"the best is {'' if self.is_found else 'not clearly '}better than the first candidate: {measured}."


def verdict_on(candidates: Sequence[Candidate], best: Candidate) -> Verdict | None:
    """Return whether the best is better than the first candidate that was run whole; None where it cannot be said."""
    whole = [candidate for candidate in candidates if candidate.value is not None]
    if len(whole) < 2 or not all(len(found.resamples) == len(best.resamples) > 1 for found in whole):
        return None
    values = np.array([found.resamples for found in whole])
    gains = values - values[0]
    chosen = next(number for number, found in enumerate(whole) if found is best)
    chance = chance_of(gains[1:], chosen - 1, rows=min(found.rows for found in whole)) if chosen else 1.0
    # what was stopped was tried too, and its resamples are not known: Bonferroni for the whole
    chance = min(1.0, chance * (len(candidates) - 1) / (len(whole) - 1))
    value, width = float(gains[chosen, 0]), NORMAL * null_error(gains[chosen], best.rows)
    difference = Score(value=value, low=value - width, high=value + width, n=best.rows)
    return Verdict(difference=difference, chance=chance, tried=len(candidates))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """All candidates.

    Args:
        candidates: In the order in which they ran.
        best: The one of the highest value, the first among equals.
        out: The folder of all.
        verdict: Whether the best is better than the first beyond chance; None where it cannot be said.
    """

    candidates: Sequence[Candidate]
    best: Candidate
    out: Path
    verdict: Verdict | None = None

    @classmethod
    def of(cls, candidates: Sequence[Candidate], out: Path) -> Tuning:
        """Find the best of the candidates that were not stopped.

        Raises:
            PlanError: there are none.
        """
        whole = [(found.value, -number) for number, found in enumerate(candidates) if found.value is not None]
        if not whole:
            raise PlanError(
                f"a search needs a candidate that is run whole, and every candidate was stopped, behind others that "
                f"{out} holds. Drop --prune, or give another --out."
            )
        best = candidates[-max(whole)[1]]
        return cls(candidates=candidates, best=best, out=out, verdict=verdict_on(candidates, best))

    def document(self) -> dict[str, Any]:
        """Return the JSON document."""
        return {
            "best": self.best.document(),
            "trials": [candidate.document() for candidate in self.candidates],
            "verdict": self.verdict.document() if self.verdict else None,
            "out": str(self.out),
        }


def shown(settings: Mapping[str, Any]) -> str:
    """Return a candidate's settings for a person."""
    numbers = {key: f"{value:.4g}" for key, value in settings.items() if isinstance(value, float)}
    return ", ".join(f"{key} {numbers.get(key, value)}" for key, value in settings.items())
