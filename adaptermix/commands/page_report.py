"""The report of `report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..io.json_types import JsonObject
from ..io.report_view import ResultView


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class PageReport(ResultView):
    """A page that was written.

    Args:
        out: The file.
        entries: The names of the outputs and documents on it.
        scores: The score of each system per language, by measure.
        left_out: Number of entries beyond the most that a page shows.
    """

    out: Path
    entries: Sequence[str]
    scores: dict[str, dict[str, dict[str, float]]]
    left_out: int = 0

    def document(self) -> JsonObject:
        """Return the JSON document of `adaptermix report`."""
        return {
            "out": str(self.out),
            "entries": list(self.entries),
            "scores": self.scores,
            "left_out": self.left_out,
        }
