"""The checks of a search before its model is loaded: adapters, space, task and dev rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from ..adapters import AdapterSource
from ..errors import IncompatibleAdapters, OutputError, PlanError, UsageError
from ..io.files import check_not_input, check_output
from ..io.json_types import JsonObject
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
from ..tasks.data.report import left_out_warnings
from ..tasks.data.tables import Row
from ..tasks.heads.from_adapters import template_of
from ..tasks.splits import DEV, refuse_tested, trained_warnings
from .merged_candidates import candidate_of, chosen_on, entries_of
from .pair_rows import PairRows
from .parameters import combinations, ends, read_parameter
from .space import Candidate, CandidateList, Space, depth_groups, grid_weights, sums_of_grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A search whose settings and files are checked, without its model.

    Args:
        template: Adapters, method, form and seed of the merge.
        searched: The search space.
        task: The task.
        rows: The rows that trials answer: those of pairs, if there are any, then the dev rows.
        files: Their files.
        prompt: Name of the prompt template.
        tested: Manifest entries of files that were evaluated as test data and are allowed.
        notes: Notes on the space and on the files.
        pairs: Pairs whose answers are compared, if these decide instead of labels.
    """

    template: MergePlan
    searched: Space | CandidateList
    task: Task
    rows: Sequence[Row]
    files: Sequence[DataFile]
    prompt: str
    tested: Sequence[Mapping[str, object]] = ()
    notes: tuple[str, ...] = ()
    pairs: PairRows | None = None

    @property
    def dev_rows(self) -> Sequence[Row]:
        """The rows that have labels."""
        return self.rows[len(self.pairs.rows) :] if self.pairs else self.rows

    @property
    def sources(self) -> tuple[AdapterSource, ...]:
        """The adapters."""
        return self.template.sources


def prepare(settings: SearchSettings, *, writes: bool = True, watch: Watcher = SILENT) -> Prepared:
    """Check everything that can be checked without a model.

    Args:
        settings: The search.
        writes: Whether this process writes the output.
        watch: Receives warnings about the record of test data.

    Raises:
        AdapterMixError: invalid settings, adapters or data files.
    """
    _check_paths(settings, writes=writes)
    plain = MergeOptions(
        adapters=settings.adapters,
        weights=[1.0] * len(settings.adapters),
        rank=settings.rank,
        allow_base_mismatch=settings.allow_base_mismatch,
        saved=settings.saved,
        seed=settings.seed,
    )
    template = make_plan(plain)
    for source in template.sources:
        if kinds := replace(source, saved_headers={}).beyond_linear:
            raise IncompatibleAdapters(
                f"only plain LoRAs on linear layers can be searched, and '{source.name}' has {', '.join(kinds)}. Merge "
                "it with weights that you choose.",
                code="search.not-lora",
            )
    template = replace(template, keep_heads=True)  # A trial has all heads, even that of an adapter with weight 0.
    searched = _space(settings, template)
    if isinstance(searched, CandidateList):
        tried = [dict(candidate.options) for candidate in searched.candidates]
    else:
        tried = combinations(ends(searched.options))
    for options in tried:
        template = _with_method(template, settings, options)
    task = get_task(settings.task, settings.columns)
    prompt = template_of(task, template.sources, settings.template)
    pairs, rows, files = _read(task, settings)
    # The leader has checked the record of test data; its workers must not refuse a search that is running.
    tested = refuse_tested({DEV: files}, allowed=settings.allow_tested, watch=watch) if writes else ()
    return Prepared(
        template=template,
        searched=searched,
        task=task,
        rows=rows,
        files=files,
        pairs=pairs,
        prompt=prompt,
        tested=[*tested, *entries_of(settings.candidates, "tested")],
        notes=(
            *_grid_notes(settings, searched),
            *_order_notes(template.sources),
            *(_pair_notes(pairs, template.sources[0]) if pairs else ()),
            *left_out_warnings(sum(file.left_out for file in files), len(rows)),
            *remarks(task, rows[len(pairs.rows) :] if pairs else rows),
            *trained_warnings(files, [manifest.origin(source) for source in template.sources]),
            *chosen_on(files, settings.candidates, template.sources),
        ),
    )


def _check_paths(settings: SearchSettings, *, writes: bool) -> None:
    out = Path(settings.out)
    if writes:
        check_output(out, overwrite=settings.overwrite)
        check_not_input(out, settings.adapters)
    if settings.storage and "://" not in settings.storage:
        path = Path(settings.storage).absolute()
        if path.is_relative_to(out.absolute()):
            raise UsageError(
                f"--storage must lie outside --out, which is replaced as a whole, and {path} lies in it.",
                code="storage.in-out",
            )
        if path.is_dir():
            raise UsageError(
                f"--storage must be a file, or the URL of a database, and {path} is a folder.", code="storage.is-folder"
            )
    if settings.report and find_spec("matplotlib") is None:
        raise OutputError(
            "--report needs matplotlib, which is not installed. Run: pip install 'matplotlib>=3.9'",
            code="plot.no-matplotlib",
        )


def _space(settings: SearchSettings, plan: MergePlan) -> Space | CandidateList:
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
                f"the weights of a grid must leave a weight of at least 0 for the last adapter, got {settings.grid}.",
                code="search.grid",
            )
        merges = [candidate_of(Path(folder), plan) for folder in settings.candidates]
        return CandidateList([*(Candidate(weights=w, options=o) for w in weights for o in options), *merges])
    overrides = _overrides(settings, plan)
    return Space(
        count=count,
        simplex=settings.space == "simplex",
        reach=(settings.bounds[0], settings.bounds[1]),
        overrides=overrides,
        idle=tuple(_idle(override, overrides[number + 1 :], plan) for number, override in enumerate(overrides)),
        knots=settings.curve or 1,
        options=vary,
    )


