"""Merged adapters added to their base model: a full checkpoint, streamed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.convert import find_weight
from ..compose.dense import as_weight
from ..compose.execute import fitted_methods, merge_module
from ..errors import PlanError
from ..progress import SILENT, Watcher
from .writing import write_checkpoint

if TYPE_CHECKING:
    from ..compose.plan import MergePlan
    from ..compose.report import ModuleReport


def write_into_base(
    folder: Path,
    plan: MergePlan,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    watch: Watcher = SILENT,
) -> dict[str, ModuleReport]:
    """Write the plan's base model with the merged delta added, one tensor at a time; return a report per module.

    Args:
        folder: An existing folder.
        plan: A plan of form "dense" with a base model.
        dtype: Storage dtype; None keeps that of each of the base's tensors.
        device: Where to compute.
        watch: Receives progress.

    Raises:
        ModelError: a module of the adapters is not in the base model, or has another shape there.
        PlanError: the plan has no base model.
    """
    if plan.checkpoint is None:
        raise PlanError("a base model is needed to write a full checkpoint, and none is given. Pass --base MODEL.")
    base = plan.checkpoint
    methods = fitted_methods(plan)
    reports: dict[str, ModuleReport] = {}

    def maker(name: str, module: str) -> Callable[[], Tensor]:
        def make() -> Tensor:
            found = merge_module(plan, module, method=methods[repr(plan.method_at(module))], device=device)
            reports[module] = found.report
            return as_weight(found.update.dense(), base.tensors[name].shape)

        return make

    names: Mapping[str, str] = {find_weight(base, module): module for module in plan.modules}
    makers = {name: maker(name, module) for name, module in names.items()}
    write_checkpoint(base, folder, makers, dtype=dtype, watch=watch)
    return {module: reports[module] for module in plan.modules}
