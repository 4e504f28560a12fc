"""What a search over a recipe found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import PlanError


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
    """

    settings: Mapping[str, Any]
    folder: Path
    value: float | None
    low: float | None
    high: float | None
    ran: int
    pruned: Pruned | None = None

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
class Tuning:
    """All candidates.

    Args:
        candidates: In the order in which they ran.
        best: The one of the highest value, the first among equals.
        out: The folder of all.
    """

    candidates: Sequence[Candidate]
    best: Candidate
    out: Path

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
        return cls(candidates=candidates, best=candidates[-max(whole)[1]], out=out)

    def document(self) -> dict[str, Any]:
        """Return the JSON document."""
        return {
            "best": self.best.document(),
            "trials": [candidate.document() for candidate in self.candidates],
            "out": str(self.out),
        }


def shown(settings: Mapping[str, Any]) -> str:
    """Return a candidate's settings for a person."""
    numbers = {key: f"{value:.4g}" for key, value in settings.items() if isinstance(value, float)}
    return ", ".join(f"{key} {numbers.get(key, value)}" for key, value in settings.items())
