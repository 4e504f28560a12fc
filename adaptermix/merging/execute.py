"""The merge of one module: from the adapters that enter to the merged module and its report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..adapters import AdapterModule
from ..adapters.base_weights import weight_for
from ..adapters.kinds import AdapterKind, kinds_of
from ..algebra import Dense, LowRank, Stack, Update, all_finite, inner, norm, sign_conflict
from ..algebra.storage import cancels
from ..errors import PlanError, code_of
from ..io.checkpoint_files import Checkpoint
from ..methods.base import LinearMethod, MergeMethod, is_weighted_sum
from .inputs import Input, Inputs, inputs_of
from .output_form import Formed
from .overrides import layer_of, stack_of
from .plan import MergePlan
from .report import ModuleReport
from .whole_tensors import merge_biases

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Merge:
    """The merge of one module.

    Args:
        plan: The plan.
        path: Path of the module.
        method: The method, fitted to the whole model where it needs that.
        inputs: The adapters that enter.
        device: Where to compute.
    """

    plan: MergePlan
    path: str
    method: MergeMethod
    inputs: Inputs
    device: torch.device = CPU

    def prepared(self) -> _Merge:
        """Return the merge with updates as the method and the storage dtype need them."""
        adapters = tuple(replace(entry, module=self._prepared(entry)) for entry in self.inputs.adapters)
        return replace(self, inputs=replace(self.inputs, adapters=adapters))

    def _prepared(self, entry: Input) -> AdapterModule:
        update = entry.module.update
        if self.method.takes_factors and self.path in entry.source.modules:
            missing = entry.source.modules[self.path].rank - update.rank
            update = LowRank(b=pad(update.b, (0, missing)), a=pad(update.a, (0, 0, 0, missing)), scale=update.scale)
        if self.plan.shape.dtype is not None and self.method.is_linear:
            # The weights are multiplied into the factors. If factors cancel, float32 rounding would dominate.
            update = update.to(torch.float64)
        return replace(entry.module, update=update)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape [out in] of the update."""
        return self.inputs.adapters[0].module.update.shape

    def stack(
        self, updates: Sequence[Update] | None = None, *, path: str = "", tensor_shape: tuple[int, ...] = ()
    ) -> Stack:
        """Return the updates in the form that methods receive.

        Args:
            updates: One per adapter that enters; default their low-rank updates.
            path: Key of random draws; default the path of the module.
            tensor_shape: Shape of the tensor in the model, where it is not a matrix.
        """
        plan = self.plan
        return Stack(
            updates=tuple(self.inputs.updates if updates is None else updates),
            weights=self.inputs.weights,
            names=tuple(plan.identities[entry.index] for entry in self.inputs.adapters),
            module=path or self.path,
            seed=plan.seed,
            statistics=_statistics(plan, self.inputs, self.path),
            tensor_shape=tensor_shape,
            adapters=tuple(source.name for source in plan.sources),
            indices=tuple(entry.index for entry in self.inputs.adapters),
            block=layer_of(self.path),
            depth=plan.depths.get(stack_of(self.path) or "", 0),
        )

    def deltas(self) -> list[Update]:
        """Return each adapter's delta to the base weight: factors if possible, else a full matrix."""
        return [self._delta(entry) for entry in self.inputs.adapters]

    def _delta(self, entry: Input) -> Update:
        kinds = kinds_of(entry.source.meta) if self.path in entry.source.modules else ()
        return kinds[-1].delta(entry.module, partial(self.weight, kinds[-1])) if kinds else entry.module.update

    def weight(self, kind: AdapterKind) -> Tensor:
        """Read the base weight, which a kind of adapters needs.

        Raises:
            PlanError: the plan has no base model.
        """
        sources = [source for source in self.plan.sources if kind.is_of(source.meta)]
        return weight_for(kind, sources, self.path, self.shape, self.plan.checkpoint)

    def merged(self) -> tuple[AdapterModule | Update, float]:
        """Return the merged module or update, and the share of its norm that the method cut.

        A sum of adapters of one kind is a module of that kind if its file format can store it, else an update.
        """
        inputs, kind = self.inputs, self.plan.sum_kind
        if kind is not None and isinstance(self.method, LinearMethod):
            modules = [entry.module for entry in inputs.adapters]
            return kind.sum(modules, self.method.coefficients(self.stack()), self.weight(kind)), 0.0
        is_empty = all(entry.is_zero for entry in inputs.adapters) or not any(inputs.weights)
        if is_empty and not is_weighted_sum(self.method):
            out, into = self.shape
            return LowRank(b=torch.zeros(out, 1), a=torch.zeros(1, into)), 0.0
        stack = _on(self.stack(self.deltas(), tensor_shape=_kernel_shape(self.plan, self.path)), self.device)
        if isinstance(self.method, LinearMethod):
            pairs = zip(self.method.coefficients(stack), inputs.adapters, strict=True)
            # Zero factors would only raise the rank.
            return stack.combined([0.0 if entry.is_zero else coefficient for coefficient, entry in pairs]), 0.0
        merged, cut = self.method.measured(stack)
        return (merged if inputs.share == 1 else merged * inputs.share), cut

    def bias(self) -> Tensor | None:
        """Merge the biases inside the LoRAs: with the update's coefficients, or else by the method as [out 1]."""
        biases = [entry.module.bias for entry in self.inputs.adapters]
        if all(bias is None for bias in biases):
            return None
        if isinstance(self.method, LinearMethod):
            return merge_biases(biases, self.method.coefficients(self.stack()))
        if self.method.statistics is not None:
            raise PlanError(
                f"method '{self.method.name}' has no statistics for biases (lora_bias). Use another method.",
                code="statistics.bias",
            )
        out = self.shape[0]
        if not any(self.inputs.weights):
            return torch.zeros(out)
        columns = [Dense(w=(torch.zeros(out) if bias is None else bias)[:, None]) for bias in biases]
        return self.method(self.stack(columns, path=f"{self.path}.bias", tensor_shape=(out,))).dense()[:, 0]

    def formed(self, update: Update, length: float) -> Formed:
        """Bring a merged update of a norm into the form of the result."""
        adapters, shape = self.inputs.adapters, self.plan.shape
        ranks = [entry.module.update.rank for entry in adapters if not entry.is_zero]
        ranks = ranks or [adapters[0].module.update.rank]
        largest = max(ranks) if self.plan.method.cuts_to_largest_rank else None
        formed = shape.apply(update, fallback=sum(ranks), largest=largest)
        return shape.rounded(formed, self.path, length)

    def applied_weights(self, update: Update, length: float) -> tuple[float, ...]:
        """Return the weight of every adapter for the report.

        In a weighted sum it is the weight, or the coefficient from the adapter's role. Other methods may normalise or
        ignore weights: for a module with one active adapter, the report has the factor measured on its delta.
        """
        weights = self.inputs.weights_of_all
        if isinstance(self.method, LinearMethod) and is_weighted_sum(self.method):
            return self.method.multipliers(self.stack(), weights)
        acting = [entry for entry in self.inputs.adapters if not entry.is_zero]
        if len(acting) != 1 or length == 0:
            return weights
        index, lone = acting[0].index, acting[0].module.update
        size = norm(lone)
        factor = inner(_to_cpu(update), lone) / size**2 if size > 0 else 0.0
        is_parallel = length**2 - (factor * size) ** 2 <= 1e-6 * length**2
        if not is_parallel or math.isclose(factor, weights[index], rel_tol=1e-5):
            return weights
        applied = float(f"{factor:.6g}")  # the digits that float32 holds
        return tuple(applied if number == index else weight for number, weight in enumerate(weights))


