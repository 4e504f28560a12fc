"""Destinations of merged modules: an adapter in memory or on disk, a file of deltas, or a full checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ..adapters import AdapterFile, AdapterModule, AdapterState, ModuleHeader, adapter_writer, write_adapter
from ..algebra import Dense, LowRank, Stack, all_finite
from ..checkpoints.adding import rounding_share
from ..checkpoints.writing import CheckpointWriter
from ..errors import OutputError, PlanError
from ..io.checkpoint_files import Checkpoint
from ..io.safetensors_writer import TensorFile, file_order, tensor_file
from ..methods.base import LinearMethod, MergeMethod, is_weighted_sum
from ..progress import SILENT, Advance, Watcher
from .base_tensors import as_weight, is_transposed, weight_names, weight_shape
from .execute import CPU, fitted_methods, merge_module
from .inputs import acting_weights
from .plan import MergePlan
from .report import ModuleReport

DELTA = "delta.safetensors"
_ROWS = 256


class Sink:
    """Receives the merged modules of a plan, one after the other, inside a `with` block.

    Args:
        plan: The plan.
    """

    def __init__(self, plan: MergePlan) -> None:
        self.plan = plan
        self.advance: Advance = lambda _count, _what: None
        self._open = ExitStack()

    @property
    def count(self) -> int:
        """Number of modules or tensors that the progress bar counts."""
        return len(self.plan.modules)

    def progressed(self, path: str) -> None:
        """Advance the progress bar after a module."""
        self.advance(1, path)

    @property
    def order(self) -> Sequence[str]:
        """Paths of the modules in the order in which `add` expects them."""
        return self.plan.modules

    @property
    def file(self) -> AdapterFile | None:
        """The file of the adapter; None if the result is not an adapter."""
        return None

    @property
    def entries(self) -> dict[str, str]:
        """Manifest entries that name the kind of the result, unless it is an adapter."""
        return {}

    def finish(self, folder: Path) -> None:
        """Write the modules that `add` kept in memory."""

    def add(self, path: str, merged: AdapterModule | Dense, report: ModuleReport) -> ModuleReport:
        """Store a merged module, and return its report with the storage loss."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)


def run(plan: MergePlan, sink: Sink, *, device: torch.device = CPU, watch: Watcher = SILENT) -> dict[str, ModuleReport]:
    """Merge every module of a plan into a sink; return a report per module. One module is in memory at a time.

    Raises:
        AdapterMixError: as `merge_module`, and as the sink.
    """
    methods = fitted_methods(plan)
    reports: dict[str, ModuleReport] = {}
    with watch.track("merge", sink.count) as advance, sink:
        sink.advance = advance
        for path in sink.order:
            merged, report = merge_module(plan, path, method=methods[repr(plan.method_at(path))], device=device)
            reports[path] = sink.add(path, merged, report)
            del merged
            sink.progressed(path)
    return {path: reports[path] for path in plan.modules}


def execute(
    plan: MergePlan, *, device: torch.device = CPU, watch: Watcher = SILENT
) -> tuple[AdapterState, dict[str, ModuleReport]]:
    """Return the merged adapter and a report per module.

    Raises:
        PlanError: a result is dense, which an adapter cannot hold; as `merge_module`.
        IncompatibleAdapters: fully trained tensors differ, and the plan does not choose between them.
    """
    sink = AdapterInMemory(plan)
    reports = run(plan, sink, device=device, watch=watch)
    return sink.state, reports


def _factors(path: str, merged: AdapterModule | Dense) -> AdapterModule:
    if isinstance(merged, Dense):
        raise PlanError(
            f"an adapter holds factors, and the merged update of '{path}' is dense.", code="merge.dense-update"
        )
    return merged


