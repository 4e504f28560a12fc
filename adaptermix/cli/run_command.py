"""`run`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .console import Console
from .options import console_options, key_values


def _run(*, recipe: str, overrides: tuple[str, ...], dry_run: bool, resume: bool, as_json: bool, quiet: bool) -> None:
    from ..commands.recipes import Step, check_places, load_recipe, run_recipe, run_step

    console = Console(as_json=as_json, quiet=quiet)
    values = key_values(overrides)
    if dry_run:
        steps = load_recipe(Path(recipe), values)
        check_places(Path(recipe), steps, resume=resume)
        for number, step in enumerate(steps, start=1):
            console.say(f"{number}. {step.command}: {step.settings.model_dump(exclude_defaults=True)}")
        plan = [{"command": step.command, "settings": step.settings.model_dump(mode="json")} for step in steps]
        console.document({"recipe": recipe, "plan": plan})
        return

    def run(step: Step) -> dict[str, Any]:
        console.say(f"== {step.command}")
        document = run_step(step, watch=console.watch)
        if summary := _summary(document):
            console.say(f"   {summary}")
        for titles, *rows in document.get("tables", ()):
            console.table(titles, rows)
        return document

    console.document(
        {"recipe": recipe, "steps": run_recipe(recipe, values, resume=resume, run=run, watch=console.watch)}
    )


def _summary(document: dict[str, Any]) -> str:
    """The few numbers of a step's document that say how it went."""
    shown = {key: document[key] for key in ("loss", "best", "groups", "headline", "residual", "out") if key in document}
    return ", ".join(f"{key} {_plain(value)}" for key, value in shown.items())


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return f"{value:.3f}" if isinstance(value, float) else str(value)


run = click.Command(
    "run",
    callback=_run,
    params=[
        click.Argument(["recipe"], required=True, metavar="RECIPE"),
        click.Argument(["overrides"], nargs=-1, metavar="[KEY=VALUE...]"),
        click.Option(["--dry-run"], is_flag=True, help="check the recipe and show its steps; run nothing"),
        click.Option(["--resume"], is_flag=True, help="take outputs that are there, go on with interrupted training"),
        *console_options(),
    ],
    help="Run a recipe: a chain of commands from YAML.\n\n"
    "KEY is a variable of the recipe, or COMMAND.SETTING.\n\n"
    "Example: adaptermix run recipes/quickstart.yaml out=my-run train-align.temperature=0.2",
    no_args_is_help=True,
)
