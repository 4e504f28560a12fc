"""The examples of docs/recipes.md are recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from adaptermix.commands.loops import MOST_STEPS
from adaptermix.commands.recipe_file import read_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
STEPS = [4, 18, 6, 6]
"""Steps of each example, counted by hand."""


@pytest.mark.parametrize(("text", "count"), list(zip(EXAMPLES, STEPS, strict=True)))
def test_an_example_is_a_recipe(text: str, count: int, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    recipe = read_recipe(path)
    assert len(recipe.steps) == count
    assert len(recipe.tables) == text.count("- title:")


def test_the_page_names_the_limit_of_steps() -> None:
    assert f"at most {MOST_STEPS:,} steps" in PAGE