class AdapterInMemory(Sink):
    """Collects the modules of an adapter, whose ranks are known once all are merged.

    Args:
        plan: The plan.
        dtype: Storage dtype.
        compact: Keep each module's own rank.

    Raises:
        IncompatibleAdapters: fully trained tensors differ, and the plan does not choose between them.
    """

    def __init__(self, plan: MergePlan, *, dtype: torch.dtype = torch.float32, compact: bool = False) -> None:
        super().__init__(plan)
        self._dtype, self._compact = dtype, compact
        self._saved = plan.merged_saved()  # first, since it fails fast
        self._modules: dict[str, AdapterModule] = {}

    def add(self, path: str, merged: AdapterModule | Dense, report: ModuleReport) -> ModuleReport:
        self._modules[path] = _factors(path, merged)
        return report

    @property
    def state(self) -> AdapterState:
        """The adapter."""
        return AdapterState(meta=self.plan.meta(), modules=self._modules, saved=self._saved)

    @property
    def file(self) -> AdapterFile:
        return AdapterFile.of(self.state, dtype=self._dtype, compact=self._compact)

    def finish(self, folder: Path) -> None:
        write_adapter(folder, self.state, dtype=self._dtype, compact=self._compact)


class AdapterFolder(Sink):
    """Writes the modules of an adapter one by one.

    The header of the file contains the ranks of the result, so they must be known in advance. `can_stream` tests this:
    it holds for sums that concatenate factors.

    Args:
        plan: A plan that `can_stream`.
        folder: An existing folder.
        dtype: Storage dtype.
        compact: Keep each module's own rank.

    Raises:
        IncompatibleAdapters: fully trained tensors differ, and the plan does not choose between them.
    """

    def __init__(self, plan: MergePlan, folder: Path, *, dtype: torch.dtype, compact: bool) -> None:
        super().__init__(plan)
        saved = plan.merged_saved()
        headers = {path: _written_header(plan, path) for path in plan.modules}
        self._file = AdapterFile(meta=plan.meta(), modules=headers, saved=saved, dtype=dtype, compact=compact)
        self._folder = folder

    @property
    def file(self) -> AdapterFile:
        return self._file

    def __enter__(self) -> Self:
        self._writer = self._open.enter_context(adapter_writer(self._folder, self._file))
        return self

    def add(self, path: str, merged: AdapterModule | Dense, report: ModuleReport) -> ModuleReport:
        self._writer.add(path, _factors(path, merged))
        return report


def can_stream(plan: MergePlan) -> bool:
    """Return whether every rank of the result is known from the headers and from which deltas are zero."""
    is_known = is_weighted_sum(plan.method) and type(plan.method).fit is MergeMethod.fit and not plan.method.roles
    is_whole = plan.shape.rank is None and plan.shape.form in (None, "concat") and not plan.method.cuts_to_largest_rank
    has_biases = any(header.bias for source in plan.sources for header in source.modules.values())
    return is_known and is_whole and not has_biases and plan.are_plain and not plan.overrides


def _written_header(plan: MergePlan, module: str) -> ModuleHeader:
    """Return the header of a module that `merge_module` will give."""
    present = [index for index, source in enumerate(plan.sources) if module in source.modules]
    weights = acting_weights(plan, module, {index for index in present if plan.sources[index].is_zero(module)})
    ranks = {index: plan.sources[index].rank(module) for index in present}
    chosen = [index for index in present if weights[index] != 0] or present[:1]
    # The coefficients need no delta (`can_stream`), so any will do.
    nothing = LowRank(b=torch.zeros(1, 1), a=torch.zeros(1, 1))
    stack = Stack.of([nothing] * len(chosen), [weights[index] for index in chosen])
    coefficients = plan.method.coefficients(stack) if isinstance(plan.method, LinearMethod) else stack.weights
    acting = [index for index, factor in zip(chosen, coefficients, strict=True) if factor != 0] or chosen[:1]
    return replace(plan.header(module), rank=sum(ranks[index] for index in acting), scale=1.0)


