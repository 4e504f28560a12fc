"""`search`: merge weights of two adapters, or settings of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from ..settings import SearchSettings
from .console import Console
from .options import VariadicCommand, console_options, key_values, settings_command

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..evaluation.score import Score


def _values(arguments: tuple[str, ...]) -> dict[str, list[Any]]:
    """Return the values to try of each `KEY=VALUE[,VALUE...]`."""
    found = {}
    for key, text in (argument.partition("=")[::2] for argument in arguments):
        if not key or not text:
            raise click.BadParameter(f"KEY=VALUE[,VALUE...] is needed, got {key or text!r}.")
        try:
            values = yaml.safe_load(text if text.startswith("[") else f"[{text}]")
        except yaml.YAMLError as error:
            raise click.BadParameter(f"the values of {key!r} must be YAML: {text!r}.") from error
        if not values or key in found:
            raise click.BadParameter(f"a key is given once, with one value or more; {key!r} is given as {text!r}.")
        found[key] = values
    return found


def _tune(
    *,
    recipe: str,
    overrides: tuple[str, ...],
    vary: tuple[str, ...],
    out: str,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    from ..tuning import plan, shown, tune

    console = Console(as_json=as_json, quiet=quiet)
    chosen, shared = _values(vary), key_values(overrides)
    if dry_run:
        planned = plan(Path(recipe), chosen, Path(out), shared)
        for settings, folder, steps in planned:
            console.say(f"{folder}: {settings}, {len(steps)} steps")
        trials = [{"settings": settings, "folder": str(folder)} for settings, folder, _ in planned]
        console.document({"recipe": recipe, "dry_run": True, "trials": trials})
        return
    result = tune(recipe, chosen, out=out, overrides=shared, watch=console.watch)
    rows = [
        [
            shown(trial.settings) + (" *" if trial is result.best else ""),
            f"{trial.value:.3f}",
            f"{trial.low:.3f} to {trial.high:.3f}",
            trial.folder.name,
        ]
        for trial in result.candidates
    ]
    console.table(["settings", "dev", "95 % interval", "trial"], rows)
    console.say(f"best on dev: {result.best.folder}")
    console.document(result.document())


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
            metavar="KEY=V[,V...]...",
            help="values to try, such as train-align.temperature=0.05,0.1 train-align.layer=6,9",
        ),
        click.Option(["--out"], required=True, help="folder of all candidates; the same call goes on where it stopped"),
        click.Option(["--dry-run"], is_flag=True, help="check every candidate and show them; run nothing"),
        *console_options(),
    ],
    help="Find settings of a recipe on dev data.\n\nThe recipe is run for every combination of values; its last step, "
    "search or evaluate, judges, and steps that candidates share are run once.\n\nExample: adaptermix search "
    "recipe.yaml base=MODEL --vary train-align.temperature=0.05,0.1 train-align.layer=6,9 --out tuned",
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
    "de.valid.conll --trials 40 --space free --groups 3 --out merged\n\nWith a recipe in the place of the adapters, "
    "settings of training are searched: "
    "see 'adaptermix search recipe.yaml --help'.",
    cls=_Search,
)
def search(settings: SearchSettings, console: Console) -> None:
    """Find weights."""
    from ..study import search as work
    from ..study import search_dry, shown

    if settings.dry_run:
        document = search_dry(settings)
        console.say(
            f"would try {document['trials']} candidates on {document['rows']} dev rows and write {settings.out}; "
            f"searched: {', '.join(document['parameters'])}"
        )
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
    titles = ["weights", result.objective, "95 % interval", *result.baseline_languages]
    if settings.race:
        console.table([*titles, "stopped after"], rows)
    else:
        console.table(titles, [row[:-1] for row in rows])
    console.say(result.sentence())
    console.say(
        f"{result.rule} on dev: {shown(result.chosen.candidate)} ({result.objective} {result.chosen_score.value:.3f}); "
        f"wrote {result.out}"
    )
    console.document(result.document())


def _row(name: str, score: Score, languages: Mapping[str, Score], rows: int | str) -> list[str]:
    values = [f"{found.value:.3f}" for found in languages.values()]
    return [name, f"{score.value:.3f}", f"{score.low:.3f} to {score.high:.3f}", *values, str(rows)]
