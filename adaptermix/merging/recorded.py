"""What the manifest and the report of a merge record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..adapters import AdapterFile
from ..io.json_types import JsonObject
from ..publish.output import size_notes
from .merge_options import MergeOptions
from .plan import MergePlan
from .report import MergeReport, ModuleReport


def merge_report(
    plan: MergePlan, options: MergeOptions, modules: Mapping[str, ModuleReport], file: AdapterFile | None = None
) -> MergeReport:
    """Return the report of a merge.

    Args:
        plan: Its plan.
        options: Its options.
        modules: Report per module path.
        file: The file of the adapter, where the result is one.
    """
    size = None if file is None else file.size()
    return MergeReport(
        out=options.out,
        method=options.method,
        weights=plan.weights,
        modules=modules,
        plan=merge_settings(plan, options),
        notes=(*plan.notes(), *(() if size is None else size_notes(size, _base_folder(plan)))),
        rank=None if file is None else file.rank,
        bytes=size,
    )


def _base_folder(plan: MergePlan) -> Path | None:
    """Return the folder of the base model, if it is known and on disk."""
    if plan.checkpoint is not None:
        return plan.checkpoint.path
    base = plan.sources[0].meta.base
    return Path(base) if base and Path(base).is_dir() else None


def merge_settings(plan: MergePlan, options: MergeOptions) -> JsonObject:
    """Return the resolved options, for the manifest; unused defaults are left out."""
    settings: JsonObject = {
        "method": options.method,
        "weights": list(plan.weights),
        "options": dict(plan.options),
        "rank": plan.shape.rank,
        "form": plan.shape.form,
        "fill": plan.fill,
        "saved": plan.saved,
        "dtype": options.dtype or (None if plan.writes_checkpoint else "float32"),
        "max_residual": options.max_residual,
        "compact": options.compact or None,
        "allow_base_mismatch": options.allow_base_mismatch,
        "allow_pickle": options.allow_pickle,
        "places": [override.entry() for override in plan.overrides],
        "base": options.base,
        # A method that learns has measured its own statistics.
        "statistics": [] if plan.method.is_learned else [str(path) for path in options.statistics],
    }
    if plan.shape.rank == "auto":
        settings["keep"] = plan.shape.keep
    if plan.method.is_random:
        settings["seed"] = plan.seed
    return {key: value for key, value in settings.items() if value not in (None, [], {})}
