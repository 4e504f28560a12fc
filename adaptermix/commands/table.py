"""From the settings of a command to the call that does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..analysis import inspect, spectrum
from ..baking import bake
from ..demo.inputs import demo_inputs
from ..evaluation import compare_systems, evaluate, retrieve
from ..evaluation.score import count_units
from ..merge_statistics import statistics
from ..merging.extract_adapter import extract
from ..options import (
    AlignSettings,
    BakeSettings,
    CompareSettings,
    DemoInputsSettings,
    EvaluateSettings,
    ExtractSettings,
    FusionSettings,
    InspectSettings,
    JointSettings,
    MergeSettings,
    PushSettings,
    RetrieveSettings,
    SearchSettings,
    Settings,
    SpectrumSettings,
    StatisticsSettings,
    TaskSettings,
)
from ..progress import SILENT, Watcher
from ..publish.hub import push
from ..training import train_align, train_fusion, train_joint, train_task
from ..weight_search import merge_learned, search, search_dry
from ..weight_search.result import SearchResult

_CALLS: dict[type[Settings], Callable[[Any, Watcher], dict[str, Any]]] = {
    AlignSettings: lambda settings, watch: train_align(settings, watch=watch).document(),
    TaskSettings: lambda settings, watch: train_task(settings, watch=watch).document(),
    FusionSettings: lambda settings, watch: train_fusion(settings, watch=watch).document(),
    JointSettings: lambda settings, watch: train_joint(settings, watch=watch).document(),
    MergeSettings: lambda settings, watch: merge_learned(settings, watch=watch).document(),
    BakeSettings: lambda settings, watch: bake(settings, watch=watch).document(),
    ExtractSettings: lambda settings, watch: extract(**settings.model_dump(), watch=watch).document(),
    SearchSettings: lambda settings, watch: (
        search_dry(settings) if settings.dry_run else search(settings, watch=watch).document()
    ),
    EvaluateSettings: lambda settings, watch: evaluate(settings, watch=watch).document(),
    CompareSettings: lambda settings, watch: compare_systems(settings, watch=watch).document(),
    RetrieveSettings: lambda settings, watch: retrieve(settings, watch=watch).document(),
    InspectSettings: lambda settings, watch: inspect(**settings.model_dump(), watch=watch).document(),
    SpectrumSettings: lambda settings, watch: spectrum(**settings.model_dump(), watch=watch).document(),
    StatisticsSettings: lambda settings, watch: statistics(settings, watch=watch).document(),
    PushSettings: lambda settings, watch: push(settings, watch=watch).document(),
    DemoInputsSettings: lambda settings, watch: demo_inputs(settings, watch=watch),
}


def run_settings(settings: Settings, *, watch: Watcher = SILENT) -> dict[str, Any]:
    """Do what the settings ask for and return the command's JSON document.

    Raises:
        AdapterMixError: the work could not be done.
    """
    return _CALLS[type(settings)](settings, watch)


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
