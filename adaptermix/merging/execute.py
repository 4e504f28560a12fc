"""Carry a plan out, module by module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..adapters import LINEAR, AdapterState
from ..adapters.convert import base_weight, dora_delta, dora_row_norms, merge_dora
from ..algebra import Dense, LowRank, Stack, Update, all_finite, inner, norm, sign_conflict
from ..algebra.storage import cancels
from ..errors import PlanError
from ..io.checkpoint_files import Checkpoint
from ..methods.base import LinearMethod, MergeMethod, is_weighted_sum
from ..progress import SILENT, Watcher
from .inputs import Inputs, inputs_of
from .output_form import Formed
from .overrides import layer_of, stack_of
from .plan import MergePlan
from .report import ModuleReport
from .whole_tensors import merge_biases


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MergedModule:
    """What came out for one module.

    Args:
        update: The merged update.
        report: Its fidelity.
        bias: What the merged bias inside the LoRA adds to the output, if any adapter has one.
        magnitude: Row lengths, where the result is a DoRA.
    """

    update: Update
    report: ModuleReport
    bias: Tensor | None = None
    magnitude: Tensor | None = None


def _path(file: Checkpoint) -> Path:
    """Return the path of a checkpoint that is one file; its folder where the file holds nothing."""
    return next((file.path / header.file for header in file.tensors.values()), file.path)


def _prepared(plan: MergePlan, inputs: Inputs, module: str) -> Iterator[LowRank]:
    """Yield the updates as the method and the storage dtype need them."""
    for source, update in zip(inputs.sources, inputs.updates, strict=True):
        found = update
        if plan.method.takes_factors and module in source.modules:
            missing = source.modules[module].rank - update.rank
            found = LowRank(b=pad(found.b, (0, missing)), a=pad(found.a, (0, 0, 0, missing)), scale=found.scale)
        if plan.shape.dtype is not None and plan.method.is_linear:
            # The weights are multiplied into the factors, and where these cancel the rounding in float32 would show.
            found = found.to(torch.float64)
        yield found


def _statistics(plan: MergePlan, inputs: Inputs, module: str) -> tuple[Tensor, ...]:
    kind = plan.method.statistics
    if kind is None:
        return ()
    out, into = inputs.updates[0].shape
    wanted = (out, into) if kind == "out in" else (into, into)
    found = []
    for place in inputs.places:
        file = plan.statistics[place]
        name = plan.statistics_name(place, module)
        if name is None or file.tensors[name].shape != wanted:
            got = "nothing" if name is None else list(file.tensors[name].shape)
            raise PlanError(
                f"method '{plan.method.name}' needs statistics of shape {list(wanted)} for module '{module}' in "
                f"{_path(file)}, found {got}."
            )
        tensor = file.load(name)
        if not (tensor.is_floating_point() and all_finite(tensor)):
            raise PlanError(f"statistics must be finite floats, and '{module}' in {_path(file)} holds others.")
        found.append(tensor)
    return tuple(found)


def _stack(
    plan: MergePlan,
    inputs: Inputs,
    module: str,
    updates: Iterable[Update],
    *,
    tensor_shape: tuple[int, ...] = (),
) -> Stack:
    return Stack(
        updates=tuple(updates),
        weights=inputs.weights,
        names=tuple(plan.identities[place] for place in inputs.places),
        module=module,
        seed=plan.seed,
        statistics=_statistics(plan, inputs, module),
        tensor_shape=tensor_shape,
        adapters=tuple(source.name for source in plan.sources),
        places=inputs.places,
        block=layer_of(module),
        depth=plan.depths.get(stack_of(module) or "", 0),
    )


def _tensor_shape(plan: MergePlan, module: str) -> tuple[int, ...]:
    """Return the shape of a kernel; empty for a matrix."""
    header = next(source.modules[module] for source in plan.sources if module in source.modules)
    if header.layout.kind != "convolution":
        return ()
    return (header.out, header.into // math.prod(header.layout.kernel), *header.layout.kernel)


def _base_weight(plan: MergePlan, module: str, shape: tuple[int, int]) -> Tensor:
    if plan.checkpoint is None:
        names = ", ".join(f"'{source.name}'" for source in plan.sources if source.meta.dora)
        raise PlanError(
            f"a DoRA's delta depends on the base weights, so {names} needs the base model, and none is given. "
            "Pass --base MODEL."
        )
    return base_weight(plan.checkpoint, module, shape, fan_in_fan_out=plan.sources[0].meta.fan_in_fan_out)


def _dense_inputs(plan: MergePlan, inputs: Inputs, module: str) -> Iterator[Update]:
    """Yield the updates, with those of DoRAs as the dense deltas that they are."""
    for source, update in zip(inputs.sources, inputs.updates, strict=True):
        magnitude = source.magnitude(module) if module in source.modules else None
        if magnitude is None:
            yield update
        else:
            yield Dense(w=dora_delta(_base_weight(plan, module, update.shape), update, magnitude))


def _on(stack: Stack, device: torch.device) -> Stack:
    if device.type == "cpu":
        return stack
    moved: list[Update] = [
        Dense(w=u.w.to(device)) if isinstance(u, Dense) else LowRank(b=u.b.to(device), a=u.a.to(device), scale=u.scale)
        for u in stack.updates
    ]
    return replace(stack, updates=tuple(moved), statistics=tuple(found.to(device) for found in stack.statistics))


def _merge_bias(plan: MergePlan, method: MergeMethod, inputs: Inputs, module: str) -> Tensor | None:
    """Merge the biases inside the LoRAs: with the update's coefficients, or else by the method as [out 1] updates."""
    biases = [source.bias(module) if module in source.modules else None for source in inputs.sources]
    if all(bias is None for bias in biases):
        return None
    if isinstance(method, LinearMethod):
        stack = _stack(plan, inputs, module, inputs.updates)
        return merge_biases(biases, method.coefficients(stack))
    if method.statistics is not None:
        raise PlanError(f"method '{method.name}' has no statistics for biases (lora_bias). Use another method.")
    out = inputs.updates[0].shape[0]
    if not any(inputs.weights):
        return torch.zeros(out)
    columns = [Dense(w=(torch.zeros(out) if bias is None else bias)[:, None]) for bias in biases]
    merged = method(_stack(plan, inputs, f"{module}.bias", columns, tensor_shape=(out,)))
    return merged.dense()[:, 0]


