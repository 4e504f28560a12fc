"""A search, checked but for its model: adapters, space, task and dev rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..adapters import AdapterSource
from ..errors import IncompatibleAdapters, OutputError, PlanError, UsageError
from ..io.files import check_not_input, check_output
from ..merging.merge_adapters import make_plan
from ..merging.merge_options import MergeOptions
from ..merging.overrides import Override, layer_of, make_override
from ..merging.plan import MergePlan
from ..methods.base import build, check_depths, check_roles
from ..options import SearchSettings
from ..progress import SILENT, Watcher
from ..provenance import manifest
from ..tasks import Task, get_task, metrics_of
from ..tasks.base import remarks
from ..tasks.data import DataFile, read_pairs
from ..tasks.data.files import text_hash
from ..tasks.data.report import told_left_out
from ..tasks.heads.from_adapters import template_of
from ..tasks.splits import DEV, refuse_tested, told_trained
from .merged_candidates import candidate_of, chosen_on, entries_of
from .pair_rows import PairRows
from .parameters import combinations, ends, read_parameter
from .space import Candidate, Space, depth_groups, grid_weights, sums_of_grid
from .trial_store import Listed


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A search that is checked but for the model.

    Args:
        template: Sources, method, form and seed of the merge.
        searched: The space.
        task: The task.
        rows: The rows that trials answer: those of pairs, if there are some, then the dev rows.
        files: Their files.
        prompt: Name of the prompt template.
        tested: What the manifest says of files that were evaluated as test data and are allowed.
        notes: What a person should know of the space and of the files.
        pairs: Pairs whose answers are compared, if they decide.
    """

    template: MergePlan
    searched: Space | Listed
    task: Task
    rows: Sequence[Any]
    files: Sequence[DataFile]
    prompt: str
    tested: Sequence[Mapping[str, Any]] = ()
    notes: tuple[str, ...] = ()
    pairs: PairRows | None = None

    @property
    def dev_rows(self) -> Sequence[Any]:
        """Return the rows that have labels."""
        return self.rows[len(self.pairs.rows) :] if self.pairs else self.rows

    @property
    def sources(self) -> tuple[AdapterSource, ...]:
        """Return the adapters."""
        return self.template.sources


def _places(settings: SearchSettings, plan: MergePlan) -> tuple[Override, ...]:
    """Return the places with weights of their own; they cover all modules."""
    modules = plan.modules
    layers = sorted({number for number in map(layer_of, modules) if number is not None})
    given = settings.groups
    if len(given) > 1 and any(group.isdecimal() for group in given):
        raise UsageError(f"--groups must be one number, or globs, got {' '.join(given)}.")
    count = int(given[0]) if given and given[0].isdecimal() else 1 if settings.curve else None
    if count is not None:
        if not 1 <= count <= len(layers):
            raise UsageError(f"--groups must be from 1 to the number of adapted layers, {len(layers)}, got {count}.")
        if settings.curve and settings.curve > len(layers) // count:
            raise UsageError(
                f"--curve must have at most as many points as each group has layers, {len(layers) // count}, got "
                f"{settings.curve}."
            )
        # what lies outside the layers comes first, so that it has weights too
        outside = [module for module in modules if layer_of(module) is None]
        return (*((Override(),) if outside else ()), *depth_groups(layers, count))
    names = [source.name for source in plan.sources]
    found = tuple(make_override({"modules": glob}, names, modules) for glob in given)
    left = [module for module in modules if not any(place.covers(module) for place in found)]
    # later places win, so what no glob covers comes first
    return (Override(), *found) if found and left else found


def _idle(place: Override, later: Sequence[Override], plan: MergePlan) -> frozenset[int]:
    """Return the numbers of the adapters that adapt no module of a place; where places overlap the later one counts."""
    own = [name for name in plan.modules if place.covers(name) and not any(other.covers(name) for other in later)]
    return frozenset(
        number for number, source in enumerate(plan.sources) if own and not any(name in source.modules for name in own)
    )


