"""The answers of candidates: the adapters on a live model, with the weights of a candidate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from ..adapters import AdapterSource, AdapterState
from ..adapters.paths import fitted
from ..evaluation.answering import Answering
from ..io.json_types import JsonObject
from ..merging.attach import Attachment, MixedRowsError
from ..merging.on_model import acting
from ..merging.plan import MergePlan
from ..merging.sinks import execute
from ..methods.base import MergeMethod, build
from ..methods.exact import Exact
from ..models.base import BaseModel
from .space import Candidate

TOGETHER = 512
"""Most rows of all candidates that share forward passes: more rows make no pass faster per row, and are lost with a
process that dies."""


def candidate_plan(template: MergePlan, candidate: Candidate, *, fixed: JsonObject) -> MergePlan:
    """Return the merge of a candidate.

    Args:
        template: Adapters, method, form and seed.
        candidate: Weights, overrides and options.
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


class CandidateModel:
    """Computes candidates' answers: for exact sums only weights are set, other methods merge module by module.

    Args:
        base: The model.
        answering: The dev rows.
        template: Adapters, method, form and seed of the merge.
        fixed: Options of the method that are not searched.
    """

    def __init__(self, base: BaseModel, answering: Answering, template: MergePlan, fixed: JsonObject) -> None:
        self._base, self._answering, self._template, self._fixed = base, answering, template, fixed
        self._attached: Attachment | None = None
        self._mixes = False
        self._last: tuple[Candidate, AdapterState] | None = None

    @contextmanager
    def attached_to_model(self, sources: Sequence[AdapterSource]) -> Iterator[CandidateModel]:
        """Attach the adapters while the block runs; only inside it candidates can answer."""
        names = [name for name, _ in self._base.model.named_modules()]
        self._template = replace(self._template, sources=tuple(fitted(source, names) for source in sources))
        with acting(self._base, sources, saved=self._template.saved) as attached:
            self._attached = attached
            yield self

    @property
    def sources(self) -> tuple[AdapterSource, ...]:
        """The adapters."""
        return self._template.sources

    @property
    def every_row(self) -> Sequence[int]:
        """The indices of all rows."""
        return range(self._answering.count)

    def with_sources(self, sources: Sequence[AdapterSource]) -> CandidateModel:
        """Return the same for other adapters: as many, with the same modules."""
        return CandidateModel(self._base, self._answering, replace(self._template, sources=tuple(sources)), self._fixed)

    def plan(self, candidate: Candidate) -> MergePlan:
        """Return the merge of a candidate."""
        return candidate_plan(self._template, candidate, fixed=self._fixed)

    def alone(self, label: str) -> list[str]:
        """Return the answers of the first adapter alone, which no method has changed."""
        self._live.set_weights([1.0, *[0.0] * (len(self._template.sources) - 1)])
        return self._answering(label)

    @property
    def takes_several(self) -> bool:
        """Whether candidates can share forward passes: each row has its own weights and keeps its index in a batch."""
        return self.is_sum and self._answering.generates and not self._mixes

    @property
    def is_sum(self) -> bool:
        """Whether candidates are exact weighted sums, for which no module is merged."""
        return _is_sum(self._template)

    def __call__(self, requests: Sequence[tuple[Candidate, Sequence[int]]], label: str) -> Iterator[list[str]]:
        """Yield each candidate's answers to the rows of these indices; `label` names the progress bar."""
        if len(requests) > 1 and self.takes_several:
            attached = self._live
            attached.set_several([self.plan(candidate).weights_at for candidate, _ in requests])
            try:
                yield from self._answering.together([rows for _, rows in requests], attached.choose, label)
                return
            except MixedRowsError:
                self._mixes = True
        for candidate, rows in requests:
            yield self._one(candidate, rows, label)

    def _one(self, candidate: Candidate, rows: Sequence[int], label: str) -> list[str]:
        plan, attached = self.plan(candidate), self._live
        if _is_sum(plan):
            attached.set_weights_by_module(plan.weights_at)
            return self._answering(label, indices=rows)
        attached.set_weights([0.0] * len(plan.sources))
        rest, factor = _without_factor(candidate, plan.method)
        if self._last is None or self._last[0] != rest:
            state, _ = execute(self.plan(rest), device=self._base.device)
            self._last = rest, replace(state, saved={})
        with Attachment(self._base.model, [self._last[1]], [factor]):
            return self._answering(label, indices=rows)

    @property
    def _live(self) -> Attachment:
        if self._attached is None:
            raise RuntimeError("candidates answer inside `attached_to_model`")
        return self._attached


def _is_sum(plan: MergePlan) -> bool:
    return isinstance(plan.method, Exact) and plan.shape.rank is None


def _without_factor(candidate: Candidate, method: MergeMethod) -> tuple[Candidate, float]:
    """Return a candidate whose searched factor on the result is 1, and that factor."""
    if method.factor is None or method.factor not in candidate.options:
        return candidate, 1.0
    options = {**candidate.options, method.factor: 1.0}
    return replace(candidate, options=options), float(candidate.options[method.factor])
