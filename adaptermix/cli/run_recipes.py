"""Run a recipe, and show its steps as they are done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..io.json_types import JsonObject
from .console import Console

if TYPE_CHECKING:
    from ..options import RunSettings


def run(settings: RunSettings, console: Console) -> None:
    """Run a recipe, or show its steps in a dry run."""
    from ..commands.recipe_checks import check_data
    from ..commands.recipe_file import Step
    from ..commands.recipes import check_outputs, checked_recipe, run_checked, run_step

    recipe = checked_recipe(Path(settings.recipe), settings.overrides)
    if settings.dry_run:
        check_outputs(recipe, resume=settings.resume)
        plan = []
        for number, step in enumerate(recipe.steps, start=1):
            console.say(f"{number}. {step.title}: {step.settings.model_dump(exclude_defaults=True)}")
            plan.append(
                {"command": step.command, "name": step.name, "loop": dict(step.loop)}
                | {"settings": step.settings.model_dump(mode="json")}
            )
        check_data(recipe.path, recipe.steps)
        console.document({"recipe": settings.recipe, "plan": plan})
        return

    def run_one(step: Step) -> JsonObject:
        console.say(f"== {step.title}")
        document = run_step(step, watch=console.watch)
        if summary := _summary(document):
            console.say(f"   {summary}")
        tables = document.get("tables")
        for titles, *rows in tables if isinstance(tables, list) else ():
            console.table(titles, rows)
        return document

    result = run_checked(recipe, resume=settings.resume, run=run_one, watch=console.watch)
    for table in result.expected:
        console.say(f"== {table.heading}")
        console.table(*table.table())
    more = {"expect": [table.document() for table in result.expected]} if result.expected else {}
    console.document({"recipe": settings.recipe, "steps": list(result.documents), **more})


def _summary(document: JsonObject) -> str:
    """The few numbers of a step's document that say how it went."""
    numbers = {
        key: document[key] for key in ("loss", "best", "groups", "headline", "residual", "out") if key in document
    }
    return ", ".join(f"{key} {_plain(value)}" for key, value in numbers.items())


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return f"{value:.3f}" if isinstance(value, float) else str(value)