def _shaped(plan: MergePlan, inputs: Inputs, merged: Update) -> Formed:
    pairs = zip(inputs.updates, inputs.zero, strict=True)
    own = [update.rank for update, zero in pairs if not zero] or [inputs.updates[0].rank]
    largest = max(own) if plan.method.cuts_to_largest_rank else None
    return plan.shape.apply(merged, fallback=sum(own), largest=largest)


def _merged(
    plan: MergePlan, method: MergeMethod, inputs: Inputs, module: str, device: torch.device
) -> tuple[Update, Tensor | None, float]:
    """Return the merged update, its magnitude where the result is a DoRA, and what share the method itself cut."""
    if plan.gives_dora and isinstance(method, LinearMethod):
        stack = _stack(plan, inputs, module, inputs.updates)
        weight = _base_weight(plan, module, stack.shape)
        magnitudes = [source.magnitude(module) for source in inputs.sources]
        return *merge_dora(weight, inputs.updates, magnitudes, method.coefficients(stack)), 0.0
    if not is_weighted_sum(method) and (all(inputs.zero) or not any(inputs.weights)):
        out, into = inputs.updates[0].shape
        return LowRank(b=torch.zeros(out, 1), a=torch.zeros(1, into)), None, 0.0
    updates = _dense_inputs(plan, inputs, module)
    stack = _on(_stack(plan, inputs, module, updates, tensor_shape=_tensor_shape(plan, module)), device)
    if isinstance(method, LinearMethod):
        pairs = zip(method.coefficients(stack), inputs.zero, strict=True)
        # Zero factors would only raise the rank.
        return stack.combined([0.0 if zero else coefficient for coefficient, zero in pairs]), None, 0.0
    merged, cut = method.measured(stack)
    return (merged if inputs.share == 1 else merged * inputs.share), None, cut


