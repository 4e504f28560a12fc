"""The last step of a search over a recipe, which scores a candidate."""

from __future__ import annotations

from ..evaluation import evaluate
from ..evaluation.score import count_units
from ..io.json_types import JsonObject
from ..options import EvaluateSettings, SearchSettings
from ..progress import SILENT, Watcher
from ..weight_search import search
from ..weight_search.result import SearchResult


def run_judge(settings: EvaluateSettings | SearchSettings, *, watch: Watcher = SILENT) -> JsonObject:
    """Score on dev data and return the command's document, with `resamples` and `units`.

    `resamples` are the scores on resamples of the rows. The same rows are always resampled in the same way, so that
    the resamples of several calls can be compared pair by pair. `units` is the number of rows, or of clusters of rows,
    that were resampled in the language with the fewest.

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