def _path(file: Checkpoint) -> Path:
    """Return the path of a single-file checkpoint; its folder if the file has no tensors."""
    return next((file.path / header.file for header in file.tensors.values()), file.path)


def _statistics(plan: MergePlan, inputs: Inputs, module: str) -> tuple[Tensor, ...]:
    kind = plan.method.statistics
    if kind is None:
        return ()
    out, into = inputs.updates[0].shape
    expected = (out, into) if kind == "out in" else (into, into)
    tensors = []
    for entry in inputs.adapters:
        file = plan.statistics[entry.index]
        name = plan.statistics_name(entry.index, module)
        if name is None or file.tensors[name].shape != expected:
            got = "nothing" if name is None else list(file.tensors[name].shape)
            raise PlanError(
                f"method '{plan.method.name}' needs statistics of shape {list(expected)} for module '{module}' in "
                f"{_path(file)}, found {got}.",
                code="statistics.shape",
            )
        tensor = file.load(name)
        if not (tensor.is_floating_point() and all_finite(tensor)):
            raise PlanError(
                f"statistics must be finite floats, and '{module}' in {_path(file)} holds others.",
                code="statistics.values",
            )
        tensors.append(tensor)
    return tuple(tensors)


def _kernel_shape(plan: MergePlan, module: str) -> tuple[int, ...]:
    """Return the shape of a kernel; empty for a matrix."""
    header = plan.header(module)
    if header.layout.kind != "convolution":
        return ()
    return (header.out, header.into // math.prod(header.layout.kernel), *header.layout.kernel)


def _on(stack: Stack, device: torch.device) -> Stack:
    if device.type == "cpu":
        return stack
    updates = tuple(
        Dense(w=u.w.to(device)) if isinstance(u, Dense) else LowRank(b=u.b.to(device), a=u.a.to(device), scale=u.scale)
        for u in stack.updates
    )
    return replace(stack, updates=updates, statistics=tuple(tensor.to(device) for tensor in stack.statistics))


def _to_cpu(update: Update) -> Update:
    if isinstance(update, Dense):
        return Dense(w=update.w.cpu())
    return LowRank(b=update.b.cpu(), a=update.a.cpu(), scale=update.scale)


def merge_module(
    plan: MergePlan, path: str, *, method: MergeMethod | None = None, device: torch.device = CPU
) -> tuple[AdapterModule | Dense, ModuleReport]:
    """Merge one module; an adapter that lacks it contributes nothing.

    Args:
        plan: The plan.
        path: Path of the module.
        method: The method as fitted to the whole model; default the plan's own.
        device: Where to compute.

    Returns:
        The merged module, on the CPU, and its report. A full matrix where the plan's form is "dense".

    Raises:
        AdapterFormatError: a factor holds NaN or infinity.
        OutputError: a factor overflows the 16-bit dtype of the plan.
        PlanError: the sum overflows, the method refuses the updates, or the base model is needed.
    """
    method = method or plan.method_at(path)
    work = _Merge(plan=plan, path=path, method=method, inputs=inputs_of(plan, path), device=device).prepared()
    inputs = work.inputs
    try:
        merged, cut = work.merged()
        bias = work.bias()
    except ValueError as error:
        raise PlanError(
            f"method '{method.title}', module '{path}': {str(error).rstrip('.')}.", code=code_of(error, "method.failed")
        ) from error
    update = merged.update if isinstance(merged, AdapterModule) else merged
    length = _finite_norm(update, inputs, path)
    if plan.shape.dtype is None and plan.method.is_linear and isinstance(update, LowRank) and cancels(update, length):
        # The factors nearly cancel, so their float32 rounding would dominate the result. Repeat in float64.
        careful = replace(plan, shape=replace(plan.shape, dtype=torch.float32))
        return merge_module(careful, path, method=method, device=device)
    weights = work.applied_weights(update, length)
    formed = work.formed(update, length)
    if length == 0:  # the adapters cancel, so a share of the norm is undefined
        formed = replace(formed, residual=0.0, rounding=0.0)
    if cut:
        formed = replace(formed, residual=math.hypot(cut, formed.residual * math.sqrt(1 - cut**2)))
    result: AdapterModule | Dense
    if isinstance(merged, AdapterModule):
        result, length, formed = _form_of_kind(work, merged, formed)
    else:
        formed = replace(formed, update=_to_cpu(formed.update))
        result = formed.update if isinstance(formed.update, Dense) else AdapterModule(update=formed.update, bias=bias)
    report = ModuleReport(
        rank=None if isinstance(result, Dense) else result.update.rank,
        norm=length,
        residual=formed.residual,
        sign_conflict=sign_conflict(inputs.updates, inputs.weights) if len(inputs.adapters) > 1 else 0.0,
        weights=weights,
        excess=formed.excess,
        rounding=formed.rounding,
    )
    if isinstance(result, AdapterModule):
        result = replace(result, layout=plan.header(path).layout)
    return result, report


def _finite_norm(update: Update, inputs: Inputs, path: str) -> float:
    length = norm(update)
    if not math.isfinite(length):
        raise PlanError(
            f"module '{path}': the merged delta must be finite, and overflows with weights "
            f"{', '.join(f'{weight:g}' for weight in inputs.weights)} and scales "
            f"{', '.join(f'{entry.scale:g}' for entry in inputs.updates)}. "
            "Choose smaller weights, or check the adapters' lora_alpha.",
            code="merge.overflow",
        )
    return length


def _form_of_kind(work: _Merge, merged: AdapterModule, formed: Formed) -> tuple[AdapterModule, float, Formed]:
    """Return a module of the plan's kind in its output form, with norm and losses measured on its delta."""
    kind = work.plan.sum_kind
    if kind is None or not isinstance(formed.update, LowRank):
        raise TypeError("this kind of module must have factors")
    weight = work.weight(kind)
    whole = kind.delta(merged, lambda: weight).dense()
    length = norm(Dense(w=whole))
    if formed.residual == 0:
        return replace(merged, update=formed.update), length, formed
    fitted = kind.with_update(merged, formed.update, weight)
    lost = norm(Dense(w=whole - kind.delta(fitted, lambda: weight).dense()))
    share = lost / length if length > 0 else 0.0
    only_rounding = formed.rounding == formed.residual
    return fitted, length, replace(formed, residual=share, rounding=share if only_rounding else formed.rounding)


def fitted_methods(plan: MergePlan) -> dict[str, MergeMethod]:
    """Return every method of the plan, fitted to the whole model, by its `repr`."""

    def stacks() -> Iterator[Stack]:
        for path in plan.modules:
            merge = _Merge(plan=plan, path=path, method=plan.method, inputs=inputs_of(plan, path))
            yield merge.stack(merge.deltas())

    methods = [plan.method_at(module) for module in plan.modules] if plan.overrides else [plan.method]
    distinct = {repr(method): method for method in methods}
    return {name: method.fit(stacks) for name, method in distinct.items()}
