"""Show the results of searches: of merge weights, and of settings of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .console import Console

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..evaluation.score import Score
    from ..options import SearchSettings, TuneSettings
    from ..tuning import RecipeTrial
    from ..weight_search import SearchResult


Plan = dict[str, Any]
"""The document of a dry run."""


def tune(settings: TuneSettings, console: Console) -> None:
    """Search over a recipe, or show the candidates in a dry run."""
    from ..tuning import check, label_of
    from ..tuning import tune as run
    from ..weight_search.parameters import described

    recipe, vary = settings.recipe, settings.vary
    options = settings.model_dump(exclude={"recipe", "vary", "dry_run"})
    if settings.dry_run:
        checked = check(recipe, vary, **options)
        for note in checked.notes:
            console.say(note)
        document = {
            "recipe": recipe,
            "dry_run": True,
            "parameters": {key: described(p) for key, p in checked.parameters.items()},
        }
        if checked.trials is not None:
            console.say(f"would try {checked.trials} candidates that {checked.sampler} proposes: {label_of(vary)}")
            console.document(document | {"trials": checked.trials, "sampler": checked.sampler})
            return
        for values, folder, steps in checked.planned:
            console.say(f"{folder}: {values}, {len(steps)} steps")
        trials = [{"settings": values, "folder": str(folder)} for values, folder, _ in checked.planned]
        console.document(document | {"trials": trials})
        return
    result = run(recipe, vary, **options, watch=console.watch)
    rows = [_outcome(trial, is_best=trial is result.best) for trial in result.candidates]
    console.table(["settings", "dev", "95 % interval", "trial"], rows)
    if result.verdict:
        console.say(result.verdict.sentence())
    console.say(f"best on dev: {result.best.folder}")
    console.document(result.document())


def _outcome(trial: RecipeTrial, *, is_best: bool) -> list[str]:
    from ..tuning import label_of

    pruned = trial.pruned
    scored = (
        ["stopped", f"{pruned.command} step {pruned.step}"]
        if pruned
        else [f"{trial.value:.3f}", f"{trial.low:.3f} to {trial.high:.3f}"]
    )
    return [label_of(trial.settings) + " *" * is_best, *scored, trial.folder.name]


def _show_plan(plan: Plan, settings: SearchSettings, console: Console) -> None:
    from ..weight_search import CONTROL_NAME

    named = plan["candidates"] or plan["parameters"]
    console.say(
        f"would try {plan['trials']} candidates on {plan['rows']} "
        f"{'rows' if settings.pairs else 'dev rows'} and write {settings.out}; "
        f"searched: {', '.join(named)}"
    )
    if settings.control and len(settings.adapters) > 1:
        draws = f"{settings.control} draw{'s' * (settings.control > 1)}"
        console.say(f"where a gain is found, {CONTROL_NAME} would be tried on the same rows: {draws}")
    for note in plan["notes"]:
        console.note(note)


def show(result: SearchResult | Plan, settings: SearchSettings, console: Console) -> None:
    """Show the trials and the chosen weights, or the plan of a dry run."""
    from ..publish.output import size_sentence
    from ..weight_search import CONTROL_NAME, label_of

    if isinstance(result, dict):
        _show_plan(result, settings, console)
        return
    trials = zip(result.trials, result.scores, result.languages, strict=True)
    rows = [
        _row(
            label_of(trial.candidate) + " *" * (trial is result.chosen),
            score,
            scores,
            "" if trial.is_whole else trial.rows,
        )
        for trial, score, scores in trials
    ]
    alone = "task adapter alone" + " *" * (result.chosen is result.baseline)
    rows.append(_row(alone, result.baseline_score, result.baseline_languages, ""))
    if control := result.verdict.control:
        rows.append(_row(CONTROL_NAME, control.score, control.languages, ""))
    titles = ["weights", result.objective, "95 % interval", *result.baseline_languages]
    if settings.race:
        console.table([*titles, "stopped after"], rows)
    else:
        console.table(titles, [row[:-1] for row in rows])
    console.say(result.sentence())
    left = [label_of(t.candidate) for t, keeps in zip(result.trials, result.kept or (), strict=False) if keeps is False]
    if left:
        console.say(
            "scored as 0, since their answers to the second side of the pairs differ too much from the task adapter's: "
            + ", ".join(left)
        )
    if result.dev:
        console.say(result.dev.sentence())
    console.say(
        f"{result.rule} on {result.chosen_on}: {label_of(result.chosen.candidate)} ({result.objective} "
        f"{result.chosen_score.value:.3f}); wrote {result.out}"
    )
    if result.rank is not None and result.bytes is not None:
        console.say(size_sentence(result.rank, result.bytes))


def _row(name: str, score: Score, languages: Mapping[str, Score], rows: int | str) -> list[str]:
    values = [f"{score.value:.3f}" for score in languages.values()]
    return [name, f"{score.value:.3f}", f"{score.low:.3f} to {score.high:.3f}", *values, str(rows)]
