"""docs/papers.md names recipes, commands and files that exist, and no shipped recipe is missing there."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean

import pytest

from adaptermix.commands.recipes import load_recipe
from adaptermix.commands.table import COMMANDS
from adaptermix.io.limited_yaml import read_yaml

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "papers.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = {path.name for path in (ROOT / "recipes").glob("*.yaml")}


def named_recipes(text: str) -> set[str]:
    return set(re.findall(r"\w+\.yaml", text))


def named_commands(text: str) -> set[str]:
    return set(re.findall(r"adaptermix ([a-z][a-z-]*)", text))


def named_options(text: str) -> set[tuple[str, str]]:
    """Return command and option of each command line in backticks."""
    lines = re.findall(r"`adaptermix ([a-z-]+)([^`]*)`", text)
    return {(command, option) for command, rest in lines for option in re.findall(r"--([a-z-]+)", rest)}


def test_every_shipped_recipe_is_on_a_page() -> None:
    texts = [path.read_text(encoding="utf-8") for path in PAGES]
    assert named_recipes(" ".join(texts)) >= RECIPES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_names_recipes_that_exist(page: Path) -> None:
    assert named_recipes(page.read_text(encoding="utf-8")) <= RECIPES | {"recipe.yaml"}


def test_the_page_names_commands_and_options_that_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert named_commands(text) <= set(COMMANDS)
    used = named_options(text)
    assert used
    for command, option in used:
        assert option == "json" or option.replace("-", "_") in COMMANDS[command].schema().model_fields


def test_recipes_are_called_by_their_own_names() -> None:
    """A recipe's lines that start with `# Run:` are copied from recipe to recipe."""
    for name in RECIPES:
        text = (ROOT / "recipes" / name).read_text(encoding="utf-8")
        assert f"adaptermix run recipes/{name}" in text
        assert named_recipes(text.split("version:")[0]) <= RECIPES


def test_links_of_the_page_lead_to_files() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGE.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (PAGE.parent / link).exists()] == []


def expected(recipe: str, title: str) -> dict[str, dict[str, float]]:
    """Return the figures of a table that a recipe expects, by row and column."""
    document = read_yaml(ROOT / "recipes" / recipe)
    assert isinstance(document, dict)
    (table,) = [table for table in document["expect"] if table["title"].startswith(title)]
    columns = [str(name) for name in table["columns"]]
    return {str(name): dict(zip(columns, cells, strict=True)) for name, cells in table["rows"].items()}


def means(rows: dict[str, dict[str, float]], columns: list[str]) -> dict[str, float]:
    return {name: mean(cells[column] for column in columns) for name, cells in rows.items()}


SUPERVISED, ALIGNED = ["ar", "en", "es", "ru", "zh"], ["cy", "ja", "jv", "sw", "tl"]
TO_ENGLISH, FROM_ENGLISH = ["he-en", "ja-en", "uk-en"], ["en-he", "en-ja", "en-uk"]


def test_cells_per_language_have_the_means_that_the_papers_print() -> None:
    """Papers print means to one or two decimals, of cells that are rounded themselves."""
    slots = expected("mid_align_massive.yaml", "tables 8 and 10")
    total = expected("mid_align_massive.yaml", "tables 2 and 6")
    groups = {"supervised": SUPERVISED, "aligned": ALIGNED}
    groups["transfer"] = [name for name in slots["llama3 task"] if name not in SUPERVISED]
    for group, languages in groups.items():
        for row, value in means(slots, languages).items():
            assert row == "llama3 english" or value == pytest.approx(total[row][group], abs=0.11)
    bleu, total = expected("mid_align_alma.yaml", "table 11"), expected("mid_align_alma.yaml", "table 2, BLEU")
    groups = {"transfer to English": TO_ENGLISH, "transfer from English": FROM_ENGLISH}
    groups["supervised"] = [name for name in bleu["llama3 task"] if name not in TO_ENGLISH + FROM_ENGLISH]
    for group, languages in groups.items():
        for row, value in means(bleu, languages).items():
            # table 2 of the paper is 1 BLEU below table 11 here
            other = row.startswith("qwen25") and group == "supervised"
            assert value == pytest.approx(total[row][group] + other, abs=0.11)


@pytest.mark.parametrize(("table", "first"), [("table 8", "tables 1 to 3"), ("table 6", "tables 1 and 2")])
def test_cells_of_flare_have_the_means_of_its_first_tables(table: str, first: str) -> None:
    cells = expected("flare_xlmr.yaml", table)
    total = expected("flare_xlmr.yaml", f"{first}, XLM-R large")
    for system in next(iter(cells.values())):
        value = mean(row[system] for row in cells.values())
        assert value == pytest.approx(total[system.replace("-gold", " gold")]["mean"], abs=0.011)


def test_distances_of_singular_values_are_at_least_the_differences_of_their_norms() -> None:
    """The reverse triangle inequality: a mistyped digit breaks it for most cells."""
    base = expected("mt_pretraining_spectrum.yaml", "table 5, mBART,")
    for model in ("m2m", "m2o", "o2m"):
        for layer, cells in expected("mt_pretraining_spectrum.yaml", f"table 5, {model},").items():
            for name, norm in base[layer].items():
                assert cells[f"{name} d"] >= abs(cells[name] - norm) - 0.011


def test_a_recipe_of_several_models_runs_with_one() -> None:
    """Figures of the others are then "not run", so their rows name steps that the recipe does not have."""
    path = ROOT / "recipes" / "mid_align_massive.yaml"
    qwen = {"model": "qwen25", "base": "Qwen/Qwen2.5-7B-Instruct", "temperature": 1.5}
    steps = load_recipe(path, {"models": [qwen]})
    assert {step.loop["model"] for step in steps} == {"qwen25"}
    assert len(steps) * 2 == len(load_recipe(path))