def _space(settings: SearchSettings, plan: MergePlan) -> Space | Listed:
    count = len(plan.sources)
    vary = {name: read_parameter(name, text) for name, text in settings.vary.items()}
    if settings.grid:
        options = combinations(vary)
        averages = (
            [] if settings.space == "sum" else grid_weights(settings.grid, count, simplex=settings.space != "free")
        )
        sums = sums_of_grid(settings.grid, count) if settings.space in ("sum", "both") else []
        weights = list(dict.fromkeys([*averages, *sums]))
        if not weights:
            raise UsageError(
                f"a grid must hold weights that leave something for the last adapter, got {settings.grid}."
            )
        merges = [candidate_of(Path(folder), plan) for folder in settings.candidates]
        return Listed([*(Candidate(weights=w, options=o) for w in weights for o in options), *merges])
    places = _places(settings, plan)
    return Space(
        count=count,
        simplex=settings.space == "simplex",
        reach=(settings.bounds[0], settings.bounds[1]),
        places=places,
        idle=tuple(_idle(place, places[number + 1 :], plan) for number, place in enumerate(places)),
        knots=settings.curve or 1,
        options=vary,
    )


def prepare(settings: SearchSettings, *, writes: bool = True, watch: Watcher = SILENT) -> Prepared:
    """Check everything that can be checked without a model.

    Args:
        settings: The search.
        writes: Whether this process is to write the output.
        watch: Receives what cannot be read of the record of test data.

    Raises:
        AdapterMixError: something does not do.
    """
    out = Path(settings.out)
    if writes:
        check_output(out, overwrite=settings.overwrite)
        check_not_input(out, settings.adapters)
    if settings.storage and "://" not in settings.storage:
        place = Path(settings.storage).absolute()
        if place.is_relative_to(out.absolute()):
            raise UsageError(f"--storage must lie outside --out, which is replaced whole, and {place} lies in it.")
        if place.is_dir():
            raise UsageError(f"--storage must be a file, or the URL of a database, and {place} is a folder.")
    if settings.report and find_spec("matplotlib") is None:
        raise OutputError("--report needs matplotlib, which is not installed. Run: pip install 'matplotlib>=3.9'")
    plain = MergeOptions(
        adapters=settings.adapters,
        weights=[1.0] * len(settings.adapters),
        rank=settings.rank,
        allow_base_mismatch=settings.allow_base_mismatch,
        seed=settings.seed,
    )
    template = make_plan(plain)
    for source in template.sources:
        if kinds := replace(source, saved_headers={}).beyond_linear:
            raise IncompatibleAdapters(
                f"only plain LoRAs on linear layers can be searched, and '{source.name}' has {', '.join(kinds)}. Merge "
                "it with weights of your own."
            )
    template = replace(template, keep_heads=True)  # a trial has them whatever an adapter weighs
    searched = _space(settings, template)
    for options in _ends(searched):
        template = _with_method(template, settings, options)
    task = get_task(settings.task)
    prompt = template_of(task, template.sources, settings.template)
    pairs, rows, files = _read(task, settings)
    return Prepared(
        template=template,
        searched=searched,
        task=task,
        rows=rows,
        files=files,
        pairs=pairs,
        prompt=prompt,
        # of a search that is under way the process that leads has asked
        tested=[
            *(refuse_tested({DEV: files}, allowed=settings.allow_tested, watch=watch) if writes else ()),
            *entries_of(settings.candidates, "tested"),
        ],
        notes=(
            *_notes(settings, searched),
            *_order(template.sources),
            *(_of_pairs(pairs, template.sources[0]) if pairs else ()),
            *told_left_out(sum(file.left_out for file in files), len(rows)),
            *remarks(task, rows[len(pairs.rows) :] if pairs else rows),
            *told_trained(files, [manifest.origin(source) for source in template.sources]),
            *chosen_on(files, settings.candidates, template.sources),
        ),
    )


