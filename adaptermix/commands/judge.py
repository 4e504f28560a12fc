"""The last step of a search over a recipe, which scores a candidate."""

from __future__ import annotations

from ..evaluation import evaluate, retrieve
from ..evaluation.score import count_units
from ..io.json_types import JsonObject
from ..options import EvaluateSettings, RetrieveSettings, SearchSettings
from ..progress import SILENT, Watcher
from ..weight_search import search

Judge = EvaluateSettings | RetrieveSettings | SearchSettings
"""Settings of the commands that score a candidate."""


def run_judge(settings: Judge, *, watch: Watcher = SILENT) -> JsonObject:
    """Score on dev data and return the command's document, with `resamples` and `units`.

    `resamples` are the scores on resamples of the rows. The same rows are always resampled in the same way, so that
    the resamples of several calls can be compared pair by pair. `units` is the number of rows, or of clusters of rows,
    that were resampled in the language or direction with the fewest.

    Raises:
        AdapterMixError: the work could not be done.
    """
    if isinstance(settings, SearchSettings):
        searched = search(settings, watch=watch)
        document, resamples, counts = searched.document(), searched.resamples, searched.evaluation.counts
    elif isinstance(settings, RetrieveSettings):
        retrieved = retrieve(settings, watch=watch)
        document, resamples, counts = retrieved.document(), retrieved.resamples, retrieved.counts
    else:
        scored = evaluate(settings, watch=watch)
        document, resamples, counts = scored.document(), scored.resamples, scored.counts
    return {
        **document,
        "resamples": [round(value, 6) for value in resamples],
        "units": min(map(count_units, counts.values())),
    }
