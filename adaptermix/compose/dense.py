"""Merged deltas as full matrices: a file of their own, one matrix in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.writer import file_order, stream_tensors
from ..errors import ModelError, PlanError
from ..progress import SILENT, Watcher
from .execute import fitted_methods, merge_module
from .plan import MergePlan
from .report import ModuleReport

DELTA = "delta.safetensors"


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
                reports[module] = found.report
                delta = as_weight(found.update.dense(), headers[name][1], turned=is_turned(plan, module))
                yield name, delta.to(dtype)
                advance(1, module)

    stream_tensors(folder / DELTA, headers, tensors(), {"format": "pt"})
    return {module: reports[module] for module in plan.modules}
