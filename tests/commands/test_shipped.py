"""The recipes of the project on the command line, and their JSON schema."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from adaptermix.commands.recipe_schema import recipe_schema
from adaptermix.commands.shipped import shipped, shipped_recipe
from tests.cli.test_commands import run

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def faults(text: str) -> list[str]:
    validator = jsonschema.Draft202012Validator(recipe_schema())
    return [error.message for error in validator.iter_errors(yaml.safe_load(text))]


def test_the_schema_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_all_recipes_meet_the_schema(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "step",
    [
        "merge: {adapters: [a, b], weights: 0.5, out: x, max-residual: 0.2}",
        "merge: {adapters: [a, b], weights: [0.5], out: x, max_residual: '${most}'}",
        "train-task: {base: m, task: nli, train: a.tsv, out: x}",
        "{name: this, push: {folder: a, repo: b/c}}",
        "{each: {k: [1, 2]}, steps: [{push: {folder: '${k}', repo: b/c}}]}",
    ],
)
def test_what_recipes_may_say_meets_the_schema(step: str) -> None:
    assert faults(f"version: 1\nsteps: [{step if step.startswith('{') else '{' + step + '}'}]") == []


@pytest.mark.parametrize(
    "text",
    [
        "version: 2\nsteps: [push: {folder: a, repo: b/c}]",
        "version: 1\nsteps: []",
        "version: 1\nstpes: [push: {folder: a, repo: b/c}]",
        "version: 1\nsteps: [{merge: {adaptres: [a, b]}}]",
        "version: 1\nsteps: [{merge: {method: 3}}]",
        "version: 1\nsteps: [{merge: {rank: 0}}]",
        "version: 1\nsteps: [{mrege: {}}]",
        "version: 1\nsteps: [{merge: {}, push: {}}]",
    ],
)
def test_wrong_recipes_do_not_meet_the_schema(text: str) -> None:
    assert faults(text)


def test_ls_lists_every_recipe_with_its_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "recipe", "ls", "--json")
    entries = json.loads(out)["recipes"]
    assert (code, [entry["name"] for entry in entries]) == (0, [path.stem for path in RECIPES])
    assert all(entry["summary"] for entry in entries)
    assert [recipe.path.name for recipe in shipped()] == [path.name for path in RECIPES]


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_cat_prints_a_recipe_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "recipe", "cat", name)[:2] == (0, shipped_recipe("quickstart").text)


def test_cp_writes_a_new_file_and_replaces_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "recipe", "cp", "quickstart")[0] == 0
    assert (tmp_path / "quickstart.yaml").read_text(encoding="utf-8") == shipped_recipe("quickstart").text
    assert run(capsys, "recipe", "cp", "quickstart", tmp_path / "new" / "mine.yaml")[0] == 0
    assert (tmp_path / "new" / "mine.yaml").exists()
    (tmp_path / "quickstart.yaml").write_text("mine")
    code, _, message = run(capsys, "recipe", "cp", "quickstart")
    assert (code, (tmp_path / "quickstart.yaml").read_text()) == (1, "mine")
    assert "quickstart.yaml exists" in message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("cat", "quikstart"), "Did you mean 'quickstart'?"),
        (("cp",), "cp needs the NAME"),
        (("ls", "x"), "ls takes no NAME"),
        (("cat", "quickstart", "x"), "FILE is the copy that cp writes"),
        (("list",), "'ls', 'cat', 'cp' or 'schema'"),
    ],
)
def test_wrong_calls_are_told(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, message = run(capsys, "recipe", *arguments)
    assert code == 2
    assert said in message


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "recipe", "schema")
    assert (code, json.loads(out)) == (0, recipe_schema())
