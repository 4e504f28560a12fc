"""Merge task adapters and alignment adapters across languages.

Each command of the command line is a function here. Call it with settings, `evaluate(EvaluateSettings(...))`, or with
their fields, `evaluate(base=..., task=..., data=[...])`; it returns a report. Public names are loaded when
they are first used, so that importing the package is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .commands.table import COMMANDS

if TYPE_CHECKING:
    from .adapters import AdapterState as AdapterState
    from .adapters.load import load_adapter as load_adapter
    from .analysis import Inspection as Inspection
    from .analysis import SpectrumReport as SpectrumReport
    from .baking import BakeReport as BakeReport
    from .commands.functions import merge as merge
    from .commands.recipes import run_recipe as run_recipe
    from .commands.table import *  # noqa: F403  (the types of the functions)
    from .commands.verification import Verification as Verification
    from .errors import AdapterMixError as AdapterMixError
    from .evaluation import Evaluation as Evaluation
    from .evaluation import Prediction as Prediction
    from .evaluation import Retrieval as Retrieval
    from .evaluation import Systems as Systems
    from .merge_statistics import StatisticsReport as StatisticsReport
    from .merging import MergeReport as MergeReport
    from .merging.checkpoints import merge_checkpoints as merge_checkpoints
    from .merging.extract_report import ExtractReport as ExtractReport
    from .merging.in_memory import add_to as add_to
    from .merging.request import merge_learned as merge_learned
    from .options import AlignSettings as AlignSettings
    from .options import BakeSettings as BakeSettings
    from .options import CompareSettings as CompareSettings
    from .options import EvaluateSettings as EvaluateSettings
    from .options import ExportSettings as ExportSettings
    from .options import ExtractSettings as ExtractSettings
    from .options import FusionSettings as FusionSettings
    from .options import InspectSettings as InspectSettings
    from .options import JointSettings as JointSettings
    from .options import MergeSettings as MergeSettings
    from .options import PredictSettings as PredictSettings
    from .options import PushSettings as PushSettings
    from .options import ReportSettings as ReportSettings
    from .options import RetrieveSettings as RetrieveSettings
    from .options import SearchSettings as SearchSettings
    from .options import SpectrumSettings as SpectrumSettings
    from .options import StatisticsSettings as StatisticsSettings
    from .options import TaskSettings as TaskSettings
    from .options import VerifySettings as VerifySettings
    from .tuning import Tuning as Tuning
    from .tuning import tune as tune
    from .weight_search import SearchResult as SearchResult

__version__ = "0.1.0"

_FUNCTIONS = {command.function: command for command in COMMANDS.values() if command.function}
_HOMES = {
    "adapters": ("AdapterState",),
    "adapters.load": ("load_adapter",),
    "analysis": ("Inspection", "SpectrumReport"),
    "baking": ("BakeReport",),
    "commands.functions": ("merge",),
    "commands.recipes": ("run_recipe",),
    "commands.verify": ("Verification",),
    "errors": ("AdapterMixError",),
    "evaluation": ("Evaluation", "Prediction", "Retrieval", "Systems"),
    "merge_statistics": ("StatisticsReport",),
    "merging": ("MergeReport",),
    "merging.extract_report": ("ExtractReport",),
    "merging.in_memory": ("add_to",),
    "options": ("MergeSettings", *(command.options for command in _FUNCTIONS.values())),
    "tuning": ("Tuning", "tune"),
    "weight_search": ("SearchResult",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
# Old names, which still work; `merge` replaces them.
_OLD_HOME_OF = {"merge_checkpoints": "merging.checkpoints", "merge_learned": "merging.request"}

__all__ = sorted([*_HOME_OF, *_FUNCTIONS])  # noqa: PLE0605  (a sorted list of texts)


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        from .commands.functions import function_of

        # kept, since a function is pickled only if it is found again by its name
        return globals().setdefault(name, function_of(_FUNCTIONS[name]))
    home = _HOME_OF.get(name) or _OLD_HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'adaptermix' has no attribute {name!r}")
    return getattr(import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