class DeltaFile(Sink):
    """Writes `delta.safetensors`: one tensor `MODULE.weight` per module, to be added to the base model's weight.

    Args:
        plan: A plan of form "dense".
        folder: An existing folder; None only reports.
        dtype: Storage dtype.
    """

    def __init__(self, plan: MergePlan, folder: Path | None, *, dtype: torch.dtype) -> None:
        super().__init__(plan)
        self._folder, self._dtype = folder, dtype
        self._file: TensorFile | None = None
        self._headers = {f"{path}.weight": (dtype, _delta_shape(plan, path)) for path in plan.modules}

    @property
    def entries(self) -> dict[str, str]:
        return {"artifact": "delta"}

    @property
    def order(self) -> list[str]:
        return [name.removesuffix(".weight") for name in file_order(self._headers)]

    def __enter__(self) -> Self:
        if self._folder is not None:
            opened = tensor_file(self._folder / DELTA, self._headers, {"format": "pt"})
            self._file = self._open.enter_context(opened)
        return self

    def add(self, path: str, merged: AdapterModule | Dense, report: ModuleReport) -> ModuleReport:
        delta = _weight_delta(self.plan, path, merged, self._headers[f"{path}.weight"][1])
        report = _rounded_report(report, path, delta, self._dtype)
        if self._file is not None:
            self._file.write(f"{path}.weight", delta.to(self._dtype))
        return report


def _delta_shape(plan: MergePlan, module: str) -> tuple[int, ...]:
    shape, header = weight_shape(plan, module), plan.header(module)
    if -1 not in shape:
        return shape
    return (header.out, header.into // torch.Size(shape[2:]).numel(), *shape[2:])


def _weight_delta(plan: MergePlan, path: str, merged: AdapterModule | Dense, shape: tuple[int, ...]) -> Tensor:
    update = merged if isinstance(merged, Dense) else merged.update
    return as_weight(update.dense(), shape, transposed=is_transposed(plan, path))


def _rounded_report(report: ModuleReport, module: str, delta: Tensor, dtype: torch.dtype) -> ModuleReport:
    """Return the report of a module with the loss of storing its matrix in a 16-bit dtype.

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
                "it. Choose a wider dtype or smaller weights.",
                code="write.overflow",
            )
        lost.append(float(torch.linalg.vector_norm(rows - stored.to(rows.dtype), dtype=torch.float64)))
    return report.with_rounding(math.hypot(*lost) / report.norm if report.norm > 0 else 0.0)


class FullCheckpoint(Sink):
    """Writes the base model with the merged deltas added.

    Args:
        plan: A plan of form "dense".
        base: The base model.
        folder: An existing folder; None only reports.
        dtype: Storage dtype; None keeps that of each of the base's tensors.

    Raises:
        ModelError: a module of the adapters is not in the base model, or has another shape there.
    """

    def __init__(self, plan: MergePlan, base: Checkpoint, folder: Path | None, *, dtype: torch.dtype | None) -> None:
        super().__init__(plan)
        self._base, self._dtype = base, dtype
        modules = weight_names(plan, base)
        self._names = {path: name for name, path in modules.items()}
        self._writer = None
        if folder is not None:
            self._writer = CheckpointWriter(base, folder, modules.keys(), dtype=dtype, advance=self._written)
        self._order = plan.modules if self._writer is None else [modules[name] for name in self._writer.order]

    @property
    def entries(self) -> dict[str, str]:
        return {"artifact": "checkpoint"}

    @property
    def count(self) -> int:
        return len(self.plan.modules) if self._writer is None else len(self._base.tensors)

    def progressed(self, path: str) -> None:
        if self._writer is None:
            super().progressed(path)

    def _written(self, count: int, name: str) -> None:
        self.advance(count, name)

    @property
    def order(self) -> list[str]:
        return self._order

    def __enter__(self) -> Self:
        if self._writer is not None:
            self._open.enter_context(self._writer)
        return self

    def add(self, path: str, merged: AdapterModule | Dense, report: ModuleReport) -> ModuleReport:
        name = self._names[path]
        weight = self._base.load(name)
        delta = _weight_delta(self.plan, path, merged, self._base.tensors[name].shape)
        stored = weight.dtype if self._dtype is None else self._dtype
        report = report.with_rounding(rounding_share(weight, delta, stored, name=name))
        if self._writer is not None:
            self._writer.add(name, delta)
        return report
