"""Show the recipes of this project."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ..io.json_types import JsonObject
from .console import Console

if TYPE_CHECKING:
    from ..options import RecipeSettings


def recipe(settings: RecipeSettings, console: Console) -> None:
    """List, show or copy recipes, or show their JSON schema."""
    console.document(_ACTIONS[settings.action](settings, console))


def _list(_settings: RecipeSettings, console: Console) -> JsonObject:
    from ..commands.shipped import shipped

    recipes = shipped()
    width = max(len(entry.name) for entry in recipes)
    for entry in recipes:
        console.say(f"{entry.name:{width}}  {entry.summary}")
    return {"recipes": [entry.document() for entry in recipes]}


def _show(settings: RecipeSettings, console: Console) -> JsonObject:
    from ..commands.shipped import shipped_recipe

    entry = shipped_recipe(str(settings.name))
    console.product(entry.text)
    return {**entry.document(), "text": entry.text}


def _copy(settings: RecipeSettings, console: Console) -> JsonObject:
    from ..commands.shipped import copy_recipe

    path = copy_recipe(str(settings.name), settings.out)
    console.say(f"{path}: adaptermix run {path} --dry-run checks it and shows its steps")
    return {"out": str(path)}


def _schema(_settings: RecipeSettings, console: Console) -> JsonObject:
    from ..commands.recipe_schema import recipe_schema

    schema = recipe_schema()
    console.product(json.dumps(schema, indent=1))
    return schema


_ACTIONS = {"ls": _list, "cat": _show, "cp": _copy, "schema": _schema}
