"""Composition of adapters: in weight space, file to file, and on a live model with adjustable weights."""

from .merge_adapters import merge
from .plan import MergePlan, resolve_weights
from .report import MergeReport, ModuleReport

__all__ = ["MergePlan", "MergeReport", "ModuleReport", "merge", "resolve_weights"]
