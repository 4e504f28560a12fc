"""Merged deltas as full matrices: a file of their own, one matrix in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..algebra import all_finite
from ..errors import ModelError, OutputError, PlanError
from ..io.safetensors_writer import file_order, stream_tensors
from ..progress import SILENT, Watcher
from .execute import fitted_methods, merge_module, merged_modules
from .plan import MergePlan
from .report import ModuleReport

DELTA = "delta.safetensors"
_ROWS = 256


def check_dense(plan: MergePlan) -> None:
    """Refuse what a file of matrices cannot hold.

    Raises:
        PlanError: an adapter has biases or fully trained tensors.
    """
    for source in plan.sources:
        if source.saved_headers or any(header.bias for header in source.modules.values()):
            raise PlanError(
                f"--form dense holds weight matrices only, and '{source.name}' has biases or fully trained tensors "
                "too. Use another form."
            )


def into_base(plan: MergePlan) -> bool:
    """Whether the result is a full checkpoint."""
    return plan.shape.form == "dense" and plan.checkpoint is not None


def weight_shape(plan: MergePlan, module: str) -> tuple[int, ...]:
    """Return the shape of the weight that a module's delta is added to, as the base model stores it."""
    header = next(source.modules[module] for source in plan.sources if module in source.modules)
    if header.layout.kind == "convolution":
        return (header.out, -1, *header.layout.kernel)
    return (header.into, header.out) if is_turned(plan, module) else (header.out, header.into)


def is_turned(plan: MergePlan, module: str) -> bool:
    """Return whether the base model stores a module's weight as [in out]."""
    header = next(source.modules[module] for source in plan.sources if module in source.modules)
    linear = header.layout.kind == "linear"
    return header.layout.kind == "embedding" or (linear and plan.sources[0].meta.fan_in_fan_out)


def as_weight(delta: Tensor, shape: tuple[int, ...], *, turned: bool) -> Tensor:
    """Return a delta [out in] as its weight of this shape lies in the base model; turned if that is [in out]."""
    if len(shape) > 2:
        if delta.numel() != torch.Size(shape).numel():
            raise ModelError(
                f"the base's weight {list(shape)} must have as many entries as the delta {list(delta.shape)}, and has "
                "not. Give the base model that the adapters were trained on."
            )
        return delta.reshape(shape)
    return delta.T.contiguous() if turned else delta


def rounded_report(report: ModuleReport, module: str, delta: Tensor, dtype: torch.dtype) -> ModuleReport:
    """Return the report of a module with what storing its matrix in a 16-bit dtype loses.

    Raises:
        OutputError: the matrix overflows the dtype.
    """
    if dtype.itemsize >= 4:
        return report
    lost = []
    for rows in torch.split(delta, _ROWS):
        stored = rows.to(dtype)
        if not all_finite(stored):
            raise OutputError(
                f"the delta of module '{module}' must be finite in {str(dtype).removeprefix('torch.')}, and overflows "
                "it. Choose a wider dtype or smaller weights."
            )
        lost.append(float(torch.linalg.vector_norm(rows - stored.to(rows.dtype), dtype=torch.float64)))
    return with_rounding(report, math.hypot(*lost) / report.norm if report.norm > 0 else 0.0)


def with_rounding(report: ModuleReport, share: float) -> ModuleReport:
    """Return the report of a module that also loses this share of its norm to rounding."""
    return replace(report, residual=math.hypot(report.residual, share), rounding=share)


def write_delta(
    folder: Path, plan: MergePlan, *, dtype: torch.dtype, device: torch.device, watch: Watcher = SILENT
) -> dict[str, ModuleReport]:
    """Write `delta.safetensors`: per module `MODULE.weight`, what is to be added to the base model's weight.

    Args:
        folder: An existing folder.
        plan: A plan of form "dense".
        dtype: Storage dtype.
        device: Where to compute.
        watch: Receives progress.

    Raises:
        OutputError: a delta overflows the storage dtype.
    """
    check_dense(plan)
    names = {f"{module}.weight": module for module in plan.modules}
    headers = {}
    for name, module in names.items():
        shape = weight_shape(plan, module)
        if -1 in shape:
            header = next(source.modules[module] for source in plan.sources if module in source.modules)
            shape = (header.out, header.into // torch.Size(shape[2:]).numel(), *shape[2:])
        headers[name] = (dtype, shape)
    fitted = fitted_methods(plan)
    reports: dict[str, ModuleReport] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        with watch.track("merge", len(names)) as advance:
            for name in file_order(headers):
                module = names[name]
                found = merge_module(plan, module, method=fitted[repr(plan.method_at(module))], device=device)
                delta = as_weight(found.update.dense(), headers[name][1], turned=is_turned(plan, module))
                reports[module] = rounded_report(found.report, module, delta, dtype)
                yield name, delta.to(dtype)
                advance(1, module)

    stream_tensors(folder / DELTA, headers, tensors(), {"format": "pt"})
    return {module: reports[module] for module in plan.modules}


def dense_reports(
    plan: MergePlan, dtype: torch.dtype | None, device: torch.device, watch: Watcher
) -> dict[str, ModuleReport]:
    """Return what a merge to full matrices would report."""
    found = {}
    for module, merged in merged_modules(plan, device=device, watch=watch):
        found[module] = merged.report
        if into_base(plan):
            from .into_base import into_base_report

            found[module] = into_base_report(plan, module, merged, dtype)
        elif dtype is not None:
            found[module] = rounded_report(merged.report, module, merged.update.dense(), dtype)
    return found
