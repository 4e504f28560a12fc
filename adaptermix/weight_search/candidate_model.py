"""Candidates on a live model: what each answers to the dev rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..adapters import AdapterSource, AdapterState
from ..adapters.paths import fitted
from ..evaluation.answering import Answering
from ..merging.attach import Attachment, MixedRowsError
from ..merging.on_model import acting
from ..merging.plan import MergePlan
from ..merging.sinks import execute
from ..methods.base import MergeMethod, build
from ..methods.exact import Exact
from ..models.base import BaseModel
from .space import Candidate

TOGETHER = 512
"""Rows that candidates which share forward passes have in all: as many make passes no faster per row, and are lost with
a process that dies."""


def candidate_plan(template: MergePlan, candidate: Candidate, *, fixed: dict[str, Any]) -> MergePlan:
    """Return the merge that a candidate stands for.

    Args:
        template: Sources, method, form and seed.
        candidate: Weights, places and options.
        fixed: Options that are not searched.
    """
    options = {**fixed, **candidate.options}
    return replace(
        template,
        weights=candidate.weights,
        overrides=candidate.overrides,
        method=build(template.method.title, options),
        options=options,
    )


class Judge:
    """Lets candidates answer; of exact sums a trial only sets coefficients, others are merged module by module.

    Args:
        base: The model.
        answering: The dev rows.
        template: Sources, method, form and seed of the merge.
        fixed: Options of the method that are not searched.
    """

    def __init__(self, base: BaseModel, answering: Answering, template: MergePlan, fixed: dict[str, Any]) -> None:
        self._base, self._answering, self._template, self._fixed = base, answering, template, fixed
        self._attached: Attachment | None = None
        self._mixes = False
        self._last: tuple[Candidate, AdapterState] | None = None

    @contextmanager
    def at_work(self, sources: Sequence[AdapterSource]) -> Iterator[Judge]:
        """Attach the adapters for as long as candidates are judged."""
        names = [name for name, _ in self._base.model.named_modules()]
        self._template = replace(self._template, sources=tuple(fitted(source, names) for source in sources))
        with acting(self._base, sources) as attached:
            self._attached = attached
            yield self

    @property
    def sources(self) -> tuple[AdapterSource, ...]:
        """Return the adapters."""
        return self._template.sources

    @property
    def every_row(self) -> Sequence[int]:
        """Return the numbers of all rows."""
        return range(self._answering.count)

    def of(self, sources: Sequence[AdapterSource]) -> Judge:
        """Return what judges candidates of other adapters on the same rows; as many, with the same modules."""
        return Judge(self._base, self._answering, replace(self._template, sources=tuple(sources)), self._fixed)

    def plan(self, candidate: Candidate) -> MergePlan:
        """Return the merge that a candidate stands for."""
        return candidate_plan(self._template, candidate, fixed=self._fixed)

    def alone(self, label: str) -> list[str]:
        """Return the answers of the first adapter alone, which no method has touched."""
        attached = self._live
        attached.set_weights([1.0, *[0.0] * (len(self._template.sources) - 1)])
        return self._answering(label)

    @property
    def takes_several(self) -> bool:
        """Whether candidates can share forward passes: rows with weights of their own, where rows keep their places."""
        return self.is_sum and self._answering.generates and not self._mixes

    @property
    def is_sum(self) -> bool:
        """Whether candidates are exact weighted sums, for which nothing is merged."""
        return isinstance(self._template.method, Exact) and self._template.shape.rank is None

    def __call__(self, asked: Sequence[tuple[Candidate, Sequence[int]]], label: str) -> Iterator[list[str]]:
        """Yield the answers of candidates, each to dev rows of its own, in their order.

        Args:
            asked: What to merge, and the rows that it is asked.
            label: Name of the progress bar.
        """
        if len(asked) > 1 and self.takes_several:
            attached = self._live
            attached.set_several([self.plan(candidate).weights_at for candidate, _ in asked])
            try:
                yield from self._answering.together([places for _, places in asked], attached.choose, label)
                return
            except MixedRowsError:
                self._mixes = True
        for candidate, places in asked:
            yield self._one(candidate, places, label)

    def _one(self, candidate: Candidate, places: Sequence[int], label: str) -> list[str]:
        plan, attached = self.plan(candidate), self._live
        if isinstance(plan.method, Exact) and plan.shape.rank is None:
            attached.set_weights_by_module(plan.weights_at)
            return self._answering(label, places=places)
        attached.set_weights([0.0] * len(plan.sources))
        rest, factor = _without_factor(candidate, plan.method)
        if self._last is None or self._last[0] != rest:
            state, _ = execute(self.plan(rest), device=self._base.device)
            self._last = rest, replace(state, saved={})
        with Attachment(self._base.model, [self._last[1]], [factor]):
            return self._answering(label, places=places)

    @property
    def _live(self) -> Attachment:
        if self._attached is None:
            raise RuntimeError("candidates are judged inside `at_work`")
        return self._attached


def _without_factor(candidate: Candidate, method: MergeMethod) -> tuple[Candidate, float]:
    """Return a candidate whose searched factor on the result is 1, and that factor."""
    if method.factor is None or method.factor not in candidate.options:
        return candidate, 1.0
    options = {**candidate.options, method.factor: 1.0}
    return replace(candidate, options=options), float(candidate.options[method.factor])
