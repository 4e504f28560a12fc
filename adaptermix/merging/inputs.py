"""Which adapters enter the merge of one module, with which updates and weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from ..adapters import AdapterModule, AdapterSource
from ..adapters.base_weights import load_module
from ..adapters.kinds import kinds_of
from ..algebra import LowRank, norm
from ..errors import PlanError
from ..methods.base import is_weighted_sum
from .plan import MergePlan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Input:
    """One adapter that enters the merge of a module.

    Args:
        index: Index of the adapter in the plan.
        source: The adapter.
        module: Its module; an update of zeros for an adapter that lacks it.
        weight: Its weight.
        is_zero: Whether its delta is absent or exactly zero.
    """

    index: int
    source: AdapterSource
    module: AdapterModule
    weight: float
    is_zero: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs:
    """The adapters that enter the merge of one module.

    Args:
        adapters: These adapters.
        weights_of_all: Weight of every adapter of the plan at the module.
        share: Factor on the result, for zero deltas that a method counts but cannot be given.
    """

    adapters: tuple[Input, ...]
    weights_of_all: tuple[float, ...]
    share: float = 1.0

    @property
    def updates(self) -> list[LowRank]:
        """Their updates."""
        return [entry.module.update for entry in self.adapters]

    @property
    def weights(self) -> tuple[float, ...]:
        """Their weights."""
        return tuple(entry.weight for entry in self.adapters)


def acting_weights(plan: MergePlan, module: str, zero: Collection[int]) -> tuple[float, ...]:
    """Return the weight of every adapter at a module; 0 for one that lacks it or whose delta is zero there.

    Args:
        plan: The plan.
        module: Path of the module.
        zero: Indices of the adapters whose update of the module is zero.
    """
    acts = [
        module in source.modules and (index not in zero or _has_more(source, module))
        for index, source in enumerate(plan.sources)
    ]
    return plan.filled(plan.weights_at(module), acts)


def inputs_of(plan: MergePlan, module: str) -> Inputs:
    """Return the adapters that enter the merge of a module.

    A sum needs those that act. Every other method also gets the deltas that are absent or zero, as zeros: they count in
    a mean. With `fill="one"` an adapter that acts alone is merged alone.
    """
    loaded: dict[int, AdapterModule] = {}
    for index, source in enumerate(plan.sources):
        if module in source.modules:
            loaded[index] = load_module(source, module, plan.checkpoint)
    is_sum = is_weighted_sum(plan.method)
    zero = {
        index
        for index, source in enumerate(plan.sources)
        if index not in loaded or _is_zero(source, module, None if is_sum else loaded[index].update)
    }
    weights = acting_weights(plan, module, zero)
    entering = weights
    is_filled = plan.fill == "one" and len(zero) == len(plan.sources) - 1 and sum(weights) > 0
    if not is_sum and not is_filled:
        entering = plan.weights_at(module)
    counted = [index for index, weight in enumerate(entering) if weight != 0]
    chosen = _measured(plan, module, counted, zero, entering)
    total = sum(entering)
    share = sum(entering[index] for index in chosen) / total if len(chosen) < len(counted) else 1.0
    # Without an active adapter, one of weight 0 gives the shape.
    chosen = chosen or [next(iter(loaded))]
    like = next(iter(loaded.values()))
    # Factors that cancel leave rounding, which would count as entries.
    cancelled = {index for index in zero if index not in loaded or not plan.sources[index].is_zero(module)}
    adapters = tuple(
        Input(
            index=index,
            source=plan.sources[index],
            module=_zeros_like(like) if index in cancelled else loaded[index],
            weight=entering[index],
            is_zero=index in zero,
        )
        for index in chosen
    )
    return Inputs(adapters=adapters, weights_of_all=weights, share=share)


def _zeros_like(module: AdapterModule) -> AdapterModule:
    """Return zeros of the shape and rank of a module; the rank matters to methods that add factors."""
    (out, into), rank = module.update.shape, module.update.rank
    return AdapterModule(update=LowRank(b=torch.zeros(out, rank), a=torch.zeros(rank, into)), layout=module.layout)


def _is_zero(source: AdapterSource, module: str, update: LowRank | None) -> bool:
    """Return whether an adapter adds nothing at a module that it has, row lengths and bias included.

    Args:
        source: The adapter.
        module: Path of the module.
        update: Its update, where factors that cancel are to count as zero too; a sum need not multiply them.
    """
    if _has_more(source, module):
        return False
    # For other kinds than a plain LoRA the factors in the file are not the delta.
    return (not kinds_of(source.meta) and source.is_zero(module)) or (update is not None and norm(update) == 0)


def _measured(
    plan: MergePlan, module: str, counted: list[int], zero: Collection[int], weights: Sequence[float]
) -> list[int]:
    """Return the adapters without those whose delta is zero and that have no statistics of the module.

    Raises:
        PlanError: a weight is negative, so that there is no share of the weights.
    """
    if plan.method.statistics is None:
        return counted
    measured = [index for index in counted if index not in zero or plan.statistics_name(index, module) is not None]
    if len(measured) < len(counted) and min(weights) < 0:
        raise PlanError(
            f"method '{plan.method.title}', module '{module}': weights must be at least 0, got {list(weights)}.",
            code="merge.negative-weight",
        )
    return measured


def _has_more(source: AdapterSource, module: str) -> bool:
    return source.modules[module].bias or source.modules[module].magnitude