def merge_module(
    plan: MergePlan, module: str, *, method: MergeMethod | None = None, device: torch.device | None = None
) -> MergedModule:
    """Merge one module; an adapter that lacks it contributes nothing.

    Args:
        plan: The plan.
        module: Path of the module.
        method: The method as fitted to the whole model; default the plan's own.
        device: Where to compute; default the CPU.

    Raises:
        AdapterFormatError: a factor holds NaN or infinity.
        OutputError: a factor overflows the 16-bit dtype of the plan.
        PlanError: the sum overflows, the method refuses the updates, or the base model is needed.
    """
    inputs, weights = inputs_of(plan, module)
    inputs = replace(inputs, updates=tuple(_prepared(plan, inputs, module)))
    method = method or plan.method_at(module)
    try:
        merged, magnitude, cut = _merged(plan, method, inputs, module, device or torch.device("cpu"))
        bias = _merge_bias(plan, method, inputs, module)
    except ValueError as error:
        raise PlanError(f"method '{method.title}', module '{module}': {str(error).rstrip('.')}.") from error
    length = norm(merged)
    if not math.isfinite(length):
        raise PlanError(
            f"module '{module}': the merged delta must be finite, and overflows with weights "
            f"{', '.join(f'{weight:g}' for weight in inputs.weights)} and scales "
            f"{', '.join(f'{update.scale:g}' for update in inputs.updates)}. "
            "Choose smaller weights, or check the adapters' lora_alpha."
        )
    if plan.shape.dtype is None and plan.method.is_linear and isinstance(merged, LowRank) and cancels(merged, length):
        # The rounding of float32 factors would show in what is left: once more, in float64.
        careful = replace(plan, shape=replace(plan.shape, dtype=torch.float32))
        return merge_module(careful, module, method=method, device=device)
    whole = length
    formed = plan.shape.rounded(_shaped(plan, inputs, merged), module, length)
    if length == 0:  # adapters that cancel leave rounding, of which no share is lost
        formed = replace(formed, residual=0.0, rounding=0.0)
    if cut:
        formed = replace(formed, residual=math.hypot(cut, formed.residual * math.sqrt(1 - cut**2)))
    if magnitude is not None and isinstance(merged, LowRank):
        length, formed, magnitude = _judge_dora(plan, module, merged, formed, magnitude)
    conflict = sign_conflict(inputs.updates, inputs.weights) if len(inputs.updates) > 1 else 0.0
    report = ModuleReport(
        rank=formed.update.rank if isinstance(formed.update, LowRank) else None,
        norm=length,
        residual=formed.residual,
        sign_conflict=conflict,
        weights=_reported(plan, method, inputs, module, weights) or _applied(inputs, merged, whole, weights),
        excess=formed.excess,
        rounding=formed.rounding,
    )
    return MergedModule(update=_to_cpu(formed.update), report=report, bias=bias, magnitude=magnitude)


def _reported(
    plan: MergePlan, method: MergeMethod, inputs: Inputs, module: str, weights: tuple[float, ...]
) -> tuple[float, ...]:
    """Return the weight of every adapter in a weighted sum, or the coefficient that its role gives it; else nothing."""
    if not isinstance(method, LinearMethod) or not is_weighted_sum(method):
        return ()
    return method.multipliers(_stack(plan, inputs, module, inputs.updates), weights)


def _applied(inputs: Inputs, merged: Update, length: float, weights: tuple[float, ...]) -> tuple[float, ...]:
    """Return the weights; of an adapter that acts alone, the factor that its delta got.

    It is its weight, but for methods that divide by the weights of those that survive, or take none.
    """
    acting = [number for number, zero in enumerate(inputs.zero) if not zero]
    if len(acting) != 1 or length == 0:
        return weights
    place, update = inputs.places[acting[0]], inputs.updates[acting[0]]
    size = norm(update)
    factor = inner(_to_cpu(merged), update) / size**2 if size > 0 else 0.0
    is_parallel = length**2 - (factor * size) ** 2 <= 1e-6 * length**2
    if not is_parallel or math.isclose(factor, weights[place], rel_tol=1e-5):
        return weights
    applied = float(f"{factor:.6g}")  # the digits that float32 holds
    return tuple(applied if number == place else weight for number, weight in enumerate(weights))


