"""What the manifest and the report of a merge record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..publish.output import OutputSize, size_notes
from .dense import into_base
from .plan import MergePlan
from .report import MergeReport, ModuleReport


def merge_report(
    plan: MergePlan,
    out: Path | None,
    modules: Mapping[str, ModuleReport],
    settings: Mapping[str, Any],
    size: OutputSize | None = None,
) -> MergeReport:
    """Return the report of a merge.

    Args:
        plan: Its plan.
        out: The output folder, if one was to be written.
        modules: Report per module path.
        settings: The resolved settings.
        size: Rank and size of a written adapter.
    """
    large = () if size is None else size_notes(size["bytes"], _base_folder(plan))
    name = str(settings["method"])
    return MergeReport(
        out=out,
        method=name,
        weights=plan.weights,
        modules=modules,
        plan=settings,
        notes=(*plan.notes(), *large),
        rank=size and size["rank"],
        bytes=size and size["bytes"],
    )


def _base_folder(plan: MergePlan) -> Path | None:
    """Return the folder of the base model, if it is known and on disk."""
    if plan.checkpoint is not None:
        return plan.checkpoint.path
    base = plan.sources[0].meta.base
    return Path(base) if base and Path(base).is_dir() else None


def merge_settings(plan: MergePlan, given: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return the resolved settings, for the manifest; what is at its default and unused is left out."""
    found: dict[str, Any] = {
        "method": given.get("method", "exact"),
        "weights": list(plan.weights),
        "options": dict(plan.options),
        "rank": plan.shape.rank,
        "form": plan.shape.form,
        "fill": plan.fill,
        "saved": plan.saved,
        "dtype": more["dtype"] or (None if into_base(plan) else "float32"),
        "max_residual": more["max_residual"],
        "compact": more["compact"] or None,
        "allow_base_mismatch": bool(given.get("allow_base_mismatch")),
        "allow_pickle": bool(given.get("allow_pickle")),
        "places": [override.entry() for override in plan.overrides],
        "base": given.get("base"),
        # a method that learns has measured its own
        "statistics": [] if plan.method.is_learned else [str(path) for path in given.get("statistics") or ()],
    }
    if plan.shape.rank == "auto":
        found["keep"] = plan.shape.keep
    if plan.method.is_random:
        found["seed"] = plan.seed
    return {key: value for key, value in found.items() if value not in (None, [], {})}
