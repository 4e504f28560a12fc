"""Put the result of a search together, and write it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from ..adapters import open_adapter
from ..merging.output_form import Shape
from ..merging.report import MergeReport
from ..merging.sinks import execute
from ..methods.base import build
from ..options import SearchSettings
from ..options.roles import NO_PART_OF_RESULT, marked
from ..provenance import manifest
from ..publish.output import output_size, write_output
from .candidate_model import candidate_plan
from .merged_candidates import entries_of
from .prepare import Prepared
from .references import DevScores, References, dev_references
from .result import SearchResult
from .trials import Trial


def result_of(
    prepared: Prepared, settings: SearchSettings, trials: list[Trial], baseline: Trial, references: References
) -> SearchResult:
    """Choose among the trials that ran to the end, and return the result.

    Args:
        prepared: The checked search.
        settings: Its settings.
        trials: All trials.
        baseline: The first adapter alone.
        references: The rows that trials are scored on.
    """
    scorer = references.scorer
    whole = [trial for trial in trials if trial.is_whole]
    # With a sampler the task adapter alone is a candidate too. With a grid it is not, unless pairs decide and all
    # candidates of the grid are worth 0 because they lost the answers to the source side.
    eligible = whole if settings.grid and any(map(scorer.keeps, whole)) else [*whole, baseline]
    stopped = [trial for trial in trials if not trial.is_whole]
    verdict = scorer.decide(eligible, baseline, rule=settings.choose, stopped=stopped, raced=settings.race)
    chosen = eligible[verdict.chosen]
    roles = manifest.inherit(prepared.sources)["languages"] or {}
    evaluation = references.evaluation(chosen, roles, settings)
    dev = dev_references(prepared, settings)
    return SearchResult(
        trials=trials,
        scores=[scorer.score(trial) for trial in trials],
        languages=[scorer.languages(trial) for trial in trials],
        baseline=baseline,
        baseline_score=scorer.score(baseline),
        baseline_languages=scorer.languages(baseline),
        verdict=verdict,
        chosen=chosen,
        evaluation=evaluation,
        metric=evaluation.metric,
        objective=settings.objective,
        rule=settings.choose,
        out=Path(settings.out),
        resamples=scorer.values(scorer.counts(chosen)).tolist(),
        kept=[scorer.keeps(trial) for trial in trials] if prepared.pairs else None,
        dev=DevScores.of(dev, trials, eligible, chosen, baseline, settings=settings) if dev else None,
    )


def write_result(result: SearchResult, prepared: Prepared, settings: SearchSettings) -> SearchResult:
    """Write the merged adapter, and return the result with its rank and size."""
    candidate = result.chosen.candidate
    if result.chosen is result.baseline:  # No method may change the task adapter alone.
        plan = replace(
            prepared.template, weights=candidate.weights, method=build("exact", {}), options={}, shape=Shape()
        )
    else:
        plan = candidate_plan(prepared.template, candidate, fixed=dict(settings.options))
    state, modules = execute(plan)
    size = output_size(state, compact=settings.compact)
    result = replace(result, **size)
    report = MergeReport(out=result.out, method=plan.method.title, weights=plan.weights, modules=modules, **size)
    merged = [candidate.name] if candidate.name else []
    document = manifest.manifest(
        "search",
        plan=settings.model_dump(mode="json", exclude={"out", *marked(settings, *NO_PART_OF_RESULT)})
        | candidate.document()
        | {"method": plan.method.title, "options": dict(plan.options)},
        base=manifest.base_entry([source.meta for source in prepared.sources]),
        inputs=[manifest.input_entry(s, w) for s, w in zip(prepared.sources, plan.weights, strict=True)],
        fidelity=report.fidelity(),
        scores=result.evaluation.document() | {"split": result.chosen_on, "verdict": result.verdict.document()},
        **manifest.inherit(
            prepared.sources,
            acting=plan.has_part(report.acting),
            data=entries_of(merged, "data"),
            dev=[*(file.entry() for file in prepared.files), *entries_of(merged, "dev")],
            tested=prepared.tested,
        ),
        fuse=next((open_adapter(Path(name)).meta.manifest.get("fuse") for name in merged), None),
    )
    extra = {"results.json": (json.dumps(result.document(), indent=2) + "\n").encode()}
    if settings.report:
        from .report import report_files

        extra |= report_files(result, name=f"Search of {result.out.name}")
    write_output(result.out, state, document, compact=settings.compact, overwrite=settings.overwrite, extra=extra)
    return result
