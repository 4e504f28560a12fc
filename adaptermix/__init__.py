"""Merge task adapters and alignment adapters across languages.

Public names are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import AdapterState
    from .adapters.load import load_adapter
    from .analysis import Inspection, SpectrumReport, inspect, spectrum
    from .baking import BakeReport, bake
    from .commands.recipes import run_recipe
    from .errors import AdapterMixError
    from .evaluation import Evaluation, Retrieval, Systems, compare_systems, evaluate, retrieve
    from .merge_statistics import StatisticsReport, statistics
    from .merging import MergeReport, merge
    from .merging.checkpoints import merge_checkpoints
    from .merging.extract_adapter import extract
    from .merging.extract_report import ExtractReport
    from .options import (
        AlignSettings,
        BakeSettings,
        CompareSettings,
        EvaluateSettings,
        ExtractSettings,
        FusionSettings,
        InspectSettings,
        JointSettings,
        MergeSettings,
        PushSettings,
        RetrieveSettings,
        SearchSettings,
        SpectrumSettings,
        StatisticsSettings,
        TaskSettings,
    )
    from .publish.hub import push
    from .training import train_align, train_fusion, train_joint, train_task
    from .tuning import Tuning, tune
    from .weight_search import SearchResult, merge_learned, search

__version__ = "0.1.0"

_HOMES = {
    "adapters": ("AdapterState",),
    "analysis": ("Inspection", "SpectrumReport", "inspect", "spectrum"),
    "baking": ("BakeReport", "bake"),
    "merging.checkpoints": ("merge_checkpoints",),
    "merging.extract_adapter": ("extract",),
    "merging.extract_report": ("ExtractReport",),
    "merging": ("MergeReport", "merge"),
    "errors": ("AdapterMixError",),
    "evaluation": ("Evaluation", "Retrieval", "Systems", "compare_systems", "evaluate", "retrieve"),
    "adapters.load": ("load_adapter",),
    "merge_statistics": ("StatisticsReport", "statistics"),
    "publish.hub": ("push",),
    "commands.recipes": ("run_recipe",),
    "weight_search": ("SearchResult", "merge_learned", "search"),
    "options": (
        "AlignSettings",
        "BakeSettings",
        "CompareSettings",
        "EvaluateSettings",
        "ExtractSettings",
        "FusionSettings",
        "InspectSettings",
        "JointSettings",
        "MergeSettings",
        "PushSettings",
        "RetrieveSettings",
        "SearchSettings",
        "SpectrumSettings",
        "StatisticsSettings",
        "TaskSettings",
    ),
    "tuning": ("Tuning", "tune"),
    "training": ("train_align", "train_fusion", "train_joint", "train_task"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterMixError",
    "AdapterState",
    "AlignSettings",
    "BakeReport",
    "BakeSettings",
    "CompareSettings",
    "EvaluateSettings",
    "Evaluation",
    "ExtractReport",
    "ExtractSettings",
    "FusionSettings",
    "InspectSettings",
    "Inspection",
    "JointSettings",
    "MergeReport",
    "MergeSettings",
    "PushSettings",
    "Retrieval",
    "RetrieveSettings",
    "SearchResult",
    "SearchSettings",
    "SpectrumReport",
    "SpectrumSettings",
    "StatisticsReport",
    "StatisticsSettings",
    "Systems",
    "TaskSettings",
    "Tuning",
    "bake",
    "compare_systems",
    "evaluate",
    "extract",
    "inspect",
    "load_adapter",
    "merge",
    "merge_checkpoints",
    "merge_learned",
    "push",
    "retrieve",
    "run_recipe",
    "search",
    "spectrum",
    "statistics",
    "train_align",
    "train_fusion",
    "train_joint",
    "train_task",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'adaptermix' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
