"""The last step of a search over a recipe, which scores a candidate."""

from __future__ import annotations

from typing import Any

from ..evaluation import evaluate
from ..evaluation.score import count_units
from ..options import EvaluateSettings, SearchSettings
from ..progress import SILENT, Watcher
from ..weight_search import search
from ..weight_search.result import SearchResult


def run_judge(settings: EvaluateSettings | SearchSettings, *, watch: Watcher = SILENT) -> dict[str, Any]:
    """Score on dev data and return the command's document, with `resamples` and `units`.

    `resamples` is the score on resamples of the rows. Those of the same rows are drawn alike, so that those of several
    calls can be compared pair by pair. `units` is how many rows, or clusters of them, were resampled in the language
    that has fewest.

    Raises:
        AdapterMixError: the work could not be done.
    """
    result = search(settings, watch=watch) if isinstance(settings, SearchSettings) else evaluate(settings, watch=watch)
    counts = (result.evaluation if isinstance(result, SearchResult) else result).counts
    return {
        **result.document(),
        "resamples": [round(value, 6) for value in result.resamples],
        "units": min(map(count_units, counts.values())),
    }
