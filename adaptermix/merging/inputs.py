"""Which adapters enter the merge of one module, with which updates and weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from ..adapters import AdapterSource
from ..adapters.convert import load_delta
from ..algebra import LowRank, norm
from ..errors import PlanError
from ..methods.base import is_weighted_sum
from .plan import MergePlan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs:
    """The adapters that enter the merge of one module.

    Args:
        places: Index of each adapter in the plan.
        sources: The adapters.
        updates: Their updates; zeros for an adapter that lacks the module.
        weights: Their weights.
        zero: Whether the delta is absent or exactly zero.
        share: Factor on the result, for zero deltas that a method counts but cannot be given.
    """

    places: tuple[int, ...]
    sources: tuple[AdapterSource, ...]
    updates: tuple[LowRank, ...]
    weights: tuple[float, ...]
    zero: tuple[bool, ...]
    share: float = 1.0


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


def inputs_of(plan: MergePlan, module: str) -> tuple[Inputs, tuple[float, ...]]:
    """Return the adapters that enter the merge of a module, and the weight of every adapter of the plan there.

    A sum needs those that act. Every other method also gets the deltas that are absent or zero, as zeros: they count in
    a mean. With `fill="one"` an adapter that acts alone is merged alone.
    """
    found = {
        place: load_delta(source, module, plan.checkpoint)
        for place, source in enumerate(plan.sources)
        if module in source.modules
    }
    is_sum = is_weighted_sum(plan.method)
    zero = {
        place
        for place, source in enumerate(plan.sources)
        if place not in found or _is_zero(source, module, None if is_sum else found[place])
    }
    weights = acting_weights(plan, module, zero)
    entering = weights
    is_filled = plan.fill == "one" and len(zero) == len(plan.sources) - 1 and sum(weights) > 0
    if not is_sum and not is_filled:
        entering = plan.weights_at(module)
    counted = [place for place, weight in enumerate(entering) if weight != 0]
    chosen = _measured(plan, module, counted, zero, entering)
    total = sum(entering)
    share = sum(entering[place] for place in chosen) / total if len(chosen) < len(counted) else 1.0
    # Without an active adapter, one of weight 0 gives the shape.
    chosen = chosen or [next(iter(found))]
    like = next(iter(found.values()))
    # Factors that cancel leave rounding, which would count as entries.
    nothing = {p for p in zero if p not in found or not plan.sources[p].is_zero(module)}
    return (
        Inputs(
            places=tuple(chosen),
            sources=tuple(plan.sources[place] for place in chosen),
            updates=tuple(_nothing(like) if place in nothing else found[place] for place in chosen),
            weights=tuple(entering[place] for place in chosen),
            zero=tuple(place in zero for place in chosen),
            share=share,
        ),
        weights,
    )


def _nothing(like: LowRank) -> LowRank:
    """Return a zero update of the shape and rank of another; the rank matters to methods that add factors."""
    return LowRank(b=torch.zeros(like.shape[0], like.rank), a=torch.zeros(like.rank, like.shape[1]))


def _is_zero(source: AdapterSource, module: str, update: LowRank | None) -> bool:
    """Return whether an adapter adds nothing at a module that it has, row lengths and bias included.

    Args:
        source: The adapter.
        module: Path of the module.
        update: Its update, where factors that cancel are to count as zero too; a sum need not multiply them.
    """
    if _has_more(source, module):
        return False
    # Factors that began from a part of the base are not the delta.
    return (source.meta.initial is None and source.is_zero(module)) or (update is not None and norm(update) == 0)


def _measured(
    plan: MergePlan, module: str, counted: list[int], zero: Collection[int], weights: Sequence[float]
) -> list[int]:
    """Return the adapters without those whose delta is zero and that have no statistics of the module.

    Raises:
        PlanError: a weight is negative, so that there is no share of the weights.
    """
    if plan.method.statistics is None:
        return counted
    kept = [place for place in counted if place not in zero or plan.statistics_name(place, module) is not None]
    if len(kept) < len(counted) and min(weights) < 0:
        raise PlanError(
            f"method '{plan.method.title}', module '{module}': weights must be at least 0, got {list(weights)}."
        )
    return kept


def _has_more(source: AdapterSource, module: str) -> bool:
    return source.modules[module].bias or source.modules[module].magnitude
