"""Carry a plan out, module by module."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..adapters import LINEAR, AdapterSource, AdapterState
from ..adapters.convert import base_weight, dora_delta, dora_row_norms, load_delta, merge_dora
from ..adapters.paths import in_model
from ..algebra import Dense, LowRank, Stack, Update, all_finite, norm, sign_conflict
from ..algebra.storage import cancels
from ..checkpoints import Checkpoint
from ..errors import PlanError
from ..methods.base import LinearMethod, MergeMethod, is_weighted_sum
from ..progress import SILENT, Watcher
from .extras import merge_biases
from .forms import Formed
from .plan import MergePlan
from .report import ModuleReport


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Inputs:
    """The adapters that act on one module."""

    places: tuple[int, ...]
    sources: tuple[AdapterSource, ...]
    updates: tuple[LowRank, ...]
    weights: tuple[float, ...]


def acting_weights(plan: MergePlan, module: str, zero: Collection[int]) -> tuple[float, ...]:
    """Return the weight of every adapter at a module; 0 for one that lacks it or whose delta is zero there.

    Args:
        plan: The plan.
        module: Path of the module.
        zero: Places of the adapters whose update of the module is zero.
    """
    acts = [
        module in source.modules and (place not in zero or _has_more(source, module))
        for place, source in enumerate(plan.sources)
    ]
    return plan.filled(plan.weights_at(module), acts)


def _inputs(plan: MergePlan, module: str) -> tuple[_Inputs, tuple[float, ...]]:
    """Return the adapters that act on a module, and the weight of every adapter of the plan there."""
    found = {
        place: load_delta(source, module, plan.checkpoint)
        for place, source in enumerate(plan.sources)
        if module in source.modules
    }
    # Factors that began from a part of the base are not the delta.
    zero = {p for p in found if plan.sources[p].meta.initial is None and plan.sources[p].is_zero(module)}
    weights = acting_weights(plan, module, zero)
    if zero != set(found) and plan.fill == "weight" and not is_weighted_sum(plan.method):
        # A zero delta adds nothing to a sum, but counts in a mean.
        weights = acting_weights(plan, module, ())
    chosen = [place for place in found if weights[place] != 0]
    # Nothing acts: any one of them, at weight 0, gives the shape.
    chosen = chosen or [next(iter(found))]
    return (
        _Inputs(
            places=tuple(chosen),
            sources=tuple(plan.sources[place] for place in chosen),
            updates=tuple(found[place] for place in chosen),
            weights=tuple(weights[place] for place in chosen),
        ),
        weights,
    )


def _has_more(source: AdapterSource, module: str) -> bool:
    return source.modules[module].bias or source.modules[module].magnitude


def _path(file: Checkpoint) -> Path:
    """Return the path of a checkpoint that is one file; its folder where the file holds nothing."""
    return next((file.path / header.file for header in file.tensors.values()), file.path)


def _prepared(plan: MergePlan, inputs: _Inputs, module: str) -> Iterator[LowRank]:
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


def _statistics(plan: MergePlan, inputs: _Inputs, module: str) -> tuple[Tensor, ...]:
    kind = plan.method.statistics
    if kind is None:
        return ()
    out, into = inputs.updates[0].shape
    wanted = (out, into) if kind == "out in" else (into, into)
    found = []
    for place in inputs.places:
        file = plan.statistics[place]
        # A statistics file has the paths of the class that its adapter was trained in.
        name = module if module in file.tensors else in_model([module], file.tensors)[module]
        if name not in file.tensors or file.tensors[name].shape != wanted:
            got = list(file.tensors[name].shape) if name in file.tensors else "nothing"
            raise PlanError(
                f"method '{plan.method.name}' needs statistics of shape {list(wanted)} for module '{module}' in "
                f"{_path(file)}, found {got}."
            )
        tensor = file.load(name)
        if not (tensor.is_floating_point() and all_finite(tensor)):
            raise PlanError(f"statistics must be finite floats, and '{module}' in {_path(file)} holds others.")
        found.append(tensor)
    return tuple(found)


def _stack(plan: MergePlan, inputs: _Inputs, module: str, updates: Iterable[Update]) -> Stack:
    return Stack(
        updates=tuple(updates),
        weights=inputs.weights,
        names=tuple(plan.identities[place] for place in inputs.places),
        module=module,
        seed=plan.seed,
        statistics=_statistics(plan, inputs, module),
    )


def _base_weight(plan: MergePlan, module: str, shape: tuple[int, int]) -> Tensor:
    if plan.checkpoint is None:
        names = ", ".join(f"'{source.name}'" for source in plan.sources if source.meta.dora)
        raise PlanError(
            f"a DoRA's delta depends on the base weights, so {names} needs the base model, and none is given. "
            "Pass --base MODEL."
        )
    return base_weight(plan.checkpoint, module, shape, fan_in_fan_out=plan.sources[0].meta.fan_in_fan_out)


def _dense_inputs(plan: MergePlan, inputs: _Inputs, module: str) -> Iterator[Update]:
    """Yield the updates, with those of DoRAs as the dense deltas that they are."""
    for source, update in zip(inputs.sources, inputs.updates, strict=True):
        magnitude = source.magnitude(module)
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


def _merge_bias(plan: MergePlan, method: MergeMethod, inputs: _Inputs, module: str) -> Tensor | None:
    """Merge the biases inside the LoRAs: with the update's coefficients, or else by the method as [out 1] updates."""
    biases = [source.bias(module) for source in inputs.sources]
    if all(bias is None for bias in biases):
        return None
    if isinstance(method, LinearMethod):
        stack = _stack(plan, inputs, module, inputs.updates)
        return merge_biases(biases, method.coefficients(stack))
    if method.statistics is not None:
        raise PlanError(f"method '{method.name}' has no statistics for biases (lora_bias). Use another method.")
    out = inputs.updates[0].shape[0]
    columns = [Dense(w=(torch.zeros(out) if bias is None else bias)[:, None]) for bias in biases]
    merged = method(_stack(plan, inputs, f"{module}.bias", columns))
    return merged.dense()[:, 0]


