"""Evaluate a base model, with or without an adapter, on a task: one score per language."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..adapters import AdapterSource, open_adapter
from ..errors import OutputError, PlanError
from ..fusion import FUSIONS
from ..fusion.source_rows import INPUT, fusion_of, is_missing, joined, read_beside, reads_itself
from ..io.files import write_whole
from ..io.json_types import JsonObject
from ..io.report_view import ResultView
from ..merging.on_model import acting
from ..models.base import BaseModel, load_base, model_origins, note_other_base, require_causal
from ..options import EvaluateSettings
from ..options.paths import holds_output
from ..pictures import Picture, picture_of
from ..progress import SILENT, Watcher
from ..provenance import manifest
from ..tasks import Metric, Task, clusters_of, get_task, metrics_of
from ..tasks.base import remarks
from ..tasks.data.report import left_out_warnings
from ..tasks.data.tables import Row
from ..tasks.heads.from_adapters import form_of_head, head_of, template_of
from ..tasks.splits import add_to_record, check_split
from ..tasks.tagged import to_entry
from .answering import Answering
from .fusion_sources import FusionSource, fusing
from .score import Score, Statistics, by_role, count_rows, documents, draws, mean_score, paired_difference
from .server import server_answers

BASE = "base"
"""Name of the base model alone in `--against`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The difference of one system's headline score to another's on the same rows, with paired bootstrap intervals.

    Args:
        name: The other system.
        languages: Difference per language.
        overall: Difference of the means over languages.
        other: The other system's headline score per language.
    """

    name: str
    languages: Mapping[str, Score]
    overall: Score
    other: Mapping[str, Score]

    def document(self) -> JsonObject:
        """Return plain data."""
        return {
            "name": self.name,
            "difference": documents(self.languages),
            "overall": self.overall.document(),
            "scores": documents(self.other),
        }


def compare(
    task: Task, rows: Sequence[Row], ours: Evaluation, theirs: Evaluation, *, name: str, seed: int
) -> Comparison:
    """Compare two evaluations on the same rows."""
    headline = metrics_of(task, rows, metric=ours.metric, scorer=ours.scorer)[0]
    first, second = theirs.counts, ours.counts
    return Comparison(
        name=name,
        languages={key: paired_difference(headline, [first[key]], [second[key]], seed=seed) for key in second},
        overall=paired_difference(headline, [first[key] for key in second], list(second.values()), seed=seed),
        other=theirs.scores,
    )


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Evaluation(ResultView):
    """Scores of one system.

    Args:
        task: Name of the task.
        metric: Name of the headline metric.
        scores: Headline score per language.
        others: Further metrics, each with scores per language.
        overall: Mean of the headline score over languages, with its interval.
        groups: Mean of the headline score over languages by role: supervised, aligned, transfer, all.
        roles: Languages by role, from the adapters' manifests.
        answers: The generated answers, row by row.
        counts: For each language the headline metric's statistics, row by row.
        against: The comparison with another system, if requested.
        split: Use of the rows, dev or test, if stated.
        without_source: Number of rows without a source, if others have one.
        scorer: Name of the scoring script that was followed, if one was requested.
        group_scores: `groups` with their intervals.
        resamples: The mean of the headline score over languages, first on the rows, then on each bootstrap resample;
            systems that are evaluated with the same seed share the resamples.
    """

    task: str
    metric: str
    scores: Mapping[str, Score]
    others: Mapping[str, Mapping[str, Score]]
    overall: Score
    groups: Mapping[str, float]
    roles: Mapping[str, Sequence[str]]
    answers: Sequence[str]
    counts: Mapping[str, Statistics]
    against: Comparison | None = None
    split: str | None = None
    without_source: int | None = None
    scorer: str | None = None
    group_scores: Mapping[str, Score] = field(default_factory=dict)
    resamples: Sequence[float] = ()

    def plot(self) -> Picture:
        """Return bars per language with 95 % intervals as SVG, for notebooks and `save`."""
        return picture_of(self.document())

    def document(self) -> JsonObject:
        """Return the JSON document of `adaptermix evaluate`."""
        more = {
            "split": self.split,
            "without_source": self.without_source,
            "scorer": self.scorer,
            "against": self.against and self.against.document(),
        }
        return {
            "task": self.task,
            "metric": self.metric,
            "scores": documents(self.scores),
            "groups": dict(self.groups),
            "group_scores": documents(self.group_scores),
            "overall": self.overall.document(),
            "roles": {role: sorted(names) for role, names in self.roles.items()},
            "metrics": {self.metric: documents(self.scores)} | {name: documents(s) for name, s in self.others.items()},
        } | {key: value for key, value in more.items() if value is not None}


def group_scores(
    metric: Metric, counts: Mapping[str, Statistics], roles: Mapping[str, Sequence[str]], *, seed: int
) -> dict[str, Score]:
    """Return the mean score of the languages in each role, with its interval; see `by_role`."""
    members = by_role(list(counts), roles.get("supervised", ()), roles.get("aligned", ()))
    return {role: mean_score(metric, [counts[name] for name in names], seed=seed) for role, names in members.items()}


def score_answers(
    task: Task,
    rows: Sequence[Row],
    answers: Sequence[str],
    roles: Mapping[str, Sequence[str]],
    *,
    seed: int,
    metric: str | None = None,
    scorer: str | None = None,
    metrics: tuple[Metric, ...] = (),
) -> Evaluation:
    """Score generated answers per language, by `metrics` if they are passed, else by those of `metrics_of`."""
    metrics = metrics or metrics_of(task, rows, metric=metric, scorer=scorer)
    languages = [task.language(row) for row in rows]
    clusters = clusters_of(task, rows)
    counts = {metric.name: count_rows(metric, languages, rows, answers, clusters) for metric in metrics}
    scores = {
        metric.name: {name: mean_score(metric, [rows], seed=seed) for name, rows in counts[metric.name].items()}
        for metric in metrics
    }
    headline = metrics[0]
    statistics = counts[headline.name]
    groups = group_scores(headline, statistics, roles, seed=seed)
    return Evaluation(
        task=task.name,
        metric=headline.name,
        scores=scores[headline.name],
        others={metric.name: scores[metric.name] for metric in metrics[1:]},
        overall=mean_score(headline, list(statistics.values()), seed=seed),
        groups={role: score.value for role, score in groups.items()},
        group_scores=groups,
        roles=roles,
        answers=answers,
        counts=statistics,
        scorer=scorer,
        resamples=np.mean([draws(headline, [rows], seed)[0] for rows in statistics.values()], axis=0).tolist(),
    )


def _check_predictions(settings: EvaluateSettings) -> None:
    path = Path(settings.predictions) if settings.predictions else None
    if path and not path.absolute().parent.is_dir():
        raise OutputError(
            f"--predictions must lie in a folder that exists, and {path} does not.", code="output.no-parent"
        )
    if path and path.is_dir():
        raise OutputError(f"--predictions must be a file, and {path} is a folder.", code="output.is-folder")
    if path and path.exists() and not settings.overwrite:
        raise OutputError(
            f"{path} exists. Pass --overwrite to replace it, or choose another file.", code="output.file-exists"
        )


def _check_fusion(settings: EvaluateSettings, systems: Sequence[AdapterSource]) -> None:
    """Refuse options about sources if no adapter uses sources."""
    fusions = [(fusion_of([system]), reads_itself([system])) for system in systems]
    inside = [fusion for fusion, _ in fusions if fusion.get("fusion_alignment", "soft") != "soft"]
    faults = (
        (
            settings.source and all(not fusion or uses_it for fusion, uses_it in fusions),
            "--source needs an adapter that fuses (train-fusion), and there is no such adapter",
        ),
        (
            settings.source_encoder and not any(fusion.get("fusion_encoder") for fusion, _ in fusions),
            "--source-encoder needs an adapter that was trained with one, and there is no such adapter",
        ),
        (
            settings.source_alignment and not any(fusion["fusion"] in FUSIONS for fusion in inside),
            "--source-alignment needs an adapter that fuses token by token, and there is no such adapter",
        ),
    )
    for is_fault, message in faults:
        if is_fault:
            raise PlanError(f"{message}. Leave it out.", code="fusion.not-for")


@holds_output
def evaluate(settings: EvaluateSettings, *, watch: Watcher = SILENT) -> Evaluation:
    """Evaluate a base model on a task, with an adapter or without.

    Raises:
        AdapterMixError: the model, the adapter or a data file is invalid.
    """
    _check_predictions(settings)
    task = get_task(settings.task, settings.columns)
    sources = _opened(settings.adapter)
    others = None if settings.against is None else _opened(None if settings.against == BASE else settings.against)
    template = template_of(task, sources or others or [], settings.template)
    rows, files = task.read(settings.data, rows=settings.rows)
    _check_fusion(settings, [*sources, *(others or [])])
    for note in [*left_out_warnings(sum(file.left_out for file in files), len(rows)), *remarks(task, rows)]:
        watch.note(note)
    source_rows, source_files = (
        read_beside(task, settings.source, rows, data=settings.data, chosen=settings.rows, watch=watch)
        if settings.source
        else (None, [])
    )
    origins = [*map(manifest.origin, [*sources, *(others or [])]), *model_origins(settings.base)]
    check_split([*files, *source_files], origins, split=settings.split, watch=watch)
    # Missing packages are reported before a model is loaded.
    metrics_of(task, rows, metric=settings.metric, scorer=settings.scorer)
    head = head_of(task, [*sources, *(others or [])], rows, names=settings.labels, base=settings.base)
    headless = [system for system in (sources, others) if system is not None and not any(map(form_of_head, system))]
    if head and headless:
        raise PlanError(
            f"an adapter with {head.form.title} can be compared only with another adapter that has such a head: the "
            "base model alone and adapters without a head cannot give its answers.",
            code="compare.head",
        )
    if head is None:
        require_causal(settings.base, f"without a head for it, task '{task.name}'")
    if head and settings.server:
        raise PlanError(
            f"servers do not run adapters with {head.form.title}: evaluate them without --server.", code="server.head"
        )
    base = None if settings.server else load_base(settings.base, **settings.load_options(), head=head)
    if base:
        note_other_base(base, [*sources, *(others or [])], watch)
    roles = manifest.inherit(sources)["languages"] or {}
    scored = _Scoring(base, task, rows, source_rows, settings, template=template, roles=roles, watch=watch)
    missing = sum(is_missing(task, source) for source in source_rows or ()) or None
    result = replace(scored(sources, "answer"), split=settings.split, without_source=missing)
    if settings.split == "test":
        add_to_record([*files, *source_files], task=task.name, adapter=_name(sources), watch=watch)
    if settings.predictions:
        _write_predictions(Path(settings.predictions), task, rows, result)
    if others is not None:
        name = _name(others)
        theirs = scored(others, f"answer with {name}")
        result = replace(result, against=compare(task, rows, result, theirs, name=name, seed=settings.seed))
    return result


class _Scoring:
    """Scores adapters one after another on the same model and rows, each with its fusion inputs."""

    def __init__(
        self,
        base: BaseModel | None,
        task: Task,
        rows: Sequence[Row],
        source_rows: Sequence[Row] | None,
        settings: EvaluateSettings,
        *,
        template: str,
        roles: Mapping[str, Sequence[str]],
        watch: Watcher,
    ) -> None:
        self._base, self._task, self._rows, self._sources = base, task, rows, source_rows
        self._settings, self._template, self._roles, self._watch = settings, template, roles, watch
        self._cached: dict[bool, Answering] = {}

    def _answering(self, base: BaseModel, *, is_joined: bool) -> Answering:
        """Return the object that answers the rows, joined with their sources if requested; cached with its drafts."""
        if is_joined not in self._cached:
            rows = joined(self._task, self._rows, self._sources) if is_joined and self._sources else self._rows
            self._cached[is_joined] = Answering(
                base, self._task, rows, self._settings, template=self._template, watch=self._watch
            )
        return self._cached[is_joined]

    def __call__(self, systems: Sequence[AdapterSource], label: str) -> Evaluation:
        settings = self._settings
        if self._base is None:
            answers = server_answers(
                settings, systems, self._task, self._rows, template=self._template, label=label, watch=self._watch
            )
        else:
            answers = self._answers(self._base, systems, label)
        return score_answers(
            self._task,
            self._rows,
            answers,
            self._roles,
            seed=settings.seed,
            metric=settings.metric,
            scorer=settings.scorer,
        )

    def _answers(self, base: BaseModel, systems: Sequence[AdapterSource], label: str) -> list[str]:
        fusion = fusion_of(systems)
        source_rows = self._rows if reads_itself(systems) else self._sources
        if fusion and source_rows is None:
            self._watch.note(
                "warning: without sources a fused adapter is a plain LoRA; pass the rows' sources with --source."
            )
        answering = self._answering(base, is_joined=fusion.get("fusion") == INPUT)
        entry = [system.meta.manifest.get("fusion") or {} for system in systems]
        source = FusionSource(
            fusion=fusion,
            task=self._task,
            rows=source_rows if fusion else None,
            template=self._template,
            fingerprint=next((known.get("encoder_fingerprint") for known in entry), None),
        )
        with acting(base, systems), fusing(base, answering, source, self._settings):
            return answering(label)


def _write_predictions(path: Path, task: Task, rows: Sequence[Row], result: Evaluation) -> None:
    split = {"split": result.split} if result.split else {}
    entries = (
        {"language": task.language(row), "expected": task.answer(row), **split, **to_entry(answer)}
        for row, answer in zip(rows, result.answers, strict=True)
    )
    write_whole(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode())


def _name(sources: Sequence[AdapterSource]) -> str:
    return sources[0].name if sources else BASE


def _opened(folder: str | None) -> list[AdapterSource]:
    return [] if folder is None else [open_adapter(Path(folder))]
