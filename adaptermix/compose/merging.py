"""Adapter folders in, one adapter folder out; no base model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import manifest
from ..adapters import AdapterSource, open_adapter
from ..errors import PlanError
from ..files import check_not_input, check_output
from ..methods.base import build
from ..output import write_output
from .execute import execute
from .plan import MergePlan, check, resolve_weights
from .report import MergeReport

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _open(adapters: Sequence[str | Path]) -> tuple[AdapterSource, ...]:
    if not adapters:
        raise PlanError("at least one adapter is needed to merge, got none.")
    return tuple(open_adapter(path) for path in adapters)


def merge(
    adapters: Sequence[str | Path],
    *,
    weights: Sequence[float],
    out: str | Path | None = None,
    method: str = "exact",
    rank: int | None = None,
    options: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> MergeReport:
    r"""Merge PEFT LoRA folders into one, in delta space: $\Delta = \sum_i w_i s_i B_i A_i$ for the default method.

    Args:
        adapters: Adapter folders. Rank, alpha, rsLoRA and target modules may differ.
        weights: One per adapter; a single weight w for two adapters means w and 1 - w. Not normalised.
        out: Folder to write; None computes and reports only.
        method: Name of a merge method.
        rank: Recompress each module to this rank (best approximation); None keeps the method's own.
        options: Hyper-parameters of the method.
        dtype: Storage dtype of the factors; arithmetic is in float32 or wider, SVDs in float64.
        allow_base_mismatch: Merge adapters although they name different base models.
        overwrite: Replace an existing output folder.
        dry_run: Do everything but write.

    Returns:
        The report: rank, norm, residual and sign conflict per module.

    Raises:
        AdapterFormatError: an adapter is damaged or holds what would be lost.
        IncompatibleAdapters: the adapters do not belong to one base model.
        PlanError: a wrong count of weights, an unknown method or option.
        OutputError: the output folder exists or cannot be written.
    """
    if dtype not in _DTYPES:
        raise PlanError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    if out is not None:
        check_output(Path(out), overwrite=overwrite)
        check_not_input(Path(out), adapters)
    sources = _open(adapters)
    plan = MergePlan(
        sources=sources,
        weights=resolve_weights([source.name for source in sources], weights),
        method=build(method, options or {}),
        rank=rank,
        options=dict(options or {}),
    )
    check(sources, allow_base_mismatch=allow_base_mismatch)
    settings = {"rank": rank, "dtype": dtype, "allow_base_mismatch": allow_base_mismatch, "options": plan.options}
    state, modules = execute(plan)
    report = MergeReport(out=None if out is None else Path(out), method=method, weights=plan.weights, modules=modules)
    if out is not None and not dry_run:
        write_output(Path(out), state, _document(plan, report, settings), dtype=_DTYPES[dtype], overwrite=overwrite)
    return report


def _document(plan: MergePlan, report: MergeReport, settings: Mapping[str, Any]) -> dict[str, Any]:
    return manifest.manifest(
        "merge",
        plan={"method": report.method, "weights": list(plan.weights), **settings},
        base=manifest.base_entry([source.meta for source in plan.sources]),
        inputs=[manifest.input_entry(s, w) for s, w in zip(plan.sources, plan.weights, strict=True)],
        fidelity=report.fidelity(),
        **manifest.inherit(plan.sources),
    )