def _read(task: Task, settings: SearchSettings) -> tuple[PairRows | None, Sequence[Any], list[DataFile]]:
    """Return the pairs that decide, if they do, all rows, and all files."""
    pairs, pair_files = _pairs(task, settings)
    rows, files = task.read(settings.dev, rows=settings.rows) if settings.dev else ([], [])
    _check_each_once(pair_files, "pair")
    _check_each_once(files, "dev")
    if rows:
        metrics_of(task, rows, metric=None if pairs else settings.metric, scorer=settings.scorer)
    return pairs, [*pairs.rows, *rows] if pairs else rows, [*pair_files, *files]


def _pairs(task: Task, settings: SearchSettings) -> tuple[PairRows | None, list[DataFile]]:
    """Return the pairs that decide, and their files."""
    if not settings.pairs:
        return None, []
    found, files = read_pairs(settings.pairs, rows=settings.pair_rows)
    pairs = PairRows.of(task, found)
    names = [metric.name for metric in pairs.task.agreement(pairs.rows)]
    if settings.metric is not None and settings.metric not in names:
        raise UsageError(f"--metric must be {' or '.join(names)} with --objective agreement, got {settings.metric!r}.")
    return pairs, files


def _of_pairs(pairs: PairRows, first: AdapterSource) -> tuple[str, ...]:
    """Return a warning where the first adapter was not trained in the language of the source sides."""
    known = manifest.inherit([first])["languages"] or {}
    supervised = set(known.get("supervised") or ())
    if not supervised or supervised & set(pairs.sources):
        return ()
    return (
        f"warning: the answers of '{first.name}' to the second side of the pairs ({', '.join(pairs.sources)}) serve as "
        f"labels, but it was trained in {', '.join(sorted(supervised))}.",
    )


def _check_each_once(files: Sequence[DataFile], kind: str) -> None:
    """Refuse rows that count twice, which intervals would take for more of them."""
    seen: dict[tuple[str, ...], Path] = {}
    for file in files:
        rows = file.used.listed.hashes.key if file.used else text_hash(file)
        other = seen.setdefault((rows, *file.languages), file.path)
        if other is not file.path:
            raise UsageError(f"each {kind} file counts once, and {file.path} holds what {other} does. Give it once.")


def _order(sources: Sequence[AdapterSource]) -> tuple[str, ...]:
    kinds = [source.meta.manifest.get("kind") for source in sources]
    if kinds[0] != "train-align" or "train-task" not in kinds:
        return ()
    name = sources[kinds.index("train-task")].name
    return (
        f"warning: the first adapter is the one that candidates are held against, and '{sources[0].name}' is an "
        f"alignment adapter: give '{name}' first.",
    )


def _notes(settings: SearchSettings, searched: Space | Listed) -> tuple[str, ...]:
    if not isinstance(searched, Listed) or settings.space != "simplex":
        return ()
    kept = len({candidate.weights for candidate in searched.candidates if not candidate.name})
    left_out = len(settings.grid) ** (len(settings.adapters) - 1) - kept
    return (f"{left_out} rows of the grid leave less than nothing for the last adapter and are left out.",) * bool(
        left_out
    )


def _ends(searched: Space | Listed) -> list[dict[str, Any]]:
    """Return options to check: the ends of ranges, each value."""
    if isinstance(searched, Listed):
        return [dict(candidate.options) for candidate in searched.candidates]
    return combinations(ends(searched.options))


def _with_method(template: MergePlan, settings: SearchSettings, options: dict[str, Any]) -> MergePlan:
    fixed = {**settings.options, **options}
    method = build(settings.method, fixed)
    if method.statistics is not None:
        raise PlanError(
            f"method '{settings.method}' needs statistics of data, which a search does not take: merge with it."
        )
    check_roles(method, len(template.sources))
    check_depths(method, template.depths)
    if method.is_learned:
        raise PlanError(
            f"method '{settings.method}' learns its weights, so there is nothing to search: merge with it, and give "
            "the result as one of --candidates."
        )
    return replace(template, method=method, options=fixed)
