"""`search`: try weights on a live model, merge once at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import manifest
from ..adapters import AdapterSource, open_adapters
from ..compose.execute import execute
from ..compose.forms import Shape
from ..compose.plan import MergePlan, check
from ..compose.report import MergeReport
from ..errors import PlanError
from ..evaluation.acting import acting
from ..evaluation.answering import Answering
from ..evaluation.heads import head_of
from ..evaluation.run import Evaluation, score_answers, template_of
from ..files import check_not_input, check_output
from ..methods.base import build
from ..models import BaseModel, load_base, model_kind, note_other_base, require_causal
from ..output import write_output
from ..progress import SILENT, Watcher
from ..settings import SearchSettings
from ..tasks import Task, get_task
from .trials import Trial, best, grid_search


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """Trials of a search.

    Args:
        trials: In the order in which they ran; values are means over the dev languages.
        chosen: The best of them.
        rows: Dev rows per trial.
        out: The merged adapter's folder.
    """

    trials: list[Trial[Evaluation]]
    chosen: Trial[Evaluation]
    rows: int
    out: Path

    def document(self) -> dict[str, Any]:
        """Return the JSON document of `adaptermix search`."""
        return {
            "best": {"weights": list(self.chosen.weights), **_interval(self.chosen)},
            "trials": [
                {
                    "weights": list(trial.weights),
                    "rows": self.rows,
                    **_interval(trial),
                    "scores": trial.result.document()["scores"],
                }
                for trial in self.trials
            ],
            "metric": self.chosen.result.metric,
            "out": str(self.out),
        }


def _interval(trial: Trial[Evaluation]) -> dict[str, float]:
    overall = trial.result.overall
    return {"value": overall.value, "low": overall.low, "high": overall.high}


def search_with(
    base: BaseModel,
    sources: tuple[AdapterSource, ...],
    settings: SearchSettings,
    *,
    watch: Watcher = SILENT,
) -> SearchResult:
    """Search with a loaded model: both adapters are attached once, and a trial only sets their weights."""
    task: Task = get_task(settings.task)
    template = template_of(task, sources, settings.template)
    rows, files = task.read(settings.dev, rows=settings.rows)
    roles = manifest.inherit(sources)["languages"] or {}
    answering = Answering(base, task, rows, settings, template=template, watch=watch)
    with acting(base, sources) as attached:

        def score(weights: tuple[float, ...]) -> tuple[float, Evaluation]:
            attached.set_weights(weights)
            answers = answering(f"weight {weights[0]:g}")
            result = score_answers(task, rows, answers, roles, seed=settings.seed)
            return result.overall.value, result

        trials = grid_search(settings.grid, score)
    chosen = best(trials)
    result = SearchResult(trials=trials, chosen=chosen, rows=len(rows), out=Path(settings.out))
    _write(result, sources, settings, [file.entry() for file in files])
    return result


def _write(
    result: SearchResult, sources: tuple[AdapterSource, ...], settings: SearchSettings, dev: list[dict[str, object]]
) -> None:
    plan = MergePlan(
        sources=sources,
        weights=result.chosen.weights,
        method=build("exact", {}),
        shape=Shape(rank=settings.rank),
    )
    state, modules = execute(plan)
    report = MergeReport(out=result.out, method="exact", weights=plan.weights, modules=modules)
    document = manifest.manifest(
        "search",
        plan=settings.model_dump(mode="json", exclude={"out", "overwrite", "dry_run"})
        | {"weights": list(plan.weights)},
        base=manifest.base_entry([source.meta for source in sources]),
        inputs=[manifest.input_entry(s, w) for s, w in zip(sources, plan.weights, strict=True)],
        fidelity=report.fidelity(),
        scores=result.chosen.result.document() | {"split": "dev"},
        dev=dev,
        **manifest.inherit(sources),
    )
    results = (json.dumps(result.document(), indent=2) + "\n").encode()
    write_output(result.out, state, document, overwrite=settings.overwrite, extra={"results.json": results})


def _prepare(settings: SearchSettings) -> tuple[tuple[AdapterSource, ...], Sequence[Any]]:
    """Check everything that can be checked without a model; return the adapters and the dev rows."""
    check_output(Path(settings.out), overwrite=settings.overwrite)
    check_not_input(Path(settings.out), settings.adapters)
    sources = open_adapters(settings.adapters)
    check(sources, allow_base_mismatch=settings.allow_base_mismatch)
    task = get_task(settings.task)
    template_of(task, sources, settings.template)
    rows, _ = task.read(settings.dev, rows=settings.rows)
    return sources, rows


def search_dry(settings: SearchSettings) -> dict[str, Any]:
    """Check a search and return its plan.

    Raises:
        AdapterMixError: as `search`, but for the model's weights.
    """
    sources, rows = _prepare(settings)
    if head_of(get_task(settings.task), sources, rows) is None:
        require_causal(settings.base, f"without a head for it, task '{settings.task}'")
    else:
        model_kind(settings.base)
    return {"dry_run": True, "rows": len(rows), "plan": settings.model_dump(mode="json")}


def search(settings: SearchSettings, *, watch: Watcher = SILENT) -> SearchResult:
    """Find the weight of a pair of adapters on dev data, and write the adapter merged at the best.

    The objective is the mean over languages of the task's headline score. Nothing is written or merged per trial.

    Raises:
        AdapterMixError: the adapters, the model, a data file or the output does not do.
    """
    if settings.dry_run:
        raise PlanError("a dry run of a search finds no weight; call search_dry for its plan.")
    sources, rows = _prepare(settings)
    head = head_of(get_task(settings.task), sources, rows)
    if head is None:
        require_causal(settings.base, f"without a head for it, task '{settings.task}'")
    base = load_base(settings.base, **settings.place(), head=head)
    note_other_base(base, sources, watch)
    return search_with(base, sources, settings, watch=watch)
