"""Settings of every command, once: recipes are validated by them, command-line options are made from them.

Importing this module costs no torch, so `adaptermix --help` stays fast. A field's description is its help text.
"""

from .alignment import AlignOptions, AlignSettings, JointSettings
from .baking import BakeSettings
from .base import TASK, GenerationSettings, LoadOptions, Placed, Settings, Written
from .evaluation import CompareSettings, EvaluateSettings, PredictSettings, RetrieveSettings
from .fields import Dtype, Layer
from .fusion import FusionSettings
from .merging import ExtractSettings, MergeSettings, MethodsSettings, PlaceSettings, SearchSettings
from .stacking import StackSettings
from .statistics import StatisticsSettings
from .tools import (
    DemoInputsSettings,
    DemoSettings,
    ExportSettings,
    InspectSettings,
    PushSettings,
    RunSettings,
    SpectrumSettings,
    TuneSettings,
    VerifySettings,
)
from .training import TaskOptions, TaskSettings, TrainingSettings

__all__ = [
    "TASK",
    "AlignOptions",
    "AlignSettings",
    "BakeSettings",
    "CompareSettings",
    "DemoInputsSettings",
    "DemoSettings",
    "Dtype",
    "EvaluateSettings",
    "ExportSettings",
    "ExtractSettings",
    "FusionSettings",
    "GenerationSettings",
    "InspectSettings",
    "JointSettings",
    "Layer",
    "LoadOptions",
    "MergeSettings",
    "MethodsSettings",
    "PlaceSettings",
    "Placed",
    "PredictSettings",
    "PushSettings",
    "RetrieveSettings",
    "RunSettings",
    "SearchSettings",
    "Settings",
    "SpectrumSettings",
    "StackSettings",
    "StatisticsSettings",
    "TaskOptions",
    "TaskSettings",
    "TrainingSettings",
    "TuneSettings",
    "VerifySettings",
    "Written",
]
