"""Evaluate a base model, with or without an adapter, on a task: one score per language."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import manifest
from ..adapters import AdapterSource, open_adapter
from ..compose.attach import Attachment
from ..errors import OutputError
from ..files import write_whole
from ..models import BaseModel, load_base, note_other_base, require_causal
from ..progress import SILENT, Watcher
from ..settings import EvaluateSettings, GenerationSettings
from ..tasks import Counts, Task, get_task, get_template
from .generate import generate
from .score import Score, macro_f1, micro_f1

DEFAULT_TEMPLATE = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Scores of one system.

    Args:
        task: Name of the task.
        metric: The headline metric.
        scores: Headline score per language.
        others: Further metrics, each with scores per language.
        overall: Mean of the headline score over languages, with its interval.
        groups: Mean of the headline score over languages by role: supervised, aligned, transfer, all.
        answers: The generated answers, row by row.
        counts: For each language the headline metric's counts, row by row.
    """

    task: str
    metric: str
    scores: Mapping[str, Score]
    others: Mapping[str, Mapping[str, Score]]
    overall: Score
    groups: Mapping[str, float]
    answers: Sequence[str]
    counts: Mapping[str, Sequence[Counts]]

    def document(self) -> dict[str, Any]:
        """Return the JSON document of `adaptermix evaluate`."""

        def plain(scores: Mapping[str, Score]) -> dict[str, Any]:
            return {language: score.document() for language, score in scores.items()}

        return {
            "task": self.task,
            "metric": self.metric,
            "scores": plain(self.scores),
            "groups": dict(self.groups),
            "metrics": {self.metric: plain(self.scores)} | {name: plain(s) for name, s in self.others.items()},
        }


def group_means(scores: Mapping[str, Score], roles: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return the mean score of the languages in each role; a language supervised and aligned counts as supervised."""
    supervised = set(roles.get("supervised", ()))
    aligned = set(roles.get("aligned", ())) - supervised
    members = {
        "supervised": [name for name in scores if name in supervised],
        "aligned": [name for name in scores if name in aligned],
        "transfer": [name for name in scores if name not in supervised | aligned],
        "all": list(scores),
    }
    return {role: sum(scores[n].value for n in names) / len(names) for role, names in members.items() if names}


def predict(
    base: BaseModel,
    task: Task,
    rows: Sequence[Any],
    settings: GenerationSettings,
    *,
    template: str,
    watch: Watcher = SILENT,
    label: str = "generate",
) -> list[str]:
    """Generate one answer per row with a loaded model."""
    chosen = get_template(template)
    prompts = [chosen.encode(task.text(row), base.tokenizer) for row in rows]
    return generate(
        base,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        watch=watch,
        label=label,
    )


def score_answers(
    task: Task, rows: Sequence[Any], answers: Sequence[str], roles: Mapping[str, Sequence[str]], *, seed: int
) -> Evaluation:
    """Score generated answers per language."""
    counts: dict[str, dict[str, list[Counts]]] = {}
    for row, answer in zip(rows, answers, strict=True):
        for metric, count in task.count(row, answer).items():
            counts.setdefault(metric, {}).setdefault(task.language(row), []).append(count)
    headline = task.metrics[0]
    scores = {
        metric: {language: micro_f1(found, seed=seed) for language, found in languages.items()}
        for metric, languages in counts.items()
    }
    return Evaluation(
        task=task.name,
        metric=headline,
        scores=scores[headline],
        others={metric: found for metric, found in scores.items() if metric != headline},
        overall=macro_f1(list(counts[headline].values()), seed=seed),
        groups=group_means(scores[headline], roles),
        answers=answers,
        counts=counts[headline],
    )


def template_of(sources: Sequence[AdapterSource], given: str | None) -> str:
    """Return the prompt template: as given, else the one an adapter was trained with, else the plain one."""
    tasks = [source.meta.manifest.get("task") for source in sources]
    # a manifest is a file that people edit, so entries of another form are passed over
    trained = [task.get("template") for task in tasks if isinstance(task, Mapping)]
    return given or next((name for name in trained if name and isinstance(name, str)), DEFAULT_TEMPLATE)


def evaluate(settings: EvaluateSettings, *, watch: Watcher = SILENT) -> Evaluation:
    """Evaluate a base model on a task, with an adapter or without.

    Raises:
        AdapterMixError: the model, the adapter or a data file does not do.
    """
    if settings.predictions and not Path(settings.predictions).absolute().parent.is_dir():
        raise OutputError(f"--predictions must lie in a folder that exists, and {settings.predictions} does not.")
    task = get_task(settings.task)
    sources = [open_adapter(Path(settings.adapter))] if settings.adapter else []
    template = template_of(sources, settings.template)
    get_template(template)
    rows, _ = task.read(settings.data, rows=settings.rows)
    states = [source.read() for source in sources]
    base = load_base(settings.base, device=settings.device, dtype=settings.dtype)
    require_causal(base, f"task '{task.name}'")
    note_other_base(base, sources, watch)
    with Attachment(base.model, states):
        answers = predict(base, task, rows, settings, template=template, watch=watch)
    if settings.predictions:
        lines = [json.dumps({"answer": answer}, ensure_ascii=False) + "\n" for answer in answers]
        write_whole(Path(settings.predictions), "".join(lines).encode())
    roles = manifest.inherit(sources)["languages"] or {}
    return score_answers(task, rows, answers, roles, seed=settings.seed)