def _judge_dora(
    plan: MergePlan, module: str, merged: LowRank, formed: Formed, magnitude: Tensor
) -> tuple[float, Formed, Tensor]:
    """Return norm, form and magnitude of a DoRA, judged by its delta on the base and not by its factors alone.

    Where the factors are truncated, the magnitudes are made anew, so that each row keeps its gain.
    """
    weight = _base_weight(plan, module, merged.shape)
    whole = dora_delta(weight, merged, magnitude)
    length = norm(Dense(w=whole))
    if formed.residual == 0 or not isinstance(formed.update, LowRank):
        return length, formed, magnitude
    gains = magnitude / dora_row_norms(weight, merged)
    magnitude = (gains * dora_row_norms(weight, formed.update)).to(magnitude.dtype)
    lost = norm(Dense(w=whole - dora_delta(weight, formed.update, magnitude)))
    share = lost / length if length > 0 else 0.0
    only_rounding = formed.rounding == formed.residual
    return length, replace(formed, residual=share, rounding=share if only_rounding else formed.rounding), magnitude


def _to_cpu(update: Update) -> Update:
    if isinstance(update, Dense):
        return Dense(w=update.w.cpu())
    return LowRank(b=update.b.cpu(), a=update.a.cpu(), scale=update.scale)


def fitted_methods(plan: MergePlan) -> dict[str, MergeMethod]:
    """Return every method of the plan with what it must know of the whole model, by its representation."""

    def stacks() -> Iterator[Stack]:
        for module in plan.modules:
            inputs, _ = inputs_of(plan, module)
            yield _stack(plan, inputs, module, _dense_inputs(plan, inputs, module))

    methods = [plan.method_at(module) for module in plan.modules] if plan.overrides else [plan.method]
    distinct = {repr(method): method for method in methods}
    return {name: method.fit(stacks) for name, method in distinct.items()}


def merged_modules(
    plan: MergePlan, *, device: torch.device | None = None, watch: Watcher = SILENT
) -> Iterator[tuple[str, MergedModule]]:
    """Merge the modules one after the other, and yield each with its path; nothing is kept."""
    fitted = fitted_methods(plan)
    with watch.track("merge", len(plan.modules)) as advance:
        for module in plan.modules:
            method = fitted[repr(plan.method_at(module))]
            yield module, merge_module(plan, module, method=method, device=device)
            advance(1, module)


def execute(
    plan: MergePlan, *, device: torch.device | None = None, watch: Watcher = SILENT
) -> tuple[AdapterState, dict[str, ModuleReport]]:
    """Return the merged adapter and a report per module.

    Raises:
        PlanError: a result is dense, which an adapter cannot hold; as `merge_module`.
        IncompatibleAdapters: fully trained tensors differ, and the plan does not say which to take.
    """
    saved = plan.merged_saved()  # first, since it fails fast
    updates: dict[str, LowRank] = {}
    reports, biases, magnitudes = {}, {}, {}
    for module, merged in merged_modules(plan, device=device, watch=watch):
        if not isinstance(merged.update, LowRank):
            raise PlanError(f"an adapter holds factors, and the merged update of '{module}' is dense.")
        updates[module], reports[module] = merged.update, merged.report
        if merged.bias is not None:
            biases[module] = merged.bias
        if merged.magnitude is not None:
            magnitudes[module] = merged.magnitude
    layouts = {
        module: header.layout
        for source in plan.sources
        for module, header in source.modules.items()
        if header.layout != LINEAR
    }
    state = AdapterState(
        meta=plan.meta(), updates=updates, biases=biases, magnitudes=magnitudes, saved=saved, layouts=layouts
    )
    return state, reports