def _shaped(plan: MergePlan, inputs: _Inputs, merged: Update) -> Formed:
    own = [update.rank for update in inputs.updates]
    largest = max(own) if plan.method.cuts_to_largest_rank else None
    return plan.shape.apply(merged, fallback=sum(own), largest=largest)


def _merged(
    plan: MergePlan, method: MergeMethod, inputs: _Inputs, module: str, device: torch.device
) -> tuple[Update, Tensor | None]:
    """Return the merged update, and its magnitude where the result is a DoRA."""
    if plan.gives_dora and isinstance(method, LinearMethod):
        stack = _stack(plan, inputs, module, inputs.updates)
        weight = _base_weight(plan, module, stack.shape)
        magnitudes = [source.magnitude(module) for source in inputs.sources]
        return merge_dora(weight, inputs.updates, magnitudes, method.coefficients(stack))
    if not is_weighted_sum(method) and not any(inputs.weights):
        out, into = inputs.updates[0].shape
        return LowRank(b=torch.zeros(out, 1), a=torch.zeros(1, into)), None
    merged = method(_on(_stack(plan, inputs, module, _dense_inputs(plan, inputs, module)), device))
    return merged, None


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
    inputs, weights = _inputs(plan, module)
    inputs = replace(inputs, updates=tuple(_prepared(plan, inputs, module)))
    method = method or plan.method_at(module)
    try:
        merged, magnitude = _merged(plan, method, inputs, module, device or torch.device("cpu"))
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
    formed = _shaped(plan, inputs, merged)
    formed = plan.shape.rounded(formed, module, length)
    if magnitude is not None and isinstance(merged, LowRank):
        length, formed, magnitude = _judge_dora(plan, module, merged, formed, magnitude)
    conflict = 0.0
    if len(inputs.updates) > 1:
        conflict = sign_conflict([u * weight for u, weight in zip(inputs.updates, inputs.weights, strict=True)])
    report = ModuleReport(
        rank=formed.update.rank if isinstance(formed.update, LowRank) else None,
        norm=length,
        residual=formed.residual,
        sign_conflict=conflict,
        weights=weights,
        excess=formed.excess,
        rounding=formed.rounding,
    )
    return MergedModule(update=_to_cpu(formed.update), report=report, bias=bias, magnitude=magnitude)


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
            inputs, _ = _inputs(plan, module)
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
