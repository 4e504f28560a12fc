"""Settings of every command, once: recipes are validated by them, command-line options are made from them.

A field's description is its help text. Modules are imported when one of their classes is first used, and without torch,
so that help texts and refusals are fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .alignment import AlignOptions as AlignOptions
    from .alignment import AlignSettings as AlignSettings
    from .alignment import JointSettings as JointSettings
    from .baking import BakeSettings as BakeSettings
    from .base import TASK as TASK
    from .base import GenerationSettings as GenerationSettings
    from .base import LoadOptions as LoadOptions
    from .base import Placed as Placed
    from .base import Settings as Settings
    from .base import Written as Written
    from .evaluation import CompareSettings as CompareSettings
    from .evaluation import EvaluateSettings as EvaluateSettings
    from .evaluation import PredictSettings as PredictSettings
    from .evaluation import RetrieveSettings as RetrieveSettings
    from .fields import Dtype as Dtype
    from .fields import Layer as Layer
    from .fusion import FusionSettings as FusionSettings
    from .merging import ExtractSettings as ExtractSettings
    from .merging import MergeSettings as MergeSettings
    from .merging import MethodsSettings as MethodsSettings
    from .merging import PlaceSettings as PlaceSettings
    from .merging import SearchSettings as SearchSettings
    from .stacking import StackSettings as StackSettings
    from .statistics import StatisticsSettings as StatisticsSettings
    from .tools import DemoInputsSettings as DemoInputsSettings
    from .tools import DemoSettings as DemoSettings
    from .tools import ExportSettings as ExportSettings
    from .tools import InspectSettings as InspectSettings
    from .tools import PushSettings as PushSettings
    from .tools import RecipeSettings as RecipeSettings
    from .tools import ReportSettings as ReportSettings
    from .tools import RunSettings as RunSettings
    from .tools import SpectrumSettings as SpectrumSettings
    from .tools import TuneSettings as TuneSettings
    from .tools import VerifySettings as VerifySettings
    from .training import TaskOptions as TaskOptions
    from .training import TaskSettings as TaskSettings
    from .training import TrainingSettings as TrainingSettings

_HOMES = {
    "alignment": ("AlignOptions", "AlignSettings", "JointSettings"),
    "baking": ("BakeSettings",),
    "base": ("TASK", "GenerationSettings", "LoadOptions", "Placed", "Settings", "Written"),
    "evaluation": ("CompareSettings", "EvaluateSettings", "PredictSettings", "RetrieveSettings"),
    "fields": ("Dtype", "Layer"),
    "fusion": ("FusionSettings",),
    "merging": ("ExtractSettings", "MergeSettings", "MethodsSettings", "PlaceSettings", "SearchSettings"),
    "stacking": ("StackSettings",),
    "statistics": ("StatisticsSettings",),
    "tools": (
        "DemoInputsSettings",
        "DemoSettings",
        "ExportSettings",
        "InspectSettings",
        "PushSettings",
        "RecipeSettings",
        "ReportSettings",
        "RunSettings",
        "SpectrumSettings",
        "TuneSettings",
        "VerifySettings",
    ),
    "training": ("TaskOptions", "TaskSettings", "TrainingSettings"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605  (a sorted list of texts)


def all_settings() -> list[type[Settings]]:
    """Return every class of options of all modules; `Settings` itself is the first."""
    for home in _HOMES:
        import_module(f".{home}", __name__)
    from .base import Settings

    classes: list[type[Settings]] = [Settings]
    for cls in classes:
        classes += [each for each in cls.__subclasses__() if each not in classes]
    return classes


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, getattr(import_module(f".{_HOME_OF[name]}", __name__), name))
