"""Carry a plan out, module by module."""

from __future__ import annotations

import math

from ..adapters import AdapterState
from ..algebra import LowRank, norm, recompress, sign_conflict
from ..errors import PlanError
from .plan import MergePlan
from .report import ModuleReport


def merge_module(plan: MergePlan, module: str) -> tuple[LowRank, ModuleReport]:
    """Merge the updates of one module; an adapter that lacks it contributes nothing.

    Raises:
        AdapterFormatError: a factor holds NaN or infinity.
        PlanError: the sum overflows.
    """
    present = [
        (source.load(module), weight)
        for source, weight in zip(plan.sources, plan.weights, strict=True)
        if module in source.modules
    ]
    updates = [update for update, _ in present]
    weights = [weight for _, weight in present]
    merged = plan.method(updates, weights)
    length = norm(merged)
    if not math.isfinite(length):
        raise PlanError(
            f"module '{module}': the merged delta must be finite, and overflows with weights "
            f"{', '.join(f'{weight:g}' for weight in weights)} and scales "
            f"{', '.join(f'{update.scale:g}' for update in updates)}. "
            "Choose smaller weights, or check the adapters' lora_alpha."
        )
    residual = 0.0
    if plan.rank is not None and plan.rank < merged.rank:
        merged, residual = recompress(merged, plan.rank)
    conflict = sign_conflict([update * weight for update, weight in zip(updates, weights, strict=True)])
    return merged, ModuleReport(rank=merged.rank, norm=length, residual=residual, sign_conflict=conflict)


def execute(plan: MergePlan) -> tuple[AdapterState, dict[str, ModuleReport]]:
    """Return the merged adapter and a report per module."""
    updates, reports = {}, {}
    for module in plan.modules:
        updates[module], reports[module] = merge_module(plan, module)
    return AdapterState(meta=plan.meta(), updates=updates), reports
