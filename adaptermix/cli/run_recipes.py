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
    from ..commands.recipes import Step, check_places, load_recipe, run_recipe, run_step

    recipe, overrides = settings.recipe, settings.overrides
    if settings.dry_run:
        steps = load_recipe(Path(recipe), overrides)
        check_places(Path(recipe), steps, resume=settings.resume)
        for number, step in enumerate(steps, start=1):
            console.say(f"{number}. {step.command}: {step.settings.model_dump(exclude_defaults=True)}")
        plan = [{"command": step.command, "settings": step.settings.model_dump(mode="json")} for step in steps]
        console.document({"recipe": recipe, "plan": plan})
        return

    def run_one(step: Step) -> JsonObject:
        console.say(f"== {step.command}")
        document = run_step(step, watch=console.watch)
        if summary := _summary(document):
            console.say(f"   {summary}")
        tables = document.get("tables")
        for titles, *rows in tables if isinstance(tables, list) else ():
            console.table(titles, rows)
        return document

    documents = run_recipe(recipe, overrides, resume=settings.resume, run=run_one, watch=console.watch)
    console.document({"recipe": recipe, "steps": documents})


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
