"""A merge that is written while it is computed: one module in memory at a time.

Possible where the ranks of the result are known before anything is computed, since they stand in the file's header:
sums of factors laid side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..adapters import LINEAR, AdapterState
from ..algebra import LowRank, Stack
from ..errors import PlanError
from ..methods.base import LinearMethod, MergeMethod, is_weighted_sum
from ..progress import Advance
from .execute import merge_module
from .inputs import acting_weights
from .plan import MergePlan
from .report import ModuleReport


def can_stream(plan: MergePlan) -> bool:
    """Return whether every rank of the result is known from the headers and from which deltas are zero."""
    known = is_weighted_sum(plan.method) and type(plan.method).fit is MergeMethod.fit and not plan.method.roles
    whole = plan.shape.rank is None and plan.shape.form in (None, "concat") and not plan.method.cuts_to_largest_rank
    more = any(header.bias or header.magnitude for source in plan.sources for header in source.modules.values())
    plain = all(source.meta.initial is None for source in plan.sources)
    return known and whole and plain and not more and not plan.overrides


@dataclass(slots=True)
class _Latest:
    """Merges modules and remembers the last one, whose two factors are asked for one after the other."""

    plan: MergePlan
    reports: dict[str, ModuleReport]
    advance: Advance
    module: str = ""
    update: LowRank | None = None

    def of(self, module: str) -> LowRank:
        """Return the merged update of a module."""
        if self.update is None or module != self.module:
            self.update = None  # before the next one is made
            merged = merge_module(self.plan, module)
            if not isinstance(merged.update, LowRank):
                raise PlanError(f"an adapter holds factors, and the merged update of '{module}' is dense.")
            self.module, self.update, self.reports[module] = module, merged.update, merged.report
            self.advance(1, module)
        return self.update


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    """Looks like a `LowRank`, and is computed when a factor is asked for."""

    rank: int
    shape: tuple[int, int]
    make: Callable[[], LowRank]
    scale: float = 1.0

    @property
    def a(self) -> Tensor:
        """Right factor."""
        update = self.make()
        return update.a if update.scale == 1 else update.a * update.scale

    @property
    def b(self) -> Tensor:
        """Left factor."""
        return self.make().b


def _rank(plan: MergePlan, module: str) -> int:
    """Return the rank that `merge_module` will give."""
    present = [place for place, source in enumerate(plan.sources) if module in source.modules]
    weights = acting_weights(plan, module, {place for place in present if plan.sources[place].is_zero(module)})
    ranks = {place: plan.sources[place].rank(module) for place in present}
    chosen = [place for place in present if weights[place] != 0] or present[:1]
    # The coefficients need no delta (`can_stream`), so any will do.
    nothing = LowRank(b=torch.zeros(1, 1), a=torch.zeros(1, 1))
    stack = Stack.of([nothing] * len(chosen), [weights[place] for place in chosen])
    coefficients = plan.method.coefficients(stack) if isinstance(plan.method, LinearMethod) else stack.weights
    kept = [place for place, found in zip(chosen, coefficients, strict=True) if found != 0] or chosen[:1]
    return sum(ranks[place] for place in kept)


def stream(plan: MergePlan, reports: dict[str, ModuleReport], advance: Advance) -> AdapterState:
    """Return the merged adapter with updates that are computed when they are written, and fill in `reports` then.

    Args:
        plan: A plan that `can_stream`.
        reports: Receives the report of each module as it is computed.
        advance: Called after each module.

    Raises:
        IncompatibleAdapters: fully trained tensors differ, and the plan does not say which to take.
    """
    saved = plan.merged_saved()
    headers = {module: header for source in plan.sources for module, header in source.modules.items()}
    latest = _Latest(plan, reports, advance)

    def maker(module: str) -> Callable[[], LowRank]:
        return lambda: latest.of(module)

    updates = {
        module: _Pending(
            rank=_rank(plan, module), shape=(headers[module].out, headers[module].into), make=maker(module)
        )
        for module in plan.modules
    }
    layouts = {module: header.layout for module, header in headers.items() if header.layout != LINEAR}
    return AdapterState(meta=plan.meta(), updates=cast(Mapping[str, LowRank], updates), saved=saved, layouts=layouts)
