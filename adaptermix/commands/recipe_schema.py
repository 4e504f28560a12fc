"""A JSON schema of recipes, by which editors complete and check them."""

from __future__ import annotations

from ..io.json_types import JsonObject
from .expected import Table
from .recipe_file import STEPS
from .table import COMMANDS

_FILLED = {"type": "string", "pattern": r"\$\{\w+\}"}
"""A value with a variable, which any option may have."""


def recipe_schema() -> JsonObject:
    """Return the JSON schema (draft 2020-12) of a recipe.

    An option may be missing, since an override or a merge key may give it; `run --dry-run` checks that.
    """
    definitions: JsonObject = {}
    commands: JsonObject = {}
    for name, settings in STEPS.items():
        schema = settings.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= schema.pop("$defs", {})
        properties = {key: _option(value) for key, value in schema["properties"].items()}
        hyphened = {
            key.replace("_", "-"): {"$ref": f"#/$defs/{name}/properties/{key}"} for key in properties if "_" in key
        }
        definitions[name] = {
            "type": "object",
            "description": COMMANDS[name].summary,
            "properties": properties | hyphened,
            "additionalProperties": False,
        }
        commands[name] = {"$ref": f"#/$defs/{name}"}
    table = Table.model_json_schema(ref_template="#/$defs/{model}")
    definitions |= table.pop("$defs", {})
    for value in table["properties"].values():  # the keys of one figure may be without a list
        if "additionalProperties" in value:
            value["additionalProperties"] = _option(value["additionalProperties"])
    definitions["table"] = table
    definitions["steps"] = {"type": "array", "minItems": 1, "items": {"anyOf": [_step(commands), _loop()]}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "adaptermix recipe",
        "type": "object",
        "required": ["version", "steps"],
        "additionalProperties": False,
        "properties": {
            "version": {"const": 1},
            "variables": {"type": "object"},
            "steps": {"$ref": "#/$defs/steps"},
            "expect": {"type": "array", "items": {"$ref": "#/$defs/table"}},
        },
        "$defs": definitions,
    }


def _option(schema: JsonObject) -> JsonObject:
    """Return the schema of an option, which a variable may replace, and a list by one of its values."""
    described: JsonObject = {key: schema.pop(key) for key in ("title", "description", "default") if key in schema}
    alternatives = schema.pop("anyOf", [schema])
    forms = list(alternatives) if isinstance(alternatives, list) else []
    single = [form["items"] for form in forms if isinstance(form, dict) and "items" in form]
    return described | {"anyOf": [*forms, *single, _FILLED]}


def _step(commands: JsonObject) -> JsonObject:
    named = {"name": {"type": "string", "description": "the name by which `expect` finds the step"}}
    return {
        "type": "object",
        "properties": {**named, **commands},
        "additionalProperties": False,
        "oneOf": [{"required": [name]} for name in commands],
    }


def _loop() -> JsonObject:
    return {
        "type": "object",
        "properties": {"each": {"type": ["object", "array", "string"]}, "steps": {"$ref": "#/$defs/steps"}},
        "required": ["each", "steps"],
        "additionalProperties": False,
    }