def _overrides(settings: SearchSettings, plan: MergePlan) -> tuple[Override, ...]:
    """Return the groups of modules with separate weights; together they cover all modules."""
    modules, groups = plan.modules, settings.groups
    layers = sorted({number for number in map(layer_of, modules) if number is not None})
    if len(groups) > 1 and any(group.isdecimal() for group in groups):
        raise UsageError(f"--groups must be one number, or globs, got {' '.join(groups)}.", code="search.groups")
    count = int(groups[0]) if groups and groups[0].isdecimal() else 1 if settings.curve else None
    if count is not None:
        if not 1 <= count <= len(layers):
            raise UsageError(
                f"--groups must be from 1 to the number of adapted layers, {len(layers)}, got {count}.",
                code="search.groups-count",
            )
        if settings.curve and settings.curve > len(layers) // count:
            raise UsageError(
                f"--curve must have at most as many points as each group has layers, {len(layers) // count}, got "
                f"{settings.curve}.",
                code="search.curve",
            )
        # Later overrides win, so modules outside the layers need the first one.
        outside = [module for module in modules if layer_of(module) is None]
        return (*((Override(),) if outside else ()), *depth_groups(layers, count))
    names = [source.name for source in plan.sources]
    overrides = tuple(make_override({"modules": glob}, names, modules) for glob in groups)
    left = [module for module in modules if not any(override.covers(module) for override in overrides)]
    return (Override(), *overrides) if overrides and left else overrides


def _idle(override: Override, later: Sequence[Override], plan: MergePlan) -> frozenset[int]:
    """Return the indices of the adapters that adapt none of the modules for which this override counts."""
    modules = [name for name in plan.modules if override.covers(name) and not any(o.covers(name) for o in later)]
    return frozenset(
        number
        for number, source in enumerate(plan.sources)
        if modules and not any(name in source.modules for name in modules)
    )


def _read(task: Task, settings: SearchSettings) -> tuple[PairRows | None, Sequence[Row], list[DataFile]]:
    """Return the pairs that decide, if there are any, all rows, and all files."""
    pairs: PairRows | None = None
    pair_files: list[DataFile] = []
    if settings.pairs:
        read, pair_files = read_pairs(settings.pairs, rows=settings.pair_rows)
        pairs = PairRows.of(task, read)
        names = [metric.name for metric in pairs.task.agreement(pairs.rows)]
        if settings.metric is not None and settings.metric not in names:
            raise UsageError(
                f"--metric must be {' or '.join(names)} with --objective agreement, got {settings.metric!r}.",
                code="search.metric",
            )
    rows, files = task.read(settings.dev, rows=settings.rows) if settings.dev else ([], [])
    _check_each_once(pair_files, "pair")
    _check_each_once(files, "dev")
    if rows:
        metrics_of(task, rows, metric=None if pairs else settings.metric, scorer=settings.scorer)
    return pairs, [*pairs.rows, *rows] if pairs else rows, [*pair_files, *files]


def _check_each_once(files: Sequence[DataFile], kind: str) -> None:
    """Refuse files with the same rows, which would make intervals too narrow."""
    seen: dict[tuple[str, ...], Path] = {}
    for file in files:
        rows = file.used.listed.hashes.key if file.used else text_hash(file)
        other = seen.setdefault((rows, *file.languages), file.path)
        if other is not file.path:
            raise UsageError(
                f"each {kind} file counts once, and {file.path} has the same rows as {other}. Give one of them.",
                code="search.file-twice",
            )


def _pair_notes(pairs: PairRows, first: AdapterSource) -> tuple[str, ...]:
    """Return a warning where the first adapter was not trained in the language of the source sides."""
    known = manifest.inherit([first])["languages"] or {}
    supervised = set(known.get("supervised") or ())
    if not supervised or supervised & set(pairs.sources):
        return ()
    return (
        f"warning: the answers of '{first.name}' to the second side of the pairs ({', '.join(pairs.sources)}) serve as "
        f"labels, but it was trained in {', '.join(sorted(supervised))}.",
    )


def _order_notes(sources: Sequence[AdapterSource]) -> tuple[str, ...]:
    roles = [[*(manifest.inherit([source])["languages"] or ())] for source in sources]
    if roles[0] != ["aligned"] or ["supervised"] not in roles:
        return ()
    name = sources[roles.index(["supervised"])].name
    return (
        f"warning: candidates are compared with the first adapter, but '{sources[0].name}' is an alignment "
        f"adapter: list '{name}' first.",
    )


def _grid_notes(settings: SearchSettings, searched: Space | CandidateList) -> tuple[str, ...]:
    if not isinstance(searched, CandidateList) or settings.space != "simplex":
        return ()
    tried = len({candidate.weights for candidate in searched.candidates if not candidate.name})
    left_out = len(settings.grid) ** (len(settings.adapters) - 1) - tried
    return (f"{left_out} rows of the grid would give the last adapter a weight below 0 and are left out.",) * bool(
        left_out
    )


def _with_method(template: MergePlan, settings: SearchSettings, options: JsonObject) -> MergePlan:
    fixed = {**settings.options, **options}
    method = build(settings.method, fixed)
    if method.statistics is not None:
        raise PlanError(
            f"method '{settings.method}' needs statistics of data, which a search does not support: use it in a merge.",
            code="search.statistics-method",
        )
    check_roles(method, len(template.sources))
    check_depths(method, template.depths)
    if method.is_learned:
        raise PlanError(
            f"method '{settings.method}' learns its weights, so it has no weights to search: merge with it, and "
            "pass the result as one of --candidates.",
            code="search.learned-method",
        )
    return replace(template, method=method, options=fixed)
