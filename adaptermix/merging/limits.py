"""Limits on what a merge may lose, and the check of results against them."""

from __future__ import annotations

import math

from ..errors import PlanError
from .plan import MergePlan
from .report import MergeReport


def limit_of(plan: MergePlan, max_residual: float) -> float:
    """Return the largest allowed residual. With `--rank auto` it is at least the residual that `--keep` permits."""
    if plan.shape.rank != "auto":
        return max_residual
    # slightly above, since the residual is rounded
    return max(max_residual, math.sqrt(1 - plan.shape.keep) + 1e-9)


def check_residual(plan: MergePlan, report: MergeReport, limit: float) -> None:
    """Refuse a result that lost more than is allowed.

    Raises:
        PlanError: the residual is above the limit.
    """
    if report.residual <= limit or limit == 1:
        return
    worst = max(report.modules, key=lambda module: report.modules[module].residual)
    lost = report.modules[worst]
    accept = f"or accept it with --max-residual {min(1.0, math.ceil(report.residual * 100) / 100):.2f}"
    if report.rounding > 0.5 * report.residual:
        raise PlanError(
            f"rounding to {report.plan['dtype'] if report.plan else 'the dtype'} may lose at most {limit:.0%} of the "
            f"delta's norm, and loses {report.rounding:.0%} (most at '{worst}': {lost.rounding:.0%}). "
            f"Choose --dtype float32, {accept}.",
            code="residual.rounding",
        )
    forms = "dense" if plan.method.gives_dense else "concat or dense"
    raise PlanError(
        f"truncation may lose at most {limit:.0%} of the delta's norm, and loses {report.residual:.0%} (most at "
        f"'{worst}': {lost.residual:.0%} at rank {lost.rank}). Choose a larger --rank, --rank auto with --keep, "
        f"--form {forms}, {accept}.",
        code="residual.truncation",
    )


def check_rounding(plan: MergePlan, report: MergeReport, limit: float) -> None:
    """Refuse a file of deltas that rounding changed too much. Full checkpoints have the base's dtype and pass.

    Raises:
        PlanError: the rounding is above the limit.
    """
    if not plan.writes_checkpoint and report.rounding > limit:
        check_residual(plan, report, limit)


def check_dense(plan: MergePlan) -> None:
    """Refuse adapters that a file of matrices cannot represent.

    Raises:
        PlanError: an adapter has biases or fully trained tensors.
    """
    for source in plan.sources:
        if source.saved_headers or any(header.bias for header in source.modules.values()):
            raise PlanError(
                f"--form dense holds weight matrices only, and '{source.name}' has biases or fully trained tensors "
                "too. Use another form.",
                code="dense.other-tensors",
            )
