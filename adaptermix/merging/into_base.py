"""Merged adapters added to their base model: a full checkpoint, streamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.convert import find_weight
from ..checkpoints.adding import rounding_share
from ..checkpoints.writing import write_checkpoint
from ..errors import ModelError, PlanError
from ..progress import SILENT, Watcher
from .dense import as_weight, is_turned, with_rounding
from .execute import fitted_methods, merge_module

_HEADS = ("lm_head", "embed_out")
_TABLES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")

if TYPE_CHECKING:
    from ..io.checkpoint_files import Checkpoint
    from .execute import MergedModule
    from .plan import MergePlan
    from .report import ModuleReport


def untied(base: Checkpoint, plan: MergePlan) -> Checkpoint:
    """Return the base model with an output head of its own, where a plan changes a head that is tied to embeddings.

    PEFT adapts such a head and leaves the embeddings alone, so no model with tied weights equals the result.
    """
    headers = {module: header for source in plan.sources for module, header in source.modules.items()}
    aliases: dict[str, str] = {}
    for module in plan.modules:
        name = f"{module}.weight"
        if module.rpartition(".")[2] not in _HEADS or name in base.tensors:
            continue
        shape = (headers[module].out, headers[module].into)
        tables = [key for key, header in base.tensors.items() if key.endswith(_TABLES) and tuple(header.shape) == shape]
        if len(tables) == 1:
            aliases[name] = tables[0]
    if not aliases:
        return base
    tensors = {**base.tensors, **{name: base.tensors[table] for name, table in aliases.items()}}
    return replace(base, tensors=dict(sorted(tensors.items())), aliases=aliases)


def weight_names(plan: MergePlan, base: Checkpoint) -> dict[str, str]:
    """Return the module per name of a weight of the base that a plan changes.

    Raises:
        ModelError: a module is not in the base model, or a table that is the output head too would be changed.
    """
    names: dict[str, str] = {}
    for module in plan.modules:
        name = find_weight(base, module)
        if name in names:
            raise ModelError(
                f"modules '{names[name]}' and '{module}' must be two weights of the base model, and both are '{name}'. "
                "The adapters name one module in two ways."
            )
        names[name] = module
    for module in plan.modules:
        header = next(source.modules[module] for source in plan.sources if module in source.modules)
        if header.layout.kind == "embedding" and header.into == _tied_rows(base):
            raise ModelError(
                f"module '{module}' is a table of embeddings that the base model {base.path} ties to its output head, "
                "which an adapter leaves alone, so no full checkpoint equals the merge. Use another form."
            )
    return names


def _tied_rows(base: Checkpoint) -> int | None:
    """Return the size of the vocabulary of a base whose output head is its table of embeddings; None for others."""
    if base.aliases:
        return None
    try:
        config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    config = config if isinstance(config, dict) else {}
    heads = [str(name) for name in config.get("architectures") or () if "ForCausalLM" in name or "LMHead" in name]
    rows = config.get("vocab_size")
    return rows if heads and config.get("tie_word_embeddings") is True and isinstance(rows, int) else None


def _rounded(
    report: ModuleReport, base: Checkpoint, name: str, delta: Tensor, dtype: torch.dtype | None
) -> ModuleReport:
    weight = base.load(name)
    return with_rounding(report, rounding_share(weight, delta, weight.dtype if dtype is None else dtype, name=name))


def into_base_report(plan: MergePlan, module: str, merged: MergedModule, dtype: torch.dtype | None) -> ModuleReport:
    """Return the report of a module as `write_into_base` gives it; nothing is written."""
    if plan.checkpoint is None:
        return merged.report
    name = find_weight(plan.checkpoint, module)
    shape = plan.checkpoint.tensors[name].shape
    delta = as_weight(merged.update.dense(), shape, turned=is_turned(plan, module))
    return _rounded(merged.report, plan.checkpoint, name, delta, dtype)


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
            delta = as_weight(found.update.dense(), base.tensors[name].shape, turned=is_turned(plan, module))
            reports[module] = _rounded(found.report, base, name, delta, dtype)
            return delta

        return make

    names = weight_names(plan, base)
    makers = {name: maker(name, module) for name, module in names.items()}
    write_checkpoint(base, folder, makers, dtype=dtype, watch=watch)
    return {module: reports[module] for module in plan.modules}
