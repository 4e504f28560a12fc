"""The decision of a search: the chosen candidate, and whether it is better than the baseline beyond chance."""

from __future__ import annotations

from dataclasses import dataclass

from ..evaluation.score import Score, documents
from ..io.json_types import JsonObject

LEVEL = 0.025
"""One-sided significance level, equivalent to a 95 % interval above 0."""
CONTROL_NAME = "random adapters instead of the others"


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """Scores of random adapters at the chosen weights, instead of all adapters but the first.

    Args:
        tried: Number of draws; the one with the best score counts.
        score: Its score, with an interval.
        languages: Its score per language.
        gain: Its difference from the first adapter alone, on the same rows.
        difference: The difference of the chosen candidate from it, on the same rows.
    """

    tried: int
    score: Score
    languages: dict[str, Score]
    gain: Score
    difference: Score

    @property
    def gains_too(self) -> bool:
        """Whether the chosen candidate is not better than the random adapters beyond chance."""
        return self.difference.low <= 0

    def document(self) -> JsonObject:
        """Return plain data."""
        return {
            "tried": self.tried,
            "gains_too": self.gains_too,
            "score": self.score.document(),
            "scores": documents(self.languages),
            "gain": self.gain.document(),
            "difference": self.difference.document(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The chosen trial and its comparison with the baseline.

    Args:
        chosen: Index of the trial that is taken.
        difference: Its difference from the baseline on the rows that chose it, which is optimistic.
        chance: p-value, corrected for the number of candidates; see `significance.chance_of`.
        honest: The difference by cross-fitting, see `cross_fit`. Samplers have seen all rows when they proposed the
            trials, so it may still be optimistic. None after races, in which all rows have chosen the survivors.
        control: Scores of random adapters instead of the others; None if they were not tried.
    """

    chosen: int
    difference: Score
    chance: float
    honest: Score | None = None
    control: Control | None = None

    @property
    def is_better(self) -> bool:
        """Whether the chosen trial is better than the baseline beyond chance."""
        return self.chance <= LEVEL

    @property
    def is_found(self) -> bool:
        """Whether it is also better than random adapters instead of the others, if these were tried."""
        return self.is_better and not (self.control and self.control.gains_too)

    def document(self) -> JsonObject:
        """Return plain data."""
        return {
            "found": self.is_found,
            "chance": self.chance,
            "difference": self.difference.document(),
            "cross_fit": self.honest.document() if self.honest else None,
            **({"control": self.control.document()} if self.control else {}),
        }
