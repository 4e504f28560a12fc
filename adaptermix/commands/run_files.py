"""The files on all steps of a recipe's run: their documents, and an HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import ConfigError, OutputError
from ..io.files import write_whole
from ..io.json_types import JsonObject
from ..options.roles import values_of
from ..pictures.page import GENERATOR
from .recipe_file import Recipe, Step
from .report import write_page

FILES = {"run.json": b'{\n "run": ', "run.html": f'content="{GENERATOR}"'.encode()}
"""The files, with the bytes by which each is recognised."""


def write_run(recipe: Recipe, documents: Sequence[JsonObject | None], folder: Path) -> None:
    """Write the documents of the steps, and the page on the run.

    Args:
        recipe: The recipe.
        documents: The document of each step; None where it is not known.
        folder: The folder of the run.
    """
    steps = [
        {
            "step": step.name or _title(step),
            "settings": step.settings.model_dump(mode="json", exclude_defaults=True),
            "document": document,
        }
        for step, document in zip(recipe.steps, documents, strict=True)
    ]
    content = json.dumps({"run": recipe.path.name, "steps": steps}, indent=1) + "\n"
    write_whole(folder / "run.json", content.encode())
    with suppress(ConfigError):  # Steps such as `spectrum` leave no output for a page.
        write_page([folder], folder / "run.html")


def _title(step: Step) -> str:
    """Return a name of a step, such as `evaluate, merged`: its command with its loops, and the adapters it scores."""
    names = values_of(step.settings, ["adapter"]) if "adapter" in type(step.settings).model_fields else []
    return ", ".join([step.title, *(Path(name).name for name in names)])


def check_run_files(folder: Path) -> None:
    """Refuse to replace files that no run of a recipe wrote.

    Raises:
        OutputError: there is such a file.
    """
    for name, mark in FILES.items():
        path = folder / name
        if path.exists() and not (path.is_file() and mark in path.read_bytes()[:1000]):
            raise OutputError(
                f"{path} must be a file of a run to be replaced, and it is not. Move it, or give another folder.",
                code="recipe.run-file",
            )
