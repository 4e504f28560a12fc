"""The recipes of this project: their list, their text, and copies to start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputError, UsageError, near_or_known
from ..io.files import write_whole
from ..io.json_types import JsonObject

_PACKAGE = Path(__file__).parents[1]
_SUFFIX = ".yaml"


@dataclass(frozen=True, slots=True)
class Shipped:
    """A recipe of this project.

    Args:
        path: Its file.
    """

    path: Path

    @property
    def name(self) -> str:
        """The name of the file without its ending."""
        return self.path.stem

    @property
    def text(self) -> str:
        """The content of the file."""
        return self.path.read_text(encoding="utf-8")

    @property
    def summary(self) -> str:
        """The comment in the first line."""
        return self.text.partition("\n")[0].removeprefix("#").strip()

    def document(self) -> JsonObject:
        """Return name, summary and file."""
        return {"name": self.name, "summary": self.summary, "file": str(self.path)}


def shipped() -> Sequence[Shipped]:
    """Return the recipes of this project, by name; an installation has them in the package, a clone next to it."""
    folders = (_PACKAGE / "recipes", _PACKAGE.parent / "recipes")
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    return [Shipped(path) for path in sorted(folder.glob(f"*{_SUFFIX}"))]


def shipped_recipe(name: str) -> Shipped:
    """Return a recipe of this project.

    Args:
        name: Its name, with or without `.yaml`.

    Raises:
        UsageError: there is no such recipe.
    """
    recipes = {recipe.name: recipe for recipe in shipped()}
    recipe = recipes.get(name.removesuffix(_SUFFIX))
    if recipe is None:
        raise UsageError(
            f"NAME must be a recipe of adaptermix, got {name!r}.{near_or_known(name, list(recipes))}",
            code="recipe.not-shipped",
        )
    return recipe


def copy_recipe(name: str, out: str | None) -> Path:
    """Copy a recipe of this project.

    Args:
        name: Its name.
        out: The new file, or a folder for it; default the present folder.

    Returns:
        The new file.

    Raises:
        UsageError: there is no such recipe.
        OutputError: the new file exists.
    """
    recipe = shipped_recipe(name)
    path = Path(out or ".")
    if path.is_dir():
        path /= recipe.path.name
    if path.exists():
        raise OutputError(
            f"the copy must be a new file, and {path} exists. Give another FILE.", code="recipe.copy-exists"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, recipe.text.encode())
    return path
