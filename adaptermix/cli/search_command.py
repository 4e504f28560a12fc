"""`search`: merge weights of two adapters, or settings of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..options import SearchSettings
from .console import Console
from .options import VariadicCommand, console_options, key_texts, key_values, settings_command

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..evaluation.score import Score
    from ..tuning import RecipeTrial


def _tune(
    *,
    recipe: str,
    overrides: tuple[str, ...],
    vary: tuple[str, ...],
    out: str,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **how: Any,
) -> None:
    from ..tuning import check, shown, tune
    from ..weight_search.parameters import described

    console = Console(as_json=as_json, quiet=quiet)
    chosen = key_texts(vary)
    asked: dict[str, Any] = {"out": out, "overrides": key_values(overrides), **how}
    if dry_run:
        checked = check(recipe, chosen, **asked)
        for note in checked.notes:
            console.say(note)
        document = {
            "recipe": recipe,
            "dry_run": True,
            "parameters": {key: described(p) for key, p in checked.parameters.items()},
        }
        if checked.trials is not None:
            console.say(f"would try {checked.trials} candidates that {checked.sampler} proposes: {shown(chosen)}")
            console.document(document | {"trials": checked.trials, "sampler": checked.sampler})
            return
        for settings, folder, steps in checked.planned:
            console.say(f"{folder}: {settings}, {len(steps)} steps")
        trials = [{"settings": settings, "folder": str(folder)} for settings, folder, _ in checked.planned]
        console.document(document | {"trials": trials})
        return
    result = tune(recipe, chosen, **asked, watch=console.watch)
    rows = [_outcome(trial, is_best=trial is result.best) for trial in result.candidates]
    console.table(["settings", "dev", "95 % interval", "trial"], rows)
    if result.verdict:
        console.say(result.verdict.sentence())
    console.say(f"best on dev: {result.best.folder}")
    console.document(result.document())


def _outcome(trial: RecipeTrial, *, is_best: bool) -> list[str]:
    from ..tuning import shown

    pruned = trial.pruned
    scored = (
        ["stopped", f"{pruned.command} step {pruned.step}"]
        if pruned
        else [f"{trial.value:.3f}", f"{trial.low:.3f} to {trial.high:.3f}"]
    )
    return [shown(trial.settings) + " *" * is_best, *scored, trial.folder.name]


_TUNE = VariadicCommand(
    "search",
    callback=_tune,
    params=[
        click.Argument(["recipe"], required=True, metavar="RECIPE"),
        click.Argument(["overrides"], nargs=-1, metavar="[KEY=VALUE...]"),
        click.Option(
            ["--vary"],
            multiple=True,
            required=True,
            metavar="KEY=V[,V...]|LOW:HIGH[:log]...",
            help="values to try, such as train-align.temperature=0.05,0.1 train-align.layer=6,9; with --trials also "
            "ranges, train-align.temperature=0.02:2:log train-align.layer=6:12 (whole numbers where both ends are)",
        ),
        click.Option(
            ["--trials"],
            type=click.IntRange(min=1),
            help="candidates that a sampler proposes, each once, instead of all combinations",
        ),
        click.Option(
            ["--sampler"],
            type=click.Choice(["auto", "random", "tpe", "cmaes", "gp"]),
            default="auto",
            help="what proposes candidates (optuna): gp for up to 8 ranges, else tpe, also with --prune  "
            "[default: auto]",
        ),
        click.Option(
            ["--seed"], type=click.IntRange(0, 2**31 - 1), default=0, help="seed of the sampler  [default: 0]"
        ),
        click.Option(
            ["--prune"],
            is_flag=True,
            help="stop candidates early whose training is behind the median of four or more earlier ones on dev data: "
            "the accuracy of train-align's dev_pairs, which no temperature changes, or the dev loss of the task; only "
            "training of equal layer, batch size and steps is compared",
        ),
        click.Option(["--out"], required=True, help="folder of all candidates; the same call goes on where it stopped"),
        click.Option(["--dry-run"], is_flag=True, help="check every candidate and show them; run nothing"),
        *console_options(),
    ],
    help="Find settings of a recipe on dev data.\n\nThe recipe is run for every combination of values, or "
    "for --trials of them; its last step, search or evaluate, judges, and steps that candidates share are run once. "
    "The same call goes on where it stopped.\n\nExample: adaptermix search recipe.yaml base=MODEL --vary "
    "train-align.temperature=0.05,0.1 train-align.layer=6,9 --out tuned\n\nExample: adaptermix search recipe.yaml "
    "base=MODEL --vary train-align.temperature=0.02:2:log train-align.layer=6:12 train-align.rank=8,16,32 --trials 24 "
    "--prune --out tuned",
)


class _Search(VariadicCommand):
    """Takes a recipe in the place of adapters."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args and args[0].endswith((".yaml", ".yml")):
            return _TUNE.make_context(info_name, args, parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


@settings_command(
    SearchSettings,
    name="search",
    text="Example: adaptermix search task align --base MODEL --task slots --dev de.valid.conll nl.valid.conll "
    "--grid 0.5,0.7,0.9 --out merged\n\nExample: adaptermix search task align style --base MODEL --task slots --dev "
    "de.valid.conll --trials 40 --space free --groups 3 --out merged\n\nExample, without labels: adaptermix search "
    "task align --base MODEL --task classify --objective agreement --pairs de-en.tsv nl-en.tsv --grid 0.25,0.5,0.75,1 "
    "--space both --out merged\n\nWith a recipe in the place of the adapters, "
    "settings of training are searched: "
    "see 'adaptermix search recipe.yaml --help'.",
    cls=_Search,
)
def search(settings: SearchSettings, console: Console) -> None:
    """Find weights."""
    from ..publish.output import size_sentence
    from ..weight_search import search as work
    from ..weight_search import search_dry, shown
    from ..weight_search.control import NAME

    if settings.dry_run:
        document = search_dry(settings)
        named = document["candidates"] or document["parameters"]
        console.say(
            f"would try {document['trials']} candidates on {document['rows']} "
            f"{'rows' if settings.pairs else 'dev rows'} and write {settings.out}; "
            f"searched: {', '.join(named)}"
        )
        if settings.control and len(settings.adapters) > 1:
            draws = f"{settings.control} draw{'s' * (settings.control > 1)}"
            console.say(f"where a gain is found, {NAME} would be tried on the same rows: {draws}")
        for note in document["notes"]:
            console.note(note)
        console.document(document)
        return
    result = work(settings, watch=console.watch)
    trials = zip(result.trials, result.scores, result.languages, strict=True)
    rows = [
        _row(
            shown(trial.candidate) + " *" * (trial is result.chosen),
            score,
            scores,
            "" if trial.is_whole else trial.rows,
        )
        for trial, score, scores in trials
    ]
    alone = "task adapter alone" + " *" * (result.chosen is result.baseline)
    rows.append(_row(alone, result.baseline_score, result.baseline_languages, ""))
    if control := result.verdict.control:
        rows.append(_row(NAME, control.score, control.languages, ""))
    titles = ["weights", result.objective, "95 % interval", *result.baseline_languages]
    if settings.race:
        console.table([*titles, "stopped after"], rows)
    else:
        console.table(titles, [row[:-1] for row in rows])
    console.say(result.sentence())
    left = [shown(t.candidate) for t, keeps in zip(result.trials, result.kept or (), strict=False) if keeps is False]
    if left:
        console.say(
            "worth 0, since their answers to the second side of the pairs are too far from the task adapter's: "
            + ", ".join(left)
        )
    if result.dev:
        console.say(result.dev.sentence())
    console.say(
        f"{result.rule} on {result.chosen_on}: {shown(result.chosen.candidate)} ({result.objective} "
        f"{result.chosen_score.value:.3f}); wrote {result.out}"
    )
    if result.rank is not None and result.bytes is not None:
        console.say(size_sentence(result.rank, result.bytes))
    console.document(result.document())


def _row(name: str, score: Score, languages: Mapping[str, Score], rows: int | str) -> list[str]:
    values = [f"{found.value:.3f}" for found in languages.values()]
    return [name, f"{score.value:.3f}", f"{score.low:.3f} to {score.high:.3f}", *values, str(rows)]
