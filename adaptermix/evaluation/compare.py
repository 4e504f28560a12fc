"""Comparison of systems, each with one run per seed, from the answers that `evaluate --predictions` wrote."""

from __future__ import annotations

import glob
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import DataError, OutputError, UsageError
from ..io.files import write_whole
from ..io.json_types import JsonObject
from ..io.markup import markdown_table
from ..io.report_view import ResultView
from ..options import CompareSettings
from ..options.paths import holds_output
from ..progress import SILENT, Watcher
from ..tasks import Metric, Task, clusters_of, get_task, metrics_of
from ..tasks.base import remarks
from ..tasks.data.tables import Row
from ..tasks.tagged import from_entry
from .compare_tables import read_columns, side_by_side
from .score import CONFIDENCE, RowStatistics, Score, by_role, count_rows, documents, known_languages
from .significance import Draws, p_values
from .system_scores import Deviations, Scored, deviations, group_means, over_runs, shares_of_gap

Table = tuple[list[str], list[list[str]]]
"""Titles and rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """Scores of one system.

    Args:
        name: Its name.
        runs: Per run, the mean over languages.
        languages: Score per language, averaged over runs.
        groups: Mean over the languages of each role, averaged over runs: supervised, aligned, transfer, all.
        above: Gain of each group over the baseline.
        above_languages: Gain of each language over the baseline.
        deviations: Standard deviations of these gains over runs and over languages.
        p_values: For the gain of the mean over all languages (`all`) and of each language, corrected by Holm: `all` for
            the number of systems, languages for the number of systems times languages.
        gap_closed: `above` as a share of the ceiling's gain over the baseline.
    """

    name: str
    runs: Sequence[float]
    languages: Mapping[str, Score]
    groups: Mapping[str, Score]
    above: Mapping[str, Score] = field(default_factory=dict)
    above_languages: Mapping[str, Score] = field(default_factory=dict)
    deviations: Deviations | None = None
    p_values: Mapping[str, float] = field(default_factory=dict)
    gap_closed: Mapping[str, Score] = field(default_factory=dict)

    def document(self) -> JsonObject:
        """Return plain data."""
        return {
            "runs": list(self.runs),
            "scores": documents(self.languages),
            "groups": documents(self.groups),
            "above": documents(self.above),
            "above_languages": documents(self.above_languages),
            "deviations": self.deviations.document() if self.deviations else {},
            "p_values": dict(self.p_values),
            "gap_closed": documents(self.gap_closed),
        }


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Systems(ResultView):
    """A comparison of systems.

    Args:
        task: Name of the task.
        metric: Name of the headline metric.
        systems: The systems, in the order of the arguments.
        baseline: Name of the system that the others are compared with, if any.
        ceiling: Name of the system whose gain over the baseline defines the gap, if any.
        notes: Caveats of the figures.
        data_sets: Titles and rows of the table over several data sets, if any.
    """

    task: str
    metric: str
    systems: Sequence[System]
    baseline: str | None
    ceiling: str | None
    notes: Sequence[str] = ()
    data_sets: Table | None = None

    def document(self) -> JsonObject:
        """Return the JSON document of `adaptermix compare`."""
        return {
            "task": self.task,
            "metric": self.metric,
            "baseline": self.baseline,
            "ceiling": self.ceiling,
            "systems": {system.name: system.document() for system in self.systems},
            "notes": list(self.notes),
            "tables": [[titles, *rows] for titles, rows in self.tables()],
        }

    def tables(self) -> list[Table]:
        """Return titles and rows of each table."""
        return self._tables(self.table())

    def _tables(self, first: Table) -> list[Table]:
        return [
            first,
            *([self.gains()] if any(system.deviations for system in self.systems) else []),
            *([self.data_sets] if self.data_sets else []),
        ]

    def gains(self) -> Table:
        """Return titles and rows of the gains over the baseline, with standard deviations.

        Behind "±" is the deviation over runs, if both systems have several. For each role of several languages a column
        has the deviation of the gains over its languages.
        """
        groups, languages = list(self.systems[0].groups), list(self.systems[0].languages)
        gained = [(system, system.deviations) for system in self.systems if system.deviations]
        uneven = [role for role in groups if gained and role in gained[0][1].languages]
        rows = []
        for system, over in gained:
            cells = [_gain(system.above[role], over.runs.get(role)) for role in groups]
            cells += [f"{over.languages[role]:.3f}" for role in uneven]
            cells += [_gain(system.above_languages[name], over.runs_of_languages.get(name)) for name in languages]
            rows.append([system.name, *cells])
        titles = [f"gain over {self.baseline}", *groups, *(f"SD of {role} languages" for role in uneven), *languages]
        return titles, rows

    def table(self, *, wide: bool = False) -> Table:
        """Return titles and rows for display: groups with intervals, gap closed, then every language.

        Args:
            wide: Include the intervals of languages.
        """
        groups, languages = list(self.systems[0].groups), list(self.systems[0].languages)
        titles = ["system", "runs", *groups]
        titles += [f"above {self.baseline}", "p"] if self.baseline else []
        titles += ["gap closed"] if self.ceiling else []
        rows = []
        for system in self.systems:
            cells = [system.name, str(len(system.runs)), *(_format(system.groups[name]) for name in groups)]
            if self.baseline:
                cells.append(_format(system.above["all"], "+.3f") if system.above else "")
                cells.append(f"{system.p_values['all']:.3f}" if system.p_values else "")
            if self.ceiling:
                cells.append(_format(system.gap_closed["all"], ".2f") if system.gap_closed else "")
            marks = {name: "*" if value < 1 - CONFIDENCE else "" for name, value in system.p_values.items()}
            scores = [(system.languages[name], marks.get(name, "")) for name in languages]
            cells += [(_format(score) if wide else f"{score.value:.3f}") + mark for score, mark in scores]
            rows.append(cells)
        return [*titles, *languages], rows

    def markdown(self) -> str:
        """Return the table in Markdown, including the intervals of languages."""
        tables = self._tables(self.table(wide=True))
        return "\n".join(markdown_table(titles, rows) for titles, rows in tables)


def _format(score: Score, form: str = ".3f") -> str:
    if math.isnan(score.value):
        return "unknown"
    interval = "unknown" if math.isnan(score.low) else f"{score.low:{form}}, {score.high:{form}}"
    return f"{score.value:{form}} [{interval}]"


def _gain(score: Score, over_runs: float | None) -> str:
    return f"{score.value:+.3f}" + ("" if over_runs is None else f" ± {over_runs:.3f}")


def _files(arguments: Sequence[str]) -> dict[str, list[Path]]:
    """Return the files of each system from `NAME=FILE` arguments; several files of a name are its runs."""
    by_system: dict[str, list[Path]] = {}
    for argument in arguments:
        name, equals, pattern = argument.partition("=")
        if not equals or not name or not pattern:
            raise UsageError(
                f"a system must be given as NAME=FILE, such as task=task.jsonl, got {argument!r}.",
                code="compare.system",
            )
        paths = [Path(pattern)] if Path(pattern).exists() else sorted(Path(path) for path in glob.glob(pattern))
        if not paths:
            raise DataError(
                f"system '{name}' needs a file of `evaluate --predictions`, and {pattern!r} matches none.",
                code="compare.no-file",
            )
        by_system.setdefault(name, []).extend(paths)
    return by_system


def _keys(arguments: Sequence[str]) -> dict[str, set[str]]:
    """Return for each system the values that the wildcards of its arguments matched, such as the seeds of its runs."""
    keys: dict[str, set[str]] = {}
    for argument in arguments:
        name, _, pattern = argument.partition("=")
        if not Path(pattern).exists():
            form = re.compile(re.escape(pattern).replace(r"\*", "(.*)").replace(r"\?", "(.)"))
            matches = (form.fullmatch(path) for path in glob.glob(pattern))
            keys.setdefault(name, set()).update("/".join(match.groups()) for match in matches if match)
    return keys


def read_answers(path: Path, task: Task, rows: Sequence[Row]) -> list[str]:
    """Read a file of `evaluate --predictions`.

    Raises:
        DataError: the file has another format, or was made from other rows.
    """
    answers = []
    try:
        # Split at line feeds only: answers may contain other line separators.
        for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
            entry = json.loads(line)
            answers.append((from_entry(entry), entry.get("language"), entry.get("expected")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"a line has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise DataError(
            f"{path} must be a file of `evaluate --predictions`, and is not: {reason}.", code="compare.not-predictions"
        ) from error
    if len(answers) != len(rows):
        raise DataError(
            f"{path} must answer the {len(rows)} rows of the data, and has {len(answers)} answers. Give the same "
            "--data and --rows as to `evaluate`.",
            code="compare.answer-count",
        )
    for number, ((_, language, expected), row) in enumerate(zip(answers, rows, strict=True), start=1):
        # Older files contain only the answer.
        same = language in (None, task.language(row)) and expected in (None, task.answer(row))
        if not same:
            raise DataError(
                f"{path}:{number} must answer row {number} of the data, and answers another one. Give the same --data "
                "and --rows as to `evaluate`.",
                code="compare.other-rows",
            )
    return [answer for answer, _, _ in answers]


def _members(languages: Sequence[str], settings: CompareSettings) -> dict[str, list[int]]:
    """Return the indices of the languages of each role."""
    named = {
        role: set(known_languages(codes, languages, option=role))
        for role, codes in (("supervised", settings.supervised), ("aligned", settings.aligned))
    }
    members = by_role(languages, named["supervised"], named["aligned"])
    return {role: [languages.index(name) for name in names] for role, names in members.items()}


def _check(settings: CompareSettings, files: Mapping[str, Sequence[Path]]) -> None:
    for option, name in (("baseline", settings.baseline), ("ceiling", settings.ceiling)):
        if name is not None and name not in files:
            raise UsageError(
                f"--{option} must be one of the systems ({', '.join(files)}), got {name!r}.",
                code="compare.unknown-system",
            )
    for option, path in (("markdown", settings.markdown), ("document", settings.document)):
        if path and not Path(path).absolute().parent.is_dir():
            raise OutputError(
                f"--{option} must lie in a folder that exists, and {path} does not.", code="output.no-parent"
            )


def _scored(
    files: Mapping[str, Sequence[Path]],
    task: Task,
    rows: Sequence[Row],
    *,
    metric: Metric,
    seed: int,
    watch: Watcher,
) -> Scored:
    """Read the answers of each system and score them."""
    spoken, clusters = [task.language(row) for row in rows], clusters_of(task, rows)
    counts: dict[str, dict[str, list[RowStatistics]]] = {}
    with watch.track("compare", sum(map(len, files.values()))) as advance:
        for name, paths in files.items():
            runs = []
            for path in paths:
                runs.append(count_rows(metric, spoken, rows, read_answers(path, task, rows), clusters))
                advance(1, "")
            counts[name] = {language: [run[language] for run in runs] for language in runs[0]}
    return Scored(metric, counts, seed=seed)


@holds_output
def compare_systems(settings: CompareSettings, *, watch: Watcher = SILENT) -> Systems:
    """Score systems on the same rows, each as the mean of its runs, and compare them with the baseline.

    Intervals contain 95 % of draws over rows and runs, which are shared by all systems; see `draws` and `over_runs`.
    Gap closed is (system - baseline) / (ceiling - baseline), of means over languages. It has no interval if the gap's
    interval reaches zero, since any share would then be possible.

    Raises:
        AdapterMixError: a file is missing or was made from other rows, or a name is unknown.
    """
    files, others = _files(settings.systems), read_columns(settings.beside)
    _check(settings, files)
    task = get_task(settings.task, settings.columns)
    rows, _ = task.read(settings.data, rows=settings.rows)
    metric = metrics_of(task, rows, metric=settings.metric, scorer=settings.scorer)[0]
    for note in remarks(task, rows):
        watch.note(note)
    scored = _scored(files, task, rows, metric=metric, seed=settings.seed, watch=watch)
    sizes, baseline, ceiling = scored.sizes, settings.baseline, settings.ceiling
    members = _members(list(sizes), settings)
    values = {name: scored.plain(name) for name in files}
    # [groups runs 1 + resamples]: the mean over a role's languages.
    grouped = {name: group_means(draws, members) for name, draws in values.items()}
    means = {name: over_runs(draws, settings.seed) for name, draws in grouped.items()}
    count = {role: sum(list(sizes.values())[i] for i in indices) for role, indices in members.items()}

    def scores(names: Sequence[str], draws: Draws, rows: Mapping[str, int], least: float = 0.0) -> dict[str, Score]:
        both = zip(rows.items(), draws, strict=True)
        return {key: scored.interval(names, each, n=n, least=least) for (key, n), each in both}

    by_language = {name: over_runs(draws, settings.seed) for name, draws in values.items()}
    chances = p_values(by_language, means, list(members).index("all"), scored.units, baseline) if baseline else {}
    systems = []
    for name, group in grouped.items():
        hedged, against = scored.hedged(name), [name, baseline] if baseline and name != baseline else []
        gains = scored.gains(name, str(baseline)) if against else None
        shares: dict[str, Score] = {}
        if baseline and ceiling and against:
            gap = scores([ceiling, baseline], group_means(scored.gains(ceiling, baseline), members), count, -1.0)
            shares = shares_of_gap(means[name], means[baseline], means[ceiling], gap)
        systems.append(
            System(
                name=name,
                runs=[float(run) for run in group[-1, :, 0]],
                languages=scores([name], hedged, sizes),
                groups=scores([name], group_means(hedged, members), count),
                above={} if gains is None else scores(against, group_means(gains, members), count, -1.0),
                above_languages={} if gains is None else scores(against, gains, sizes, -1.0),
                p_values=chances.get(name, {}),
                gap_closed=shares,
            )
        )
    systems = _with_deviations(systems, values, members, str(baseline))
    result = Systems(task=task.name, metric=metric.name, systems=systems, baseline=baseline, ceiling=ceiling)
    result = replace(result, notes=_notes(systems, settings))
    if others:
        name = settings.name or task.name
        if name in others:
            raise UsageError(
                f"each data set must have a different name, and two are called {name!r}: pass --name.",
                code="compare.names",
            )
        column = {system.name: system.groups["all"] for system in systems}
        result = replace(result, data_sets=side_by_side({name: column, **others}))
    if settings.markdown:
        write_whole(Path(settings.markdown), result.markdown().encode())
    if settings.document:
        write_whole(Path(settings.document), (json.dumps(result.document(), indent=2) + "\n").encode())
    return result


def _with_deviations(
    systems: Sequence[System], values: Mapping[str, Draws], members: Mapping[str, Sequence[int]], baseline: str
) -> list[System]:
    """Return the systems with the deviations of their gains. values [languages runs 1 + resamples]."""

    def over(system: System) -> Deviations:
        return deviations(values[system.name][..., 0], values[baseline][..., 0], members, list(system.languages))

    return [replace(system, deviations=over(system)) if system.above else system for system in systems]


def _notes(systems: Sequence[System], settings: CompareSettings) -> list[str]:
    notes = []
    counts = sorted({len(system.runs) for system in systems})
    if len(counts) > 1:
        notes.append(f"systems have {counts[0]} to {counts[-1]} runs each, so their differences are not paired by run")
    keys = {name: matched for name, matched in _keys(settings.systems).items() if matched}
    odd = next((name for name, matched in keys.items() if matched != next(iter(keys.values()))), None)
    if odd and len(counts) == 1:
        first = next(iter(keys))
        notes.append(
            f"the runs of '{odd}' have other names than those of '{first}': check that both have the same seeds"
        )
    if counts[0] == 1:
        notes.append("intervals of a system with one run cover variation between rows only, not between runs")
    ceiling = next((system for system in systems if system.name == settings.ceiling), None)
    if ceiling and ceiling.above and ceiling.above["all"].low <= 0:
        gain = _format(ceiling.above["all"], "+.3f")
        notes.append(
            f"'{ceiling.name}' does not clearly exceed '{settings.baseline}' ({gain}), so its shares are unknown"
        )
    return notes
