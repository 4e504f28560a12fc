"""A search, checked but for its model: adapters, space, task and dev rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from ..adapters import AdapterSource
from ..compose.merging import make_plan
from ..compose.places import Override, layer_of, make_override
from ..compose.plan import MergePlan
from ..data import DataFile
from ..errors import OutputError, PlanError, UsageError
from ..evaluation.run import template_of
from ..files import check_not_input, check_output
from ..methods.base import build
from ..settings import SearchSettings
from ..tasks import Task, get_task
from .ledger import Listed
from .space import Candidate, Choice, Interval, Parameter, Space, depth_groups, grid_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A search that is checked but for the model.

    Args:
        template: Sources, method, form and seed of the merge.
        searched: The space.
        task: The task.
        rows: The dev rows.
        files: Their files.
        prompt: Name of the prompt template.
    """

    template: MergePlan
    searched: Space | Listed
    task: Task
    rows: Sequence[Any]
    files: Sequence[DataFile]
    prompt: str

    @property
    def sources(self) -> tuple[AdapterSource, ...]:
        """Return the adapters."""
        return self.template.sources


def _values(name: str, text: str) -> Parameter:
    """Return what `LOW:HIGH` or `V,V` stands for.

    Raises:
        UsageError: another form.
    """
    low, colon, high = text.partition(":")
    try:
        if colon:
            bounds = Interval(float(low), float(high))
            if bounds.low < bounds.high:
                return bounds
        else:
            values = tuple(yaml.safe_load(part) for part in text.split(","))
            if all(isinstance(value, str | int | float | bool) for value in values) and len(set(values)) == len(values):
                return Choice(values)
    except (ValueError, yaml.YAMLError):
        pass
    raise UsageError(f"--vary {name} must be LOW:HIGH with LOW < HIGH, or values parted by commas, got {text!r}.")


def _places(settings: SearchSettings, plan: MergePlan) -> tuple[Override, ...]:
    """Return the places with weights of their own; they cover all modules."""
    modules = plan.modules
    numbers = [number for number in map(layer_of, modules) if number is not None]
    layers = max(numbers, default=-1) + 1
    count = int(settings.groups[0]) if settings.groups and settings.groups[0].isdecimal() else 0
    if len(settings.groups) > 1 and any(group.isdecimal() for group in settings.groups):
        raise UsageError(f"--groups must be one number, or globs, got {' '.join(settings.groups)}.")
    if settings.curve and not count:
        count = 1
    if count:
        if count > layers:
            raise PlanError(f"--groups must be at most the number of layers, {layers}, got {count}.")
        return depth_groups(layers, count)
    names = [source.name for source in plan.sources]
    found = tuple(make_override({"modules": glob}, names, modules) for glob in settings.groups)
    left = [module for module in modules if not any(place.covers(module) for place in found)]
    # later places win, so what no glob covers comes first
    return (Override(), *found) if found and left else found


def _space(settings: SearchSettings, plan: MergePlan) -> Space | Listed:
    count = len(plan.sources)
    vary = {name: _values(name, text) for name, text in settings.vary.items()}
    if settings.grid:
        ranges = [name for name, parameter in vary.items() if isinstance(parameter, Interval)]
        if ranges:
            raise UsageError(f"a grid needs values, and --vary {ranges[0]} is a range: give V,V, or --trials N.")
        weights = grid_weights(settings.grid, count, simplex=settings.space == "simplex")
        if not weights:
            raise UsageError(
                f"a grid must hold weights that leave something for the last adapter, got {settings.grid}."
            )
        return Listed([Candidate(weights=w, options=o) for w in weights for o in _combinations(vary)])
    return Space(
        count=count,
        simplex=settings.space == "simplex",
        reach=(settings.bounds[0], settings.bounds[1]),
        places=_places(settings, plan),
        knots=settings.curve or 1,
        options=vary,
    )


def _combinations(vary: dict[str, Parameter]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{}]
    for name, parameter in vary.items():
        values = parameter.values if isinstance(parameter, Choice) else ()
        found = [{**options, name: value} for options in found for value in values]
    return found


def prepare(settings: SearchSettings) -> Prepared:
    """Check everything that can be checked without a model."""
    check_output(Path(settings.out), overwrite=settings.overwrite)
    check_not_input(Path(settings.out), settings.adapters)
    if settings.report and find_spec("matplotlib") is None:
        raise OutputError("--report needs matplotlib, which is not installed. Run: pip install 'matplotlib>=3.9'")
    template = make_plan(
        settings.adapters,
        weights=[1.0] * len(settings.adapters),
        method="exact",
        rank=settings.rank,
        allow_base_mismatch=settings.allow_base_mismatch,
        seed=settings.seed,
    )
    searched = _space(settings, template)
    for options in _ends(searched):
        template = _with_method(template, settings, options)
    task = get_task(settings.task)
    prompt = template_of(task, template.sources, settings.template)
    rows, files = task.read(settings.dev, rows=settings.rows)
    return Prepared(template=template, searched=searched, task=task, rows=rows, files=files, prompt=prompt)


def _ends(searched: Space | Listed) -> list[dict[str, Any]]:
    """Return options to check: the ends of ranges, each value."""
    if isinstance(searched, Listed):
        return [dict(candidate.options) for candidate in searched.candidates]
    ends = {name: Choice((p.low, p.high)) if isinstance(p, Interval) else p for name, p in searched.options.items()}
    return _combinations(dict(ends))


def _with_method(template: MergePlan, settings: SearchSettings, options: dict[str, Any]) -> MergePlan:
    fixed = {**settings.options, **options}
    method = build(settings.method, fixed)
    if method.statistics is not None:
        raise PlanError(f"method '{settings.method}' needs statistics files, which a search does not take.")
    return replace(template, method=method, options=fixed)
